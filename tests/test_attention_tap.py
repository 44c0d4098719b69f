"""Queries, keys, values and patterns, read and patched inside the attention call: identities on every family."""

import contextlib
import functools

import numpy as np
import pytest
import torch

import reward_lens as rl
from families import by_family, tiny_model
from reference.sweeps import _hook, _run
from reward_lens.engine.editing import Edit
from reward_lens.engine.intervention import pattern, values
from reward_lens.engine.patching import patch_rows
from reward_lens.engine.runs import run_pair
from reward_lens.model.tokens import common_prefix

EQUAL = rl.Pair("What is the capital of France?", "It is Paris, by the river", "It is Rybix, by a rive", id="equal")
UNEQUAL = rl.Pair("Is 7 a prime number?", "Yes, it is one.", "No, because it is 1", id="unequal")
every = pytest.mark.parametrize("family", by_family())
INSIDE = ("q", "k", "v", "pattern")


@functools.cache
def model(family: str) -> rl.RewardModel:
    return rl.RewardModel(*tiny_model(family, seed=1), name=family)


@every
@pytest.mark.parametrize("reuse", [True, False])
def test_all_of_them_together_are_the_attention_write(family, reuse):
    """Queries, keys and values of one run from the first differing token on give its attention write, and so does its
    pattern with its values."""
    rm = model(family)
    runs = run_pair(rm, *rm.tokenize_pairs([EQUAL])[0], [rl.Site(k, 1) for k in (*INSIDE, "attn")], only_final=False)
    base, source = runs
    where = range(common_prefix(base.tokens, source.tokens), base.tokens.reward_pos + 1)

    def edit(kind):
        site = rl.Site(kind, 1)
        given = source.at(site, where)
        return Edit(site, where, pattern(given) if kind == "pattern" else values(given))

    rows = [
        (edit("attn"),),
        tuple(map(edit, ("q", "k", "v"))),
        (edit("pattern"), edit("v")),
        (edit("q"),),
        (edit("k"),),
    ]
    out = patch_rows(rm, base.tokens, rows, reuse=reuse)
    scale = max(1, float(out.change.abs().max()))
    assert float(out.change[:1].abs()) > 1e-3 and float((out.change[3:] - out.change[0]).abs().min()) > 1e-4
    np.testing.assert_allclose(out.change[1:3], [float(out.change[0])] * 2, atol=1e-5 * scale)


@every
def test_a_runs_own_values_change_nothing(family):
    rm = model(family)
    sites = [rl.Site(kind, layer) for kind in INSIDE for layer in range(rm.n_layers)]
    base, _ = run_pair(rm, *rm.tokenize_pairs([EQUAL])[0], sites, only_final=False)
    where = range(base.start, base.tokens.reward_pos + 1)
    rows = []
    for site in sites:
        given = base.at(site, where)
        rows.append((Edit(site, where, pattern(given) if site.kind == "pattern" else values(given)),))
    out = patch_rows(rm, base.tokens, rows)
    assert float(out.change.abs().max()) <= rm.noise_floor


SEPARATE = [
    (f, k) for f in ("llama", "mistral", "qwen2", "gemma", "opt", "mixtral", "stablelm") for k in ("q", "k", "v")
]


# The norm that olmo2 puts on queries and keys spans all heads: one head's projection is not one head's query.
@pytest.mark.parametrize(("family", "kind"), [*SEPARATE, ("olmo2", "v")])
def test_patching_equals_patching_the_projections(family, kind):
    """Where a family has separate projections, patching what they give (before the rotary embedding, at the same
    positions) is the same."""
    rm = model(family)
    chosen, rejected = rm.tokenize_pairs([EQUAL])[0]
    count = rm.n_heads if kind == "q" else rm.n_kv_heads
    sites = [rl.Site(kind, 1, i) for i in range(count)]
    fast = rl.effects(rm, [EQUAL], sites, at="all").value[0]
    block = rm.module.get_submodule(rm.structure.blocks)[1]
    projection = next(m for name, m in block.named_modules() if name.endswith(f"{kind}_proj"))
    held, where = [], list(range(common_prefix(chosen, rejected), len(chosen)))
    with contextlib.ExitStack() as stack:
        _hook(stack, projection, "out", lambda x: held.append(x.clone()))
        with torch.no_grad():
            _run(rm, rejected)
    for i in range(count):
        width = held[0].shape[-1] // count
        mine = slice(i * width, (i + 1) * width)

        def change(x, mine=mine):
            out = x.clone()
            out[0, where, mine] = held[0][0, where, mine]
            return out

        with contextlib.ExitStack() as stack, torch.no_grad():
            _hook(stack, projection, "out", change)
            slow = _run(rm, chosen)
        assert abs(float(fast[i]) - (rm.hf_score(EQUAL.prompt, EQUAL.chosen) - slow)) < 2e-5


@every
def test_captured_patterns_mix_the_values_into_z(family):
    rm = model(family)
    sites = ["L1.pattern", "L1.v", "L1.head", "L1.q", "L1.k"]
    acts = rl.capture(rm, [EQUAL, UNEQUAL], sites, at="all")
    for run, tokens in enumerate(acts.tokens):
        weights, v, z = acts["L1.pattern"][run], acts["L1.v"][run], acts["L1.head"][run]
        assert weights.shape[:2] == (len(tokens), rm.n_heads) and v.shape[1] == rm.n_kv_heads
        assert not weights[:, :, len(tokens) :].any()
        mixed = torch.einsum(
            "qhk,khd->qhd", weights[..., : len(tokens)], v.repeat_interleave(rm.n_heads // v.shape[1], 1)
        )
        torch.testing.assert_close(mixed, z.reshape(mixed.shape), atol=1e-4, rtol=1e-4)


def test_patterns_have_the_precision_of_the_model():
    rm = rl.RewardModel(*tiny_model("gpt2", dtype=torch.float64))
    acts = rl.capture(rm, [EQUAL], ["L1.pattern", "L1.v", "L1.head"], at="all")
    weights, v, z = (acts[f"L1.{kind}"][0] for kind in ("pattern", "v", "head"))
    torch.testing.assert_close(torch.einsum("qhk,khd->qhd", weights, v), z, atol=1e-12, rtol=0)


def test_captured_patterns_are_as_wide_as_their_text_in_any_batch():
    rm = model("llama")
    alone, padded = (rl.capture(rm, [EQUAL, UNEQUAL], ["L1.P1"], at="all", batch_size=n)["L1.P1"] for n in (1, None))
    for one, other, tokens in zip(alone, padded, rl.capture(rm, [EQUAL, UNEQUAL], []).tokens, strict=True):
        assert one.shape == other.shape == (len(tokens), len(tokens))
        torch.testing.assert_close(one, other)
    ends = [rl.capture(rm, [EQUAL, UNEQUAL], ["L1.P1"], batch_size=n)["L1.P1"] for n in (1, None)]
    torch.testing.assert_close(*ends)
    assert ends[0].shape[1] == max(map(len, alone))
    for end, one in zip(ends[0], alone, strict=True):
        torch.testing.assert_close(end[: len(one)], one[-1])


def test_a_run_gives_no_query_key_or_pattern_to_another_position():
    rm = model("llama")
    for site in ("L1.Q1", "L1.K1", "L1.P1"):
        other = rl.from_run(rl.capture(rm, [EQUAL, UNEQUAL], [site]).swapped())
        patched = rl.intervene(rm, [EQUAL], {site: other}).value.sel(side="chosen", state="change").item()
        assert abs(patched + rl.effects(rm, [EQUAL], [site]).value.item()) < 1e-5
        with pytest.raises(rl.AlignmentError, match="positions to change"):
            rl.intervene(rm, [EQUAL, UNEQUAL], {site: other})


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma2"])
def test_intervene_on_them(family):
    rm = model(family)
    for site in ("L1.Q1", "L1.V0", "L1.P2"):
        change = rl.intervene(rm, [EQUAL, UNEQUAL], {site: rl.zeros()}).value.sel(state="change")
        zeroed = rl.effects(rm, [EQUAL, UNEQUAL], [site], mode="zero").value[..., 0]
        np.testing.assert_allclose(zeroed, -change, atol=2e-5)
    silent = rl.effects(rm, [EQUAL], ["L1.P2"], mode="zero").value
    np.testing.assert_allclose(silent, rl.effects(rm, [EQUAL], ["L1.H2"], mode="zero").value, atol=2e-5)


def test_positions_are_not_moved():
    rm = model("llama")
    for site in ("L1.Q0", "L1.K0", "L1.P0"):
        with pytest.raises(rl.AlignmentError, match="hold absolute positions"):
            rl.effects(rm, [UNEQUAL], [site], at="all", align="tail")
    rl.effects(rm, [UNEQUAL], ["L1.V0"], at="all", align="tail")
    with pytest.raises(rl.StructureError, match="indices 0 to 1"):
        rl.effects(rm, [EQUAL], ["L1.K2"])


@pytest.mark.parametrize("family", ["deepseek_v3", "minicpm3"])
def test_values_that_are_cached_as_latents_are_refused(family):
    """Multi-head latent attention caches a latent from which every head's value is made: no key-value heads there."""
    rm = rl.RewardModel(*tiny_model(family), name=family)
    with pytest.raises(rl.StructureError, match="values of block 1.*are not shared as they are cached"):
        rl.effects(rm, [rl.Pair("Write one word.", "apple", "plumb")], ["L1.V0"], mode="zero")
    patterns = rl.effects(rm, [rl.Pair("Write one word.", "apple", "plumb")], ["L1.P0", "L1.Q1", "L1.H1"], mode="zero")
    assert np.abs(patterns.value).max() > 0
