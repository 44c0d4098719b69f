"""Parts of a run laid together are the run, or are refused."""

import functools

import numpy as np
import pytest

import reward_lens as rl
from every_method import MANY, METHODS
from families import tiny_model
from reward_lens.methods.shared.paired import labelled, over_prompts
from step_models import published

PAIRS = rl.Pairs([*MANY[:3], *MANY[16:19]], "texts of different lengths")
REFUSED = {
    "accuracy": "no column of values by pair",
    "calibration": "no column of values by pair",
    "by neuron": "another component",
    "gradient lens": "another cosine",
    "integrated contributions": "baseline_of",
    "effects, mean": "6 responses to 3 prompts",
    "effects, resample": "6 responses to 3 prompts",
    "probes": "within_prompt_sd",
    "latent contributions": "error_share",
    "spliced": "mean_of",
    "transfer": "no column of values by pair",
    "compare": "no column of values by pair",
}
JOINED = (
    "lens, all", "contributions", "by token", "crystallization", "prefix", "integrated", "by word", "intervene",
    "effects, heads, tail", "effects, positions", "effects, direct", "path effects", "edges", "score", "latent tokens",
)  # fmt: skip


@functools.cache
def rm() -> rl.RewardModel:
    return rl.RewardModel(*tiny_model("llama"))


def asked(name: str) -> list[rl.Result]:
    return [METHODS[name](rm(), part) for part in (PAIRS, PAIRS[:3], PAIRS[3:])]


@pytest.mark.parametrize("name", JOINED)
def test_parts_are_the_whole(name):
    whole, *parts = asked(name)
    joined = rl.join_results(parts, PAIRS)
    ours, theirs = joined.dataset, whole.dataset
    assert ours.variables.keys() == theirs.variables.keys() and ours.sizes == theirs.sizes
    scale = float(np.nanmax(np.abs(theirs["value"].values)))
    for key, own in theirs.variables.items():
        if own.dtype.kind == "f":  # texts that share a batch with others round otherwise
            np.testing.assert_allclose(ours[key].values, own.values, rtol=1e-3, atol=1e-4 * scale, err_msg=str(key))
        else:
            np.testing.assert_array_equal(ours[key].values, own.values, err_msg=str(key))
    differ = {key for key in {*joined.meta, *whole.meta} if joined.meta.get(key) != whole.meta.get(key)}
    assert differ <= {"joined", "cannot_show", "settings"}
    assert [part["n_pairs"] for part in joined.meta["joined"]] == [3, 3]
    identities = {check.name for check in whole.checks if np.isfinite(check.tolerance)}
    assert identities == {check.name for check in joined.checks if np.isfinite(check.tolerance)}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_of_all_pairs_at_once_is_refused(name):
    _, *parts = asked(name)
    with pytest.raises(rl.DataError, match=REFUSED[name]):
        rl.join_results(parts)


def test_an_interval_of_bounded_values_keeps_its_bounds():
    """Six prompts that all gave 1 of at most 1 have Wilson's interval, and so have twelve."""
    value = labelled(rl.Pairs(rl.Pair(f"Say {i}", "a", "b") for i in range(12)), np.ones(12), ("pair",))
    parts = []
    for some in (value[:6], value[6:]):
        pairs = [rl.Pair(str(prompt), "a", "b") for prompt in some["prompt"].values]
        summary, interval = over_prompts(rl.Pairs(pairs), some, 0, (0.0, 1.0))
        parts.append(rl.Result("share", some, unit="fraction", meta={"interval": interval}, **summary))
    joined = rl.join_results(parts)
    assert joined.meta["interval"] == {"level": 0.95, "unit": "prompt", "method": "cluster t", "limits": [0.0, 1.0]}
    assert float(joined.low) == pytest.approx(12 / (12 + 1.959964**2), abs=1e-6) and float(joined.high) == 1.0


def test_what_was_joined_is_joined_on():
    parts = [rl.contributions(rm(), some) for some in (PAIRS[:2], PAIRS[2:3], PAIRS[3:])]
    once = rl.join_results(parts, PAIRS)
    for first in (rl.join_results(parts[:2]), rl.join_results(parts[:2], PAIRS[:3])):
        joined = rl.join_results([first, parts[2]], PAIRS)
        assert joined.value.equals(once.value) and joined.low.equals(once.low) and joined.meta == once.meta


def test_what_is_no_result_is_refused(tmp_path):
    one, other = (rm().score_pairs(some) for some in (PAIRS[:3], PAIRS[3:]))
    one.save(tmp_path / "one.nc")
    with pytest.raises(rl.DataError, match="nothing to join.*1 results"):
        rl.join_results(str(tmp_path / "one.nc"))
    for inputs in ("pairs.jsonl", [{"prompt": "x"}] * 6):
        with pytest.raises(rl.DataError, match="Expected: (an )?rl.Pair"):
            rl.join_results([one, other], inputs)


def test_a_summary_that_another_machine_rounded_is_the_same():
    """Sums of many columns are added in another order than of one, and on another processor."""
    rng = np.random.default_rng(0)
    parts = []
    for k in range(2):
        pairs = rl.Pairs([rl.Pair(f"Say {k} {i // 2}", "a", "b", id=f"{k} {i}") for i in range(300)], "many")
        value = labelled(pairs, rng.normal(size=(300, 200)), ("pair", "component"), {"component": np.arange(200)})
        summary, interval = over_prompts(pairs, value, 0)
        parts.append(rl.Result("some", value, unit="reward", meta={"interval": interval}, **summary).sel(component=[0]))
    joined = rl.join_results(parts)
    assert joined.low is not None and joined.value.shape == (600, 1)
    moved = parts[1]._with(parts[1].dataset.assign(low=parts[1].dataset["low"] - 1e-6))
    with pytest.raises(rl.DataError, match="The summary of some.*in part 2 another low"):
        rl.join_results([parts[0], moved])


def test_joined_files_serve_as_the_scores_of_all_pairs(tmp_path):
    files = [rm().score_pairs(part).save(tmp_path / f"{i}.nc") for i, part in enumerate((PAIRS[:3], PAIRS[3:]))]
    joined = rl.join_results(files, PAIRS)
    again = rl.load_result(joined.save(tmp_path / "all.nc"))
    accuracy = rl.accuracy(rm(), PAIRS, scores=again)
    np.testing.assert_array_equal(accuracy.value, rl.accuracy(rm(), PAIRS).value)
    with pytest.raises(rl.DataError, match="not of these inputs"):
        rl.accuracy(rm(), PAIRS, scores=rl.join_results(files))
    with pytest.raises(rl.DataError, match="not those of the parts.*6 for 6.*other texts in part 1, 2"):
        rl.join_results(files, PAIRS[::-1])
    with pytest.raises(rl.DataError, match="not those of the parts.*3 for 6.*other texts in part 2"):
        rl.join_results(files, PAIRS[:3])


def test_lists_of_different_lengths():
    groups = [rl.Group(f"Say {i}", ["a", "b", "c", "d"][: 2 + i % 3], id=f"g{i}") for i in range(6)]
    whole, *parts = (rm().score_many(some) for some in (groups, groups[:1], groups[1:]))
    joined = rl.join_results(parts, groups)
    np.testing.assert_allclose(joined.value, whole.value, atol=1e-5)
    np.testing.assert_array_equal(joined.value["n_responses"], whole.value["n_responses"])
    assert [c.gap for c in joined.checks if c.name == "undefined cells"] == [float(np.isnan(whole.value).sum())]


def test_parts_of_different_runs_are_refused():
    one, other = (rl.contributions(rm(), part) for part in (PAIRS[:3], PAIRS[3:]))
    with pytest.raises(rl.DataError, match="nothing to join.*1 results"):
        rl.join_results([one])
    with pytest.raises(rl.DataError, match=f"A pair is in two parts.*{one.value['pair'].values[0]}"):
        rl.join_results([one, one])
    elsewhere = rl.RewardModel(rm().module, rm().tokenizer.hf, name="another")
    with pytest.raises(rl.DataError, match='part 2.*model "another" for "LlamaForSequenceClassification"'):
        rl.join_results([one, rl.contributions(elsewhere, PAIRS[3:])])
    with pytest.raises(rl.DataError, match="part 2.*settings"):
        rl.join_results([one, rl.contributions(rm(), PAIRS[3:], scale="own")])
    with pytest.raises(rl.DataError, match="part 2.*reward_lens"):
        rl.join_results([one, rl.reward_lens(rm(), PAIRS[3:])])
    changed = other._with(other.dataset.assign(mean=other.dataset["mean"] + 1e-3))
    with pytest.raises(rl.DataError, match="The summary of contributions.*in part 2 another mean"):
        rl.join_results([one, changed])


def test_screened_sites_that_differ_are_refused():
    """The exact effect of a site that one part alone verified has a mean over that part's pairs."""
    parts = [
        rl.screen_then_verify(rm(), some, "components", top=3, calibration_pairs=1) for some in (PAIRS[:1], MANY[17:18])
    ]
    with pytest.raises(rl.DataError, match="screened"):
        rl.join_results(parts)


def test_an_interval_in_the_facts_is_refused_even_if_all_parts_have_it():
    """Six of six pairs preferred twice is the same share twice, with another interval than twelve of twelve."""
    parts = []
    for some in (PAIRS[:3], PAIRS[3:]):
        scores = rm().score_pairs(some)
        scores.meta["accuracy"] = {"sum": {"value": 1.0, "low": 0.6, "high": 1.0}}
        parts.append(scores)
    with pytest.raises(rl.DataError, match="A figure of score_pairs cannot be joined.*accuracy"):
        rl.join_results(parts)


def test_selections():
    whole, *parts = (rl.contributions(rm(), some) for some in (PAIRS, PAIRS[:3], PAIRS[3:]))
    joined = rl.join_results([part.sel(side="margin") for part in parts])
    np.testing.assert_allclose(joined.value, whole.value.sel(side="margin"), atol=1e-5)
    assert joined.value["side"] == "margin"
    with pytest.raises(rl.DataError, match="part 2.*another side"):
        rl.join_results([part.sel(side=side) for part, side in zip(parts, ("margin", "chosen"), strict=True)])
    lens = [rl.reward_lens(rm(), some, at="all") for some in (PAIRS[:3], PAIRS[3:])]
    with pytest.raises(rl.DataError, match="part 2.*another depth"):
        rl.join_results([lens[0].sel(depth=[0, 1]), lens[1]])
    with pytest.raises(rl.DataError, match="part 1.*the first 2 of dim position alone"):
        rl.join_results([lens[0].sel(position=[0, 1]), lens[1]])


def test_solutions_of_a_step_model():
    module, tokenizer, readout = published("trl")
    model = rl.step_model(module, tokenizer, readout)
    solutions = [rl.Solution(f"q {i // 2}", tuple("abcd"[: 1 + i % 4]), id=f"s{i}") for i in range(8)]
    for method in (rl.step_lens, rl.step_contributions):
        whole, parts = method(model, solutions), [method(model, solutions[:2]), method(model, solutions[2:])]
        joined = rl.join_results(parts, solutions)
        for key in ("value", "mean", "low", "high"):
            np.testing.assert_allclose(joined.dataset[key], whole.dataset[key], atol=1e-5)
        assert joined.value.dims == whole.value.dims and joined.meta["n_items"] == 8
        np.testing.assert_array_equal(joined.value.n_steps, whole.value.n_steps)
    with pytest.raises(rl.DataError, match="aggregates, of all of its pairs at once"):
        rl.join_results([rl.step_rewards(model, solutions[:2]), rl.step_rewards(model, solutions[2:])])
