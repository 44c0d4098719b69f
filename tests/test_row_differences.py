"""One row of a head less another: the log-odds of two labels of a classifier trained with cross-entropy."""

import functools

import numpy as np
import pytest
import torch

import reward_lens as rl
from encoders import tiny_encoder
from families import tiny_model
from reward_lens.model.readout import chosen_rows

PAIRS = [
    rl.Pair("Why is the sky blue?", "Air scatters blue light.", "It is paint, all of it."),
    rl.Pair("Name a prime.", "Seven is one.", "Ten is a prime."),
]
LABELS = {0: "refused", 1: "accepted", 2: "unclear"}
DIFFERENCE = "accepted - refused"


@functools.cache
def model(kind: str, objective: str | int = DIFFERENCE) -> rl.RewardModel:
    made = tiny_model("llama", num_labels=3) if kind == "causal" else tiny_encoder(kind, num_labels=3)
    made[0].config.id2label = LABELS
    return rl.RewardModel(*made, objective=objective, name=kind)


def log_odds(rm: rl.RewardModel, tokens) -> float:
    with torch.no_grad():
        ids = torch.tensor([tokens.ids])
        logits = rm.module(input_ids=ids, **rm.trunk.segments(ids)).logits[0]
    chances = logits.double().softmax(-1)
    return float(torch.log(chances[1] / chances[0]))


@pytest.mark.parametrize("kind", ["causal", "bert", "deberta"])
def test_the_reward_is_the_log_odds_of_the_two_labels(kind):
    rm = model(kind)
    assert rm.readout.objective == DIFFERENCE and rm.objectives == tuple(LABELS.values())
    for both in rm.tokenize_pairs(PAIRS):
        for tokens in both:
            assert float(rm.rewards([tokens])[0]) == pytest.approx(log_odds(rm, tokens), abs=1e-5)
    assert rm.hf_score("Why?", "So.") == pytest.approx(rm.score("Why?", "So."), abs=1e-5)
    assert rm.score_pairs(PAIRS).meta["objective"] == DIFFERENCE


@pytest.mark.parametrize("kind", ["causal", "bert"])
def test_parts_and_effects_are_those_of_one_row_less_those_of_the_other(kind):
    rm = model(kind)
    one, other = (rm.for_objective(name) for name in ("accepted", "refused"))
    asked = {
        "contributions": rl.contributions,
        "effects": functools.partial(rl.effects, at="final", align="tail"),
        "lens": functools.partial(rl.reward_lens, at="final"),
    }
    for name, ask in asked.items():
        if kind == "bert" and name == "lens":
            continue
        whole, a, b = (ask(m, PAIRS) for m in (rm, one, other))
        assert all(check.passed for check in whole.checks)
        values = whole.value
        if name == "effects" or kind == "causal":  # a network's own slope is the difference of the slopes, too
            np.testing.assert_allclose(values, a.value - b.value, atol=1e-5)
        assert float(abs(values).max()) > 1e-3


def test_rows_may_be_named_by_number_and_names_may_hold_the_sign():
    assert model("causal", "1 - 0").readout.objective == DIFFERENCE
    module, tokenizer = tiny_model("llama", num_labels=3)
    module.config.id2label = {0: "a - b", 1: "a", 2: "b"}
    assert rl.RewardModel(module, tokenizer, objective="a - b").row == 0
    rm, rows = rl.RewardModel(module, tokenizer, objective="a - a - b"), module.score.weight
    assert rm.readout.objective == "a - a - b" and torch.equal(rm.readout.weight, rows[1] - rows[0])
    # A name that is also a row's would be read back as that row.
    apart, rows_apart = rl.RewardModel(module, tokenizer, objective="1 - 2"), rows[1] - rows[2]
    assert apart.readout.objective == "1 - 2" and torch.equal(apart.readout.weight, rows_apart)
    assert torch.equal(apart.for_objective(apart.readout.objective).readout.weight, rows_apart)


def test_a_difference_that_may_be_meant_in_two_ways_is_refused():
    names = ("a", "a - b", "b - c", "c")
    with pytest.raises(rl.LoadError, match="'a - b - c' may be 2 differences.*'1 - 0'"):
        chosen_rows(names, "a - b - c", "m")
    assert chosen_rows(names, "0 - 2", "m") == (0, 2, "0 - 2") and chosen_rows(names, "0 - 3", "m").name == "a - c"


def test_the_same_model_is_read_again_under_the_same_argument():
    rm = model("causal")
    again = rl.RewardModel(rm.module, rm.tokenizer.hf, **rm.read_as)
    assert again.readout.objective == DIFFERENCE and again.score("Why?", "So.") == rm.score("Why?", "So.")
    back = rm.for_objective("refused").for_objective(DIFFERENCE)
    assert back.score("Why?", "So.") == rm.score("Why?", "So.")


@pytest.mark.parametrize(
    "objective", ["accepted - accepted", "accepted - kind", "accepted-refused", " - refused", True]
)
def test_a_difference_of_rows_that_are_not_there_is_refused(objective):
    with pytest.raises(rl.LoadError, match="has no row"):
        model("causal", objective)


def test_where_no_row_is_chosen_the_message_names_the_difference():
    module, tokenizer = tiny_model("llama", num_labels=2)
    module.config.id2label = {0: "bad", 1: "good"}
    with pytest.raises(rl.LoadError, match="log-odds of label.*objective='good - bad'"):
        rl.RewardModel(module, tokenizer)


def test_what_needs_one_row_refuses():
    rm = model("causal")
    with pytest.raises(rl.StructureError, match="no row of the head.*objective='accepted'"):
        rl.edit_head(rm, torch.ones(1, rm.d_model))


def test_a_reward_is_named_once():
    given = model("causal").readout
    with pytest.raises(rl.LoadError, match="said twice.*objective='accepted'"):
        rl.RewardModel(*tiny_model("llama", num_labels=3), readout=given, objective="accepted")
