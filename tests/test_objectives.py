"""Every objective of a head from one sweep or one split, against one sweep or split an objective."""

import functools

import pytest

import published_heads as published
import reward_lens as rl
from families import TEXT_PAIRS, tiny_model
from reward_lens.model.readout import chosen_rows

PAIRS = rl.Pairs([rl.Pair(*texts) for texts in TEXT_PAIRS[:3]])
OTHERS = rl.Pairs([rl.Pair(*texts) for texts in TEXT_PAIRS[3:]])
SITES = ["embed", "L0.attn", "L1.H2", "L2.mlp", "L2.resid_post"]
ASKED = {
    "noise": {"mode": "noise"},
    "denoise": {"mode": "denoise", "at": "all", "align": "tail"},
    "zero": {"mode": "zero", "at": "all"},
}
HEADS = ("labels", "armo", "qrm", "urm", "ldl")


def cases(columns: dict, quick: tuple) -> list:
    """Every head with every column; those that are not quick in the full run alone."""
    return [
        pytest.param(head, column, id=f"{head} {column}", marks=[] if (head, column) in quick else pytest.mark.full)
        for head in HEADS for column in columns
    ]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    @functools.cache
    def made(name: str) -> rl.RewardModel:
        if name == "labels":
            module, tokenizer = tiny_model("llama", num_labels=3)
            return rl.RewardModel(module, tokenizer, name="labels", objective=1)
        return rl.load(published.save(tmp_path_factory.mktemp(name), name))

    return made


def of_each(rm: rl.RewardModel, ask):
    """The same question to the model read by its first and by its last objective."""
    for name in (rm.objectives[0], rm.objectives[-1]):
        yield name, ask(rm.for_objective(name))


@pytest.mark.parametrize(("head", "asked"), cases(ASKED, (("armo", "zero"), ("labels", "denoise"))))
def test_effects_on_every_objective(model, head, asked):
    rm, settings = model(head), ASKED[asked]
    found = rl.objective_effects(rm, PAIRS, SITES, **settings).value
    assert found.dims == ("pair", *(["side"] if asked == "zero" else []), "component", "objective")
    assert tuple(found.objective.values) == rm.objectives
    for objective, one in of_each(rm, lambda m: rl.effects(m, PAIRS, SITES, **settings).value):
        ours = found.sel(objective=objective)
        assert abs(ours.drop_vars(["recovered", "margin"], errors="ignore") - one).max() < 1e-5
        if asked != "zero":
            assert abs(ours.margin - one.margin).max() < 1e-5
            assert abs(ours.recovered - one.recovered).where(abs(one.margin) > 1e-3).max() < 1e-2


SPLITS = {"component": "shared", "head": "own"}


@pytest.mark.parametrize(("head", "by"), cases(SPLITS, (("qrm", "component"), ("labels", "head"))))
def test_contributions_to_every_objective(model, head, by):
    rm = model(head)
    found = rl.objective_contributions(rm, PAIRS, by, SPLITS[by]).value
    assert found.dims == ("pair", "side", "component", "objective")
    for objective, one in of_each(rm, lambda m: rl.contributions(m, PAIRS, by=by, scale=SPLITS[by]).value):
        assert abs(found.sel(objective=objective) - one).max() < 1e-5


def test_the_objective_that_a_gated_model_was_loaded_for_does_not_matter(model):
    rm = model("armo")
    other = rm.for_objective(2)
    for ask in (rl.objective_effects, rl.objective_contributions):
        assert abs(ask(rm, PAIRS).value - ask(other, PAIRS).value).max() < 1e-6


def test_draws_and_positions(model):
    rm = model("armo")
    drawn = rl.objective_effects(rm, PAIRS[:2], ["L1.attn"], mode="resample", reference=OTHERS).value
    assert drawn.draw_sd.dims == drawn.dims and (drawn.draw_sd > 0).all()
    spread = rl.effects(rm, PAIRS[:2], ["L1.attn"], mode="resample", reference=OTHERS).value.draw_sd
    assert abs(drawn.draw_sd.sel(objective="reward") - spread).max() < 1e-5
    by_position = rl.objective_effects(rm, PAIRS, ["L1.attn"], at="all", align="tail", spans="position")
    assert by_position.value.dims == ("pair", "component", "objective", "position")
    one = rl.effects(rm, PAIRS, ["L1.attn"], at="all", align="tail", spans="position").value
    assert abs(by_position.value.sel(objective="reward") - one).max() < 1e-5
    by_position.to_frame()


def test_local_objectives_are_named(model):
    found = rl.objective_contributions(model("urm").for_objective(1), PAIRS)
    assert found.meta["local_objectives"] == ["reward"] and "gradient" in found.meta["cannot_show"]
    assert rl.objective_contributions(model("labels"), PAIRS).meta["local_objectives"] == []


def test_one_objective_is_refused():
    module, tokenizer = tiny_model("llama")
    rm = rl.RewardModel(module, tokenizer, name="one")
    for ask in (rl.objective_effects, rl.objective_contributions):
        with pytest.raises(rl.StructureError, match="The head has one objective"):
            ask(rm, PAIRS)


def test_an_index_may_be_text_where_no_row_has_that_name():
    """A command line has text only; a row named "1" is meant by its name."""
    assert chosen_rows(("help", "harm"), "1", "m") == chosen_rows(("help", "harm"), 1, "m") == (1, None, "harm")
    assert chosen_rows(("1", "2"), "1", "m").row == 0
    with pytest.raises(rl.LoadError, match="no row '2'"):
        chosen_rows(("help", "harm"), "2", "m")
