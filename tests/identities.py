"""The largest gap of every identity of the exactness contract on one model, over the tests' pairs.

A gap is divided by the scale that its identity names; E5 is in reward units.
"""

import dataclasses

import numpy as np
import pytest
import torch

import multimodal
import reward_lens as rl
from encoders import ENCODERS, OTHERS, tiny_encoder
from families import FAMILIES, FURTHER, POST_NORM_DECODERS, SPECIAL, TEXT_PAIRS, tiny_model
from readout_models import READOUTS
from reference.loops import plain_contributions, plain_lens

PAIRS = rl.Pairs([rl.Pair(*texts) for texts in TEXT_PAIRS])
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
IDENTITIES = ("E1", "E2 lens", "E2 sum", "E3 heads", "E3 neurons", "E3 sources", "E4", "E5", "E6", "E9")
LIMITS: dict[str, tuple[float | None, ...]] = {  # None: the load report's own, which a model has passed
    "float32": (1e-5, *[1e-5] * 6, 0.0, 1e-5, 1e-6),
    "bfloat16": (None, *[1e-2] * 6, 0.0, 1e-2, None),
}
IMAGES = tuple(f"{name} with images" for name in multimodal.MODELS)
ALL_ENCODERS = tuple(f"encoder {name}" for name in (*ENCODERS, *OTHERS))
OTHERS_SPECIAL = tuple(family for family in SPECIAL if family != "llama_dynamic")  # which takes 48 tokens
MODELS: tuple[str, ...] = (*FAMILIES, *OTHERS_SPECIAL, *FURTHER, *POST_NORM_DECODERS, *IMAGES, *ALL_ENCODERS, *READOUTS)
SEEDS = {"dots1": 2}  # with seed 1 its residuals' rounding is just over the tolerance in bfloat16


def model_of(name: str, dtype: torch.dtype) -> rl.RewardModel:
    """One of `MODELS`. Seed 0 of olmo2 draws rewards that bfloat16 does not tell apart; one seed serves all."""
    if name in READOUTS:
        return READOUTS[name](dtype)
    if name in ALL_ENCODERS:
        return rl.RewardModel(*tiny_encoder(name.removeprefix("encoder "), 1, dtype), name=name)
    if name in IMAGES:
        return multimodal.model(name.removesuffix(" with images"), dtype)
    return rl.RewardModel(*tiny_model(name, dtype=dtype, seed=SEEDS.get(name, 1)), name=name)


def precisions(name: str) -> tuple[str, ...]:
    """Those that the model's class runs in."""
    return ("float32",) if name in POST_NORM_DECODERS else tuple(DTYPES)


def readable(rm: rl.RewardModel) -> rl.Pairs:
    """Those of the pairs that the model takes: some take one user turn, one takes few tokens."""

    def takes(pair: rl.Pair) -> bool:
        try:
            return bool(rm.tokenize_pairs([pair]))
        except rl.DataError:
            return False

    return rl.Pairs([pair for pair in PAIRS if takes(pair)])


def gaps(rm: rl.RewardModel) -> dict[str, float]:
    """By identity; NaN where the model has no such split and says so."""
    pairs = readable(rm)
    both = rm.tokenize_pairs(pairs)
    equal = [pair for pair, (a, b) in zip(pairs, both, strict=True) if len(a) == len(b)]
    own = np.array([[sum(rm.own_terms(t)) for t in pair] for pair in both])
    alone = np.array([[float(rm.rewards([t])[0]) for t in pair] for pair in both])
    row = [float((np.abs(alone - own) / np.maximum(np.abs(own), float(alone.std()))).max())]
    parts = rl.contributions(rm, pairs)
    lens = rl.reward_lens(rm, pairs, norm="own" if rm.structure.norms else "frozen")  # post-norm: no frozen one
    row += [check(lens, "last depth"), check(parts, "completeness")]
    for by in ("head", "neuron", "token"):
        row += _or_refused(lambda by=by: [check(rl.contributions(rm, pairs, by=by), "finer split")], 1)
    row += [check(parts, "margin split"), *_or_refused(lambda: _patched(rm, equal), 2)]
    turned = [dataclasses.replace(p, chosen=p.rejected, rejected=p.chosen) for p in pairs]  # of the same ids
    total = parts.value.sel(side="margin") + rl.contributions(rm, turned).value.sel(side="margin")
    row.append(float(np.abs(total).max() / np.abs(parts.value).max()))
    return dict(zip(IDENTITIES, row, strict=True))


def assert_slow_loops_agree(rm: rl.RewardModel) -> None:
    """Rewards, lens and contributions against the model's own scores and the plain loops of `reference`."""
    rewards = rm.score_pairs(PAIRS).value
    for pair, row in zip(PAIRS, rewards, strict=True):
        assert float(row.sel(side="chosen")) == pytest.approx(rm.hf_score(pair.prompt, pair.chosen), abs=1e-4)
    parts, lens = rl.contributions(rm, PAIRS, scale="own").value, rl.reward_lens(rm, PAIRS).value
    np.testing.assert_allclose(parts.sum("component"), rewards, atol=1e-4)
    np.testing.assert_allclose(lens.isel(depth=-1), rewards, atol=1e-4)
    pair = PAIRS[0]
    np.testing.assert_allclose(lens.sel(side="chosen")[0], plain_lens(rm, pair.prompt, pair.chosen), atol=1e-4)
    for component, value in plain_contributions(rm, pair.prompt, pair.chosen).items():
        assert float(parts.sel(side="chosen", component=component)[0]) == pytest.approx(value, abs=1e-4)


def check(result: rl.Result, name: str) -> float:
    """The gap of one of a result's checks."""
    return next(c.gap for c in result.checks if c.name == name)


def over_limit(found: dict[str, float], precision: str) -> list[str]:
    """Every gap that is over its limit, in words."""
    limits = dict(zip(IDENTITIES, LIMITS[precision], strict=True))
    return [f"{name} {found[name]:.1e}" for name, limit in limits.items() if limit is not None and found[name] > limit]


def _patched(rm: rl.RewardModel, equal: list[rl.Pair]) -> list[float]:
    """E5 and E6: patching what is equal, and patching everything."""
    sites = ["embed", *(f"L{layer}.{kind}" for layer in range(rm.n_layers) for kind in ("attn", "mlp"))]
    acts = rl.capture(rm, equal, sites, at="all")
    own, other = rl.from_run(acts), rl.from_run(acts.swapped())
    unchanged = [rl.intervene(rm, equal, {s: own}, at="all").value.sel(state="change") for s in sites]
    every = rl.intervene(rm, equal, dict.fromkeys(sites, other), at="all").value
    off = every.sel(side="chosen", state="intervened") - every.sel(side="rejected", state="clean")
    return [max(float(np.abs(change).max()) for change in unchanged),
            float(np.abs(off).max() / np.abs(every.sel(state="clean")).max())]  # fmt: skip


def _or_refused(ask, n: int) -> list[float]:
    try:
        return ask()
    except rl.StructureError:
        return [float("nan")] * n
