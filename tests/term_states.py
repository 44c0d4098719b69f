"""Two reward terms and a pool of responses drawn with known directions: answer keys for the relation of terms.

States have a power-law spectrum (total variance 1, effective dimension about 50); a term's mean difference is `shift`
long, and a pair's difference has the noise of two states. The two directions have the given cosine and otherwise lie on
different axes of the spectrum, so that at cosine 0 their scores are independent.
"""

import numpy as np
import torch

import reward_lens as rl
from reward_lens.methods.terms.direction_cosines import moves_of, whitening
from reward_lens.methods.terms.reward_terms import Pool, Term, pool_of
from reward_lens.model.norm import measure_norm
from reward_lens.model.readout import LinearReadout

SPECTRUM = np.arange(1, 257) ** -0.8
SPECTRUM = SPECTRUM / SPECTRUM.sum()


def identity_readout(d: int = len(SPECTRUM)) -> LinearReadout:
    """A head without a norm in front."""
    like = torch.zeros(d, dtype=torch.float64)
    return LinearReadout(measure_norm(None, d, like), like, torch.zeros((), dtype=torch.float64))


def planted_terms(
    n: int, cosine: float, seed: int = 0, shift: float = 0.15, n_pool: int | None = None, responses: int = 4
) -> tuple[Term, Term, Pool]:
    """Terms of `n` pairs each, over different prompts, and a pool of as many (or `n_pool`) prompts."""
    rng = np.random.default_rng(seed)
    sd = np.sqrt(SPECTRUM)

    def unit(axes):
        v = np.where(axes, sd * rng.standard_normal(len(sd)), 0.0)
        return v / np.linalg.norm(v)

    even = np.arange(len(sd)) % 2 == 0
    one, two = unit(even), unit(~even)
    directions = {"a": one, "b": cosine * one + np.sqrt(1 - cosine**2) * two}
    words = [["x" * int(k) for k in rng.integers(1, 40, responses)] for _ in range(n_pool or n)]
    pool = pool_of([rl.Group(f"pool {i}", w) for i, w in enumerate(words)])
    states = rng.standard_normal((len(pool.group), len(sd))) * sd
    whiten = whitening(states, pool.keys[pool.group])
    terms = []
    for name, v in directions.items():
        noise = np.sqrt(2) * rng.standard_normal((n, len(sd))) * sd
        moves = moves_of([f"{name} {i}" for i in range(n)], shift * v + noise)
        terms.append(Term(name, "pairs", moves, None, states, None, whiten, identity_readout()))
    return terms[0], terms[1], pool
