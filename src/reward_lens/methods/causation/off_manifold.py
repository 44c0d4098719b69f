"""Where one state is that no natural state is: off the plane of its natural neighbours, or on units they never use.

    x_near = mu + Q Q'(x - mu)      mu, Q: mean and first principal components of the n nearest natural states
    v      = x - x_near             what is divergent about x
    D      = max over evaluation states y of |psi(y + v) - psi(y)|        psi: the network from here to the reward

v is in the behavioural null-space, as far as these evaluation states can tell, where D <= eps (Algorithm 1 of the
paper). A second detector looks at units instead: one that is silent on natural inputs, or never went as far, and does
now, is a pathway that no natural state takes. Neither contains the other: a divergence can move the reward along
ordinary units, and a hidden unit can cancel out.

What this cannot show: that a divergence is harmless on inputs outside the evaluation states (a dormant change), or to
a claim about a part inside psi.

Reference: Grant et al. 2025, arXiv 2511.04638, section 5 and Algorithm 1.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int

_AT_ONCE = 4_000_000  # floats of the largest temporary array (32 MB)
RARE = 0.999  # a unit past this share of its natural sizes is past its natural range
FAINT = 1e-3  # of the root mean square of all units: below this a unit counts as silent


def off_plane(
    states: Float[np.ndarray, "n d"],
    natural: Float[np.ndarray, "m d"],
    n_neighbours: int,
    variance: float = 0.95,
    rank: int | None = None,
    apart: Bool[np.ndarray, "n m"] | None = None,
) -> tuple[Float[np.ndarray, "n d"], Int[np.ndarray, " n"]]:
    """v of every state, and the number of principal components its plane has.

    The components are those that hold the share `variance` of the neighbours' variance, or `rank` of them. `apart`
    says which natural states may be a neighbour of which state (not of its own prompt, for a natural baseline).
    """
    from scipy.spatial.distance import cdist

    far = cdist(states, natural)
    if apart is not None:
        far = np.where(apart, far, np.inf)
    nearest = np.argsort(far, axis=1, kind="stable")[:, :n_neighbours]
    block = max(1, _AT_ONCE // (n_neighbours * natural.shape[1]))
    parts = [
        _off_planes(states[start : start + block], natural[nearest[start : start + block]], variance, rank)
        for start in range(0, len(states), block)
    ]
    residual, ranks = zip(*parts, strict=True)
    return np.concatenate(residual), np.concatenate(ranks)


def _off_planes(
    states: Float[np.ndarray, "n d"], neighbours: Float[np.ndarray, "n k d"], variance: float, rank: int | None
) -> tuple[Float[np.ndarray, "n d"], Int[np.ndarray, " n"]]:
    centre = neighbours.mean(1)
    cloud, away = neighbours - centre[:, None], states - centre
    # With far fewer neighbours than coordinates the components come cheaper from the k x k inner products.
    sizes, basis = np.linalg.eigh(cloud @ cloud.transpose(0, 2, 1))
    sizes, basis = sizes[:, ::-1].clip(0), basis[:, :, ::-1]
    there = sizes > 1e-10 * sizes[:, :1]
    if rank is None:
        before = np.cumsum(sizes, 1) - sizes  # variance of the larger components
        there &= before < variance * sizes.sum(1, keepdims=True) * (1 - 1e-12)
    else:
        there &= np.arange(sizes.shape[1]) < rank
    weights = np.einsum("nkr,nkd,nd->nr", basis, cloud, away, optimize=True)
    weights = np.divide(weights, sizes, out=np.zeros_like(weights), where=there)
    return away - np.einsum("nkd,nkr,nr->nd", cloud, basis, weights, optimize=True), there.sum(1)


def null_space_test(
    divergence: Float[np.ndarray, "n d"],
    change: Callable[[np.ndarray], np.ndarray],
    eps: float,
) -> tuple[Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """D of every divergence and whether D <= eps; `change` gives psi(y + v) - psi(y), [n, evaluation state]."""
    worst = np.abs(change(divergence)).max(1)
    return worst, worst <= eps


@dataclasses.dataclass(frozen=True)
class UnitRange:
    """How far each unit of a layer goes on natural inputs."""

    most: Float[np.ndarray, " unit"]

    def outside(self, activations: Float[np.ndarray, "*run unit"]) -> Bool[np.ndarray, "*run unit"]:
        """Which units are past their natural range."""
        return np.abs(activations) > self.most


def natural_range(activations: Float[np.ndarray, "run unit"]) -> UnitRange:
    """A unit's limit: the natural 99.9th percentile of its size, and never less than what counts as silent.

    A unit with a natural rate under 0.1% has its 99.9th percentile in the silence, so that it is outside as soon as
    it fires. The percentile is one of the natural values (of fewer than a thousand, the largest).
    """
    faint = FAINT * float(np.sqrt(np.mean(activations**2)))
    return UnitRange(np.maximum(np.quantile(np.abs(activations), RARE, axis=0, method="higher"), faint))
