"""An edited model beside the one before: paired differences of probes and accuracies."""

import numpy as np
import pytest

import reward_lens as rl
from ruled import Ruled, noise, text_of


@pytest.fixture(scope="module")
def pairs():
    return rl.load_pairs("demo")[:24]


def bold(tokens) -> float:
    return float("**" in text_of(tokens))


def test_taking_a_bias_away_is_seen_where_it_was_and_where_it_goes(pairs):
    before = Ruled(lambda t: 2 * bold(t) + noise(1)(t))
    after = Ruled(lambda t: 2 * ("!" in text_of(t)) + noise(1)(t))
    result = rl.evaluate_edit(before, after, pairs, {"demo": pairs}, ["add_bold", "exclaim", "hedge"])
    change = result.sel(state="change")
    assert float(change.high.sel(measure="probe: add_bold")) < 0
    assert float(change.low.sel(measure="probe: exclaim")) > 0
    np.testing.assert_allclose(
        result.value.sel(state="after") - result.value.sel(state="before"), result.value.sel(state="change"), atol=1e-12
    )
    n_subsets = len({p.subset for p in pairs})
    assert result.value["kind"].values.tolist() == ["probe"] * 3 + ["accuracy"] * (1 + n_subsets)
    row = result.value.sel(measure="accuracy: demo")
    expected = rl.accuracy(before, pairs).value.sel(subset="all", rule="reward model")
    assert float(row.sel(state="before")) == pytest.approx(float(expected))


def test_accuracy_by_subset(pairs):
    some = [rl.Pair(p.prompt, p.chosen, p.rejected, subset="odd" if i % 2 else "even") for i, p in enumerate(pairs)]
    before, after = Ruled(noise(1)), Ruled(noise(2))
    result = rl.evaluate_edit(before, after, pairs, {"demo": some}, ["hedge"])
    names = [m for m in result.value["measure"].values if m.startswith("accuracy")]
    assert names == ["accuracy: demo", "accuracy: demo, even", "accuracy: demo, odd"]
    for name, part in zip(names, (some, some[::2], some[1::2]), strict=True):
        for state, rm in (("before", before), ("after", after)):
            expected = float(rl.accuracy(rm, part).value.sel(subset="all", rule="reward model"))
            assert float(result.value.sel(measure=name, state=state)) == pytest.approx(expected)


def test_a_model_beside_itself_changes_nothing(pairs):
    rm = Ruled(noise(2))
    result = rl.evaluate_edit(rm, rm, pairs, {"demo": pairs}, ["hedge", "pad_2"])
    change = result.sel(state="change")
    assert (change.value == 0).all() and (change.low == 0).all() and (change.high == 0).all()
    assert (result.value["p"] == 1).all()


def test_an_accuracy_that_does_not_change_may_still_have_changed(pairs):
    """On 24 prompts no order changes; Wilson's interval of nothing lost reaches .14."""
    before, after = Ruled(noise(2)), Ruled(lambda t: 2 * noise(2)(t))
    change = rl.evaluate_edit(before, after, pairs, {"demo": pairs}, ["hedge"]).sel(measure="accuracy: demo")
    assert change.value.sel(state="change") == 0
    reach = rl.stats.wilson(0, len({p.prompt_key for p in pairs}))[1]
    assert float(change.high.sel(state="change")) == pytest.approx(reach)
    assert float(change.low.sel(state="change")) == pytest.approx(-reach)


def test_edited_pairs(pairs):
    (edit,) = rl.edits_of(["hedge"])
    some = rl.edited_pairs(pairs, edit)
    assert all(p.chosen == edit.apply(p.messages[-1]["content"], p.rejected) != p.rejected for p in some)
    assert len(some) <= 2 * len(pairs) and some[0].subset == "hedge"
    never = rl.TextEdit("never", "nothing", lambda prompt, response: response)
    with pytest.raises(rl.DataError, match="changes none"):
        rl.edited_pairs(pairs, never)
    assert list(rl.edited_pairs(pairs, edit.name)) == list(some)
    with pytest.raises(rl.DataError, match="family of edits is several.*pad_1, pad_2"):
        rl.edited_pairs(pairs, "pad")
    with pytest.raises(rl.DataError, match="no edit called 'exclam'.*did you mean exclaim"):
        rl.edited_pairs(pairs, "exclam")


def test_few_prompts_give_no_interval(pairs):
    rm = Ruled(noise(3))
    result = rl.evaluate_edit(rm, rm, pairs[:4], {"demo": pairs[:4]}, ["hedge"])
    assert np.isnan(result.low.sel(measure="probe: hedge")).all() and np.isnan(result.value["p"]).all()
