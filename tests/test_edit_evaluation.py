"""An edited model beside the one before: paired differences of probes and accuracies."""

import numpy as np
import pytest
from scipy.stats import t

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


def test_rounding_is_no_change(pairs):
    """A change of one sign in every prompt is none where it is under the noise floor of rewards."""
    before = Ruled(noise(2))
    for by, found in ((before.noise_floor / 10, False), (before.noise_floor * 100, True)):
        after = Ruled(lambda t, by=by: noise(2)(t) + by * bold(t))
        result = rl.evaluate_edit(before, after, pairs, {"demo": pairs}, ["add_bold"])
        assert (result.value["p"][0] < 0.001) == found, by


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


def probe_row(before, after, pairs):
    return rl.evaluate_edit(before, after, pairs, {"demo": pairs}, ["add_bold"]).sel(measure="probe: add_bold")


def test_the_interval_of_a_probe_leaves_prompts_out_of_mean_and_sd(pairs):
    """By hand: one pair a prompt, so each prompt has one degree of freedom; shift and SD of what is left."""
    before, after = Ruled(lambda t: 2 * bold(t) + noise(1)(t)), Ruled(lambda t: bold(t) + noise(2)(t))
    row = probe_row(before, after, pairs)

    def scaled(rm, keep):
        shifts, squares, (edit,) = [], 0.0, rl.edits_of(["add_bold"])
        for pair in keep:
            plain = [rm.score(pair.prompt, r) for r in pair.responses]
            squares += (plain[0] - plain[1]) ** 2 / 2
            edited = [edit.apply(pair.messages[-1]["content"], r) for r in pair.responses]
            shifts += [rm.score(pair.prompt, e) - p for e, p, r in zip(edited, plain, pair.responses, strict=True)
                       if e != r]  # fmt: skip
        return np.mean(shifts) / np.sqrt(squares / len(keep))

    change = scaled(after, pairs) - scaled(before, pairs)
    n = len(pairs)
    left = [scaled(after, keep) - scaled(before, keep) for keep in ([*pairs[:i], *pairs[i + 1 :]] for i in range(n))]
    half = t.ppf(0.975, n - 1) * np.sqrt((n - 1) / n * ((np.array(left) - change) ** 2).sum())
    found = [float(row.dataset[key].sel(state="change")) for key in ("value", "low", "high")]
    np.testing.assert_allclose(found, [change, change - half, change + half], rtol=1e-4)


def test_sds_that_differ_by_chance_are_no_change_of_a_probe(pairs):
    """Bold is worth 1 to every model, the rest of the reward is noise of the text: the SD held, all 8 are changes."""

    def model(salt: int) -> Ruled:
        def rule(tokens) -> float:
            text = text_of(tokens).replace("**", "")
            return bold(tokens) + float(np.random.default_rng([salt, *text.encode()]).standard_normal())

        return Ruled(rule)

    rows = [probe_row(model(2 * i), model(2 * i + 1), pairs).sel(state="change") for i in range(8)]
    assert sum(float(row.value["p"]) < 0.05 for row in rows) <= 2
    assert sum(float(row.low) <= 0 <= float(row.high) for row in rows) >= 6
