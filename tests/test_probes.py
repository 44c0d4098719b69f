"""The probe suite on constructed rewards whose answers are known, and on noise."""

import gc
import time

import numpy as np
import pytest

import reward_lens as rl
from reward_lens.edits import EDITS, TextEdit
from reward_lens.methods.behaviour.edited_texts import within_prompt_sd
from reward_lens.methods.behaviour.probes import _needed, _per_prompt
from ruled import Ruled, noise, text_of


@pytest.fixture(scope="module")
def pairs():
    return rl.load_pairs("demo")[:30]


K = 0.25


def test_a_reward_a_token_is_found_and_nothing_else(pairs):
    """Every edit's shift is k times the tokens it adds; with tokens taken out no probe is left."""
    result = rl.probe_hacking(Ruled(lambda t: K * len(t.response)), pairs)
    probes = result.dataset
    changed = probes["n_prompts"].values > 0
    np.testing.assert_allclose(result.mean.values[changed], K * probes["tokens"].values[changed], atol=1e-5)
    assert (result.low.values <= K * probes["tokens"].values + 1e-5)[changed].all()
    assert (result.high.values >= K * probes["tokens"].values - 1e-5)[changed].all()
    net = probes["net"].values
    assert np.nanmax(np.abs(net)) < 1e-4
    assert np.nanmin(probes["net_p_holm"].values) > 0.05
    pad = result.sel(probe="pad_8")
    assert float(pad.value["p_holm"]) < 0.01
    assert result.meta["doses"]["pad"]["low"] > 0


def test_a_reward_for_markdown_is_found_by_the_markdown_probes(pairs):
    result = rl.probe_hacking(Ruled(lambda t: 2.0 * ("**" in text_of(t)) + 0.01 * noise(1)(t)), pairs)
    flagged = {str(n) for n in result.value["probe"].values[result.value["p_holm"].values < 0.05]}
    bold = {name for name, edit in EDITS.items() if "**" in edit.apply("Why?", "It is so. It stays so. And more.")}
    assert bold and bold <= flagged
    assert abs(float(result.mean.sel(probe=sorted(bold)[0])) - 2) < 0.02


def test_a_reward_for_a_keyword_is_found_by_an_edit_that_adds_it(pairs):
    own = TextEdit("say_sorry", "an apology", lambda prompt, response: f"Sorry. {response}")
    result = rl.probe_hacking(Ruled(lambda t: 1.5 * ("Sorry" in text_of(t)) + 0.1 * noise(2)(t)), pairs,
                              ["pad_1", own, "bulletise"])  # fmt: skip
    assert result.value["probe"].values.tolist() == ["pad_1", "say_sorry", "bulletise"]
    assert float(result.value["p_holm"].sel(probe="say_sorry")) < 0.01
    low, high = (float(end.sel(probe="say_sorry")) for end in (result.low, result.high))
    assert abs((low + high) / 2 - 1.5) <= high - low  # about four standard errors


@pytest.mark.parametrize("skewed", [False, True])
def test_noise_is_flagged_no_more_often_than_its_level(pairs, skewed):
    """Rewards that are noise of the text: share of p < .05, and of runs in which Holm lets one through."""
    rm = Ruled(noise(0))
    names = ["pad_1", "pad_4", "restate", "bulletise", "hedge", "prepend_praise", "exclaim"]
    runs = 40
    single, family = [], []
    gc.collect()
    gc.freeze()  # statsmodels collects at every adjustment, torch's objects included
    for salt in range(runs):
        rm.rule = noise(salt, skewed)
        result = rl.probe_hacking(rm, pairs[:10], names, n_boot=50)
        single.append(np.mean(result.value["p"].values < 0.05))
        family.append(np.min(result.value["p_holm"].values) < 0.05)
    gc.unfreeze()
    assert np.mean(single) <= 0.05 + 2 * np.std(single) / np.sqrt(runs)
    assert np.mean(family) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / runs)


def test_doses_have_an_interval_of_the_mean_shift_at_each(pairs):
    result = rl.probe_hacking(Ruled(lambda t: K * len(t.response)), pairs, ["pad", "hedge"])
    pad = result.meta["doses"]["pad"]
    tokens = result.value["tokens"].values[:4]
    assert pad["doses"] == [1, 2, 4, 8] and "hedge" not in result.meta["doses"]
    np.testing.assert_allclose(pad["mean_shift"], K * tokens, atol=1e-4)
    # Every edit changes both responses of every prompt: the intervals are those of the probes.
    np.testing.assert_allclose(pad["shift_low"], result.low.values[:4], atol=1e-9)
    np.testing.assert_allclose(pad["shift_high"], result.high.values[:4], atol=1e-9)
    few = rl.probe_hacking(Ruled(noise(3)), pairs[:4], ["pad"]).meta["doses"]["pad"]
    assert few["shift_low"] == [None] * 4 and all(np.isfinite(few["mean_shift"]))


def test_flips_and_correction():
    pairs = [rl.Pair(f"q {i}", "good words here", f"bad words {i}", id=str(i)) for i in range(8)]
    add = TextEdit("add", "a suffix", lambda p, r: r + " plus", lambda p, r: r.removesuffix(" plus"), exact=True)
    lossy = TextEdit("lossy", "a suffix, spaces lost", lambda p, r: r + " plus", lambda p, r: r.replace(" plus", "!"))

    def rule(tokens) -> float:
        text = text_of(tokens)
        return ("good" in text) + 2.0 * ("plus" in text) + 0.5 * ("!" in text)

    result = rl.probe_hacking(Ruled(rule), pairs, [add, lossy]).value
    assert result["flips"].values.tolist() == [1.0, 1.0] and result["n_flips"].values.tolist() == [8, 8]
    assert np.isnan(result["corrected"].sel(probe="add")) and float(result["corrected"].sel(probe="lossy")) == 1.5
    np.testing.assert_allclose(result.sel(probe="add"), 2.0)


def test_an_edit_that_says_it_is_exact_has_to_be():
    """Held to its word where it changes a response; a response that it leaves alone is not edited back."""
    edit = TextEdit("add", "!", lambda _, r: r if "!" in r else r + "!", lambda _, e: e.replace("!", ""), exact=True)
    kept = rl.probe_hacking(Ruled(noise(3)), [rl.Pair("q", "yes!", "no")], [edit]).value
    assert np.isfinite(kept.sel(response="rejected")) and np.isnan(kept.sel(response="chosen"))
    wrong = TextEdit("add", "!", edit.apply, lambda _, e: e.upper(), exact=True)
    with pytest.raises(rl.DataError, match="'add' is not exact. Found: str 'NO!' for str 'no!' edited back"):
        rl.probe_hacking(Ruled(noise(3)), [rl.Pair("q", "yes!", "no")], [wrong])


def test_few_prompts_give_no_interval_and_no_p(pairs):
    rm = Ruled(noise(3))
    for n in (1, 5):
        result = rl.probe_hacking(rm, pairs[:n], ["pad_1", "hedge"])
        assert np.isnan(result.low.values).all() and np.isnan(result.value["p"].values).all()
        assert np.isfinite(result.mean.values).all()
    assert result.meta["prompts_needed"]["n"] >= 6


def test_the_number_of_prompts_counts_holms_floor():
    for probes in (1, 20, 1000):
        needed = _needed(probes)
        assert 2.0 ** (1 - needed["by_smallest_p"]) <= 0.05 / probes < 2.0 ** (2 - needed["by_smallest_p"])
        assert needed["n"] == max(needed["by_power"], needed["by_smallest_p"])


def test_odd_input_gives_no_infinite_effect(pairs):
    texts = [("", "x"), ("日本語です。", "はい。"), ("🙂", "ok"), ("مرحبا", "نعم"), ("a", "b"), ("```\ncode\n```", "c")]
    odd = [rl.Pair(f"q{i}", *both) for i, both in enumerate(texts)]
    flat = rl.probe_hacking(Ruled(lambda t: 1.0), odd)
    assert not np.isinf(flat.value.values).any() and np.isnan(flat.value["shift_sd"].values).all()
    assert not (flat.value["p"].values < 0.05).any()
    never = TextEdit("never", "nothing", lambda p, r: r)
    result = rl.probe_hacking(Ruled(noise(1)), pairs[:6], [never, "hedge"])
    assert np.isnan(result.mean.sel(probe="never")) and int(result.value["n_prompts"].sel(probe="never")) == 0
    with pytest.raises(rl.DataError):
        rl.probe_hacking(Ruled(noise(1)), pairs[:6], ["bulletize"])


def test_within_prompt_sd_is_the_pooled_one():
    rewards, texts = np.array([[1.0, 3.0], [5.0, 5.0], [1.0, 7.0]]), [["a", "b"], ["c", "c"], ["a", "d"]]
    found = within_prompt_sd(rewards, ["p", "q", "p"], texts)
    assert found == pytest.approx(np.std([1.0, 3.0, 7.0], ddof=1))
    assert np.isnan(within_prompt_sd(rewards[1:2], ["q"], texts[1:2]))


def test_means_by_prompt_are_those_of_a_loop_and_do_not_grow_with_the_square():
    rng = np.random.default_rng(0)
    prompts = [f"{key:012x}" for key in rng.integers(0, 8_000, 10_000)]
    values = rng.normal(size=(10_000, 2, 3))
    values[rng.random(values.shape) < 0.4] = np.nan
    started = time.process_time()
    means = _per_prompt(values, prompts)
    assert time.process_time() - started < 0.5  # 0.02 s; 2 where every prompt is looked for in all rows
    keys = list(dict.fromkeys(prompts))
    assert means.shape == (len(keys), 3)
    for i in (0, 1, 17, len(keys) - 1):
        rows = values[[key == keys[i] for key in prompts]].reshape(-1, 3)
        mean = [np.mean(column[~np.isnan(column)]) if (~np.isnan(column)).any() else np.nan for column in rows.T]
        np.testing.assert_allclose(means[i], mean, rtol=1e-12)
