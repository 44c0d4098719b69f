"""Judges of pairs: both orders, their mean, what the order adds, and the methods on the margin they define."""

import functools

import numpy as np
import pytest
import torch

import reward_lens as rl
from every_method import METHODS
from families import TEXT_PAIRS
from language_models import JUDGE, PAIR_JUDGE, plain_log_odds, tiny_language_model
from reward_lens import stats

PAIRS = [rl.Pair(*texts) for texts in TEXT_PAIRS]
SINGLE = [p for p in PAIRS if isinstance(p.prompt, str)]
TOKENS = ("A", "B")


@functools.cache
def judge(family: str = "llama", dtype: torch.dtype = torch.float32) -> rl.RewardModel:
    module, tokenizer = tiny_language_model(family, seed=1, dtype=dtype)
    spec = rl.VocabReadout(*TOKENS, template=PAIR_JUDGE, before_cap=family == "gemma2")
    return rl.RewardModel(module, tokenizer, readout=spec, name=family)


def towards_a(rm, prompt: str, a: str, b: str) -> float:
    """Log-odds of A, from the model's own logits and the chat template, written out."""
    tokenizer = rm.tokenizer.hf
    asked = [{"role": "user", "content": f"Question: {prompt}\n[A] {a}\n[B] {b}\nWhich is right?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    rows = tuple(tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in TOKENS)
    return plain_log_odds(rm.module, ids, rows, 3.0 if rm.name == "gemma2" else None)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "gpt2"])
def test_both_orders_are_the_models_own(family):
    rm = judge(family)
    result = rl.pair_judge(rm, SINGLE)
    for pair, row in zip(SINGLE, result.value.values, strict=True):
        m1 = towards_a(rm, pair.prompt, pair.chosen, pair.rejected)
        m2 = -towards_a(rm, pair.prompt, pair.rejected, pair.chosen)
        np.testing.assert_allclose(row, [m1, m2, (m1 + m2) / 2, (m1 - m2) / 2], atol=2e-6)
        assert rm.score(pair.prompt, (pair.chosen, pair.rejected)) == pytest.approx(m1, abs=2e-6)
        assert rm.hf_score(pair.prompt, [pair.rejected, pair.chosen]) == pytest.approx(-m2, abs=2e-6)
    assert [c.name for c in result.checks] == ["own logits"]


def test_bfloat16():
    result = rl.pair_judge(judge(dtype=torch.bfloat16), PAIRS)
    np.testing.assert_allclose(result.value, rl.pair_judge(judge(), PAIRS).value, atol=0.1)


def test_swapping_the_pair_negates_the_preference_and_keeps_the_bias():
    one = rl.pair_judge(judge(), PAIRS).value
    other = rl.pair_judge(judge(), [rl.Pair(p.prompt, p.rejected, p.chosen) for p in PAIRS]).value
    np.testing.assert_allclose(other.sel(reading="preference"), -one.sel(reading="preference"), atol=1e-6)
    np.testing.assert_allclose(other.sel(reading="position bias"), one.sel(reading="position bias"), atol=1e-6)
    np.testing.assert_allclose(other.sel(reading="chosen is a"), -one.sel(reading="chosen is b"), atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_a_planted_love_of_a_is_position_bias_and_no_preference(family):
    """A constant for the letter: phi's unembedding has a bias; llama gets one by a direction all texts share."""
    module, tokenizer = tiny_language_model(family, seed=1)
    row = tokenizer("A")["input_ids"][-1]
    before = judge(family)
    if family == "phi":
        with torch.no_grad():
            module.lm_head.bias[row] += 5.0
        added = 5.0
    else:
        module.lm_head = torch.nn.Linear(32, module.lm_head.out_features, bias=True)
        with torch.no_grad():
            module.lm_head.weight.copy_(before.module.lm_head.weight)
            module.lm_head.bias.zero_()
            module.lm_head.bias[row] = -2.0
        added = -2.0
    after = rl.RewardModel(module, tokenizer, readout=rl.VocabReadout(*TOKENS, template=PAIR_JUDGE))
    change = rl.pair_judge(after, PAIRS).value - rl.pair_judge(before, PAIRS).value
    np.testing.assert_allclose(change.sel(reading="position bias"), added, atol=1e-5)
    np.testing.assert_allclose(change.sel(reading="preference"), 0.0, atol=1e-5)
    summary = rl.pair_judge(after, PAIRS).meta["summary"]
    assert summary["says_a"]["value"] == (1.0 if family == "phi" else 0.0) and summary["consistent"]["value"] == 0.0


def test_the_margin_of_other_methods_is_twice_the_preference():
    rm = judge()
    preference = rl.pair_judge(rm, PAIRS).value.sel(reading="preference").values
    np.testing.assert_allclose(rm.score_pairs(PAIRS).value.sel(side="margin"), 2 * preference, atol=1e-6)
    for by in ("component", "head"):
        split = rl.contributions(rm, PAIRS, by=by).value.sel(side="margin")
        np.testing.assert_allclose(split.sum("component"), 2 * preference, atol=1e-5)
    lens = rl.reward_lens(rm, PAIRS).value.sel(side="margin").isel(depth=-1)
    np.testing.assert_allclose(lens, 2 * preference, atol=1e-5)
    lengths = rm.score_pairs(SINGLE).value
    own = [len(rm.tokenizer.hf(" " + p.chosen, add_special_tokens=False)["input_ids"]) for p in SINGLE]
    assert (
        np.abs(lengths["chosen_tokens"].values - own).max() <= 1
    )  # a space before an answer may be a token of its own


def test_e6_one_order_becomes_the_other():
    rm = judge()
    pairs = [p for p, (a, b) in zip(PAIRS, rm.tokenize_pairs(PAIRS), strict=True) if len(a) == len(b)]
    assert len(pairs) > 2
    sites = ["embed", *(f"L{layer}.{kind}" for layer in range(rm.n_layers) for kind in ("attn", "mlp"))]
    for at in ("final", "all"):
        acts = rl.capture(rm, pairs, sites, at=at)
        value = rl.intervene(rm, pairs, dict.fromkeys(sites, rl.from_run(acts.swapped())), at=at).value
        target = value.sel(side="rejected", state="clean")
        assert float(np.abs(target - value.sel(side="chosen", state="clean")).max()) > 1e-2
        np.testing.assert_allclose(value.sel(side="chosen", state="intervened"), target, atol=1e-5)


def test_intervals_and_shares_are_over_prompts(tmp_path, capfd):
    rm = judge()
    pairs = [rl.Pair(f"Question {i // 2}", f"yes {i}", "the other one " * (i % 4)) for i in range(16)]
    result = rl.pair_judge(rm, pairs)
    prompts = [p.prompt_key for p in pairs]
    over = stats.mean_interval(result.value.values, prompts)
    for name in ("mean", "low", "high"):
        np.testing.assert_allclose(getattr(result, name), getattr(over, name))
    m1, m2 = (result.value.sel(reading=f"chosen is {x}").values for x in "ab")
    summary = result.meta["summary"]
    for name, share in {"accuracy": m1 + m2 > 0, "consistent": m1 * m2 > 0}.items():
        expected = stats.proportion_interval(share.astype(float), prompts)
        assert [summary[name][k] for k in ("value", "low", "high")] == [expected.mean, expected.low, expected.high]
    assert summary["says_a"]["value"] == np.mean(np.concatenate([m1 > 0, m2 < 0]))
    again = rl.pair_judge(rm, pairs, batch_size=3)
    np.testing.assert_allclose(again.value, result.value, atol=1e-5)
    loaded = rl.load_result(result.save(tmp_path / "x.nc"))
    assert loaded.value.identical(result.value) and loaded.meta == result.meta and repr(loaded) == repr(result)
    assert result.unit == "log-odds" and result.plot() is not None and capfd.readouterr() == ("", "")


FEW = ("effects", "by token", "path effects", "knock-out")
some = [pytest.param(name, marks=[] if name in FEW else pytest.mark.full) for name in METHODS]
ONE_RESPONSE = "pair judge gives no reward to one response alone"


@pytest.mark.parametrize("name", some)
def test_every_method_takes_a_pair_judge_or_refuses_in_words(name):
    try:
        result = METHODS[name](judge(), PAIRS)
    except rl.DataError as error:
        assert error.what == ONE_RESPONSE
    else:
        assert isinstance(result, rl.Result)


def test_a_store_of_pairs_holds_both_orders():
    rm, site = judge(), "L2.resid_post"
    store = rl.store_activations(rm, [*SINGLE, SINGLE[0]], site, "reward")
    seen = rl.capture(rm, SINGLE, [site])[rl.Site.parse(site)]
    held = store.tensor()
    torch.testing.assert_close(held, seen, atol=1e-5, rtol=1e-5)
    assert store.meta["left_out"]["duplicates"] == 2
    one = rl.store_activations(rm, [(SINGLE[0].prompt, (SINGLE[0].chosen, SINGLE[0].rejected))], site, "reward")
    assert one.meta["n_samples"] == 1
    with pytest.raises(rl.DataError, match=ONE_RESPONSE):
        rl.store_activations(rm, [(SINGLE[0].prompt, SINGLE[0].chosen)], site)


def test_what_is_no_pair_is_refused():
    rm = judge()
    for response in ("one", ("one",), ("one", "two", "three")):
        with pytest.raises(rl.DataError, match=ONE_RESPONSE):
            rm.tokenizer.conversation([{"role": "user", "content": "Hi"}], response)
    with pytest.raises(rl.DataError, match="response b is not a text"):
        rm.tokenizer.conversation([{"role": "user", "content": "Hi"}], ("one", None))
    with pytest.raises(rl.DataError, match=ONE_RESPONSE):
        rm.score_many([rl.Group("Hi", ["one", "two"])])


def test_what_is_no_judge_of_pairs_is_refused():
    module, tokenizer = tiny_language_model("llama")
    specs = [
        rl.VocabReadout(*TOKENS),
        rl.VocabReadout(*TOKENS, template=JUDGE),
        rl.VocabReadout("A", template=PAIR_JUDGE),
    ]
    for spec in specs:
        rm = rl.RewardModel(module, tokenizer, readout=spec)
        with pytest.raises(rl.StructureError, match="no judge of pairs.*template='... {prompt} ... {a} ... {b} ...'"):
            rl.pair_judge(rm, PAIRS)
