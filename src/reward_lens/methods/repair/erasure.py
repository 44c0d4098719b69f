"""A reward without covariance with an edit, at the least change of the states that the head reads: LEACE, folded.

x = N(h) is what the head multiplies, z = 1 for an edited response and 0 for its original, S the covariance of x, m its
mean, a = Cov(x, z), W = (S^(1/2))^+ the whitening map, P the orthogonal projection on the span of W a:

    r(x) = x - W^+ P W (x - m) = x - a (a' S^+ (x - m)) / (a' S^+ a)

the least change of x, in the metric of S, after which Cov(r(x), z) = 0. The reward is w . r(x) + b, linear in x, so the
head can hold it:  w' = w - S^+ a (a . w) / (a' S^+ a),  b' = b + (a . w) (a' S^+ m) / (a' S^+ a).

S^+ drops eigenvalues under `tolerance` of the largest; nothing else regularises it. All of it after the norm, so the
scale s(h) is inside x and no route is left through it; but the covariance is that of these texts.

What this cannot show: that the concept is gone on other texts. With fewer texts than dimensions S has no full rank, and
the direction S^+ a then separates these texts for reasons of their own: look at held-out pairs. Nor is anything removed
from the network itself.

Reference: Belrose et al. 2023, arXiv 2306.03819 (theorem 4.2 and equation 1).
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reward_lens import data, stats
from reward_lens.arguments import checked_arguments
from reward_lens.engine.activations import captured
from reward_lens.errors import DataError
from reward_lens.model.head import editable_readout, stored, with_row
from reward_lens.model.linear_maps import linear_bias
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site


@checked_arguments
@torch.no_grad()
def erase_concept(rm: RewardModel, edited_pairs, tolerance: float = 1e-6) -> RewardModel:
    """The reward model whose reward has no covariance with being edited, on these pairs, at the least change of states.

    Parameters
    ----------
    edited_pairs: pairs whose chosen response is the edited one and whose rejected response is the original.
    tolerance: eigenvalues of the states' covariance under this share of the largest count as zero.

    Returns a new `RewardModel`, its head's row (and bias, if it has one) replaced, all else shared; the given one is
    unchanged. The last of its `edits` has `n_pairs`, `n_prompts`, `rank` of the covariance beside `width` d_model,
    `tolerance`, `covariance_before` and `covariance_after` of the reward with z (reward units), and `constant_shift`:
    what the rewards of the head lack of w . r(x) + b because it has no bias to keep it in (0 where it has one). That
    constant is the same for every text: margins are those of erased states either way.
    Raises `DataError` under 6 prompts, where edited and original states have the same mean, and where nothing of
    the reward would be left.
    """
    pairs = data.as_pairs(edited_pairs)
    if pairs.n_prompts < stats.FEWEST or not 0 < tolerance < 1:
        raise DataError(
            "The concept cannot be erased from these pairs",
            found=f"{pairs.n_prompts} different prompts, tolerance={tolerance:g}",
            expected=f"at least {stats.FEWEST} prompts, a tolerance between 0 and 1",
            do="edit responses to more prompts; for a covariance of full rank there have to be more than d_model texts",
        )
    readout = editable_readout(rm)
    site = Site("resid_post", rm.n_layers - 1)
    x = torch.cat([readout.norm(acts[site]).double().cpu() for acts in captured(rm, pairs, [site])])
    mean, centred = x.mean(0), x - x.mean(0)
    label = torch.tensor([0.5, -0.5], dtype=x.dtype).repeat(len(pairs))  # z less its mean; edited comes first
    shared = centred.T @ label / len(x)
    back, rank = _pulled_back(centred, shared, tolerance)
    strength = float(shared @ back)
    if not strength > 1e-12:
        raise DataError(
            "There is nothing to erase",
            found="edited and original responses with the same mean state",
            expected="an edit that moves the states the head reads",
            do="check that chosen is the edited response and rejected the original",
        )
    weight = readout.weight.double().cpu()
    row = weight - back * (shared @ weight) / strength
    constant = float(shared @ weight) * float(back @ mean) / strength
    bias = None if linear_bias(rm.head) is None else readout.bias + constant
    kept = stored(rm, row).double().cpu()
    record = {
        "method": "erase_concept",
        "n_pairs": len(pairs),
        "n_prompts": pairs.n_prompts,
        "inputs_hash": data.inputs_hash(pairs),
        "tolerance": tolerance,
        "rank": rank,
        "width": rm.d_model,
        "covariance_before": float(shared @ weight),
        "covariance_after": float(shared @ kept),
        "constant_shift": constant if bias is None else 0.0,
    }
    return with_row(rm, row, record, bias=bias)


def _pulled_back(
    centred: Float[Tensor, "text d_model"], shared: Float[Tensor, " d_model"], tolerance: float
) -> tuple[Float[Tensor, " d_model"], int]:
    """S^+ a and the rank of S, from the states' singular values: squaring them first would lose half the digits."""
    _, sizes, right = torch.linalg.svd(centred / np.sqrt(len(centred)), full_matrices=False)
    kept = sizes.square() > tolerance * sizes[0].square()
    axes = right[kept]
    return axes.T @ ((axes @ shared) / sizes[kept].square()), int(kept.sum())
