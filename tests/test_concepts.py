"""Concept texts and their loader, and concept vectors against planted states."""

import dataclasses
import functools
import itertools
import json

import numpy as np
import pytest

import reward_lens as rl
from families import tiny_model
from reward_lens.data.concepts import ConceptText, ConceptTexts, load_concepts
from reward_lens.methods.concepts import concept_vectors as module
from reward_lens.methods.concepts.concept_states import TextStates, cell_means, text_states
from reward_lens.methods.concepts.concept_statistics import neutral_basis
from reward_lens.methods.concepts.concept_vectors import concept_vectors

D = 32
WORDS = {"calm": "the sea", "angry": "a fire", "proud": "an oak", "shy": "mouse", "kind": "bread", "sly": "fox !"}
TOPICS = [f"{a} {b}" for a, b in itertools.product(("rain", "soup", "chess", "tax"), ("at home", "now", "abroad"))]


def texts_of(words=WORDS, topics=TOPICS, neutral=True, negative=True) -> ConceptTexts:
    rows = [ConceptText(c, t, f"{w}, {t}, {w}.") for c, w in words.items() for t in topics]
    if negative:
        rows += [ConceptText(c, t, f"{w[::-1].upper()}, {t}.", "negative") for c, w in words.items() for t in topics]
    if neutral:
        rows += [ConceptText("neutral", t, f"This is about {t} and no more.") for t in topics]
    return ConceptTexts(rows)


@functools.cache
def model() -> rl.RewardModel:
    return rl.RewardModel(*tiny_model("llama", seed=1), name="llama")


def planted(monkeypatch, texts, seed=0, effect=1.0, topic=3.0, noise=0.3, nuisance=0.0):
    """States of a rule: topic effect, the concept's own direction, noise, and along e0 a large neutral nuisance."""
    rng = np.random.default_rng(seed)
    names = sorted({t.concept for t in texts})
    directions = {c: v for c, v in zip(names, rng.standard_normal((len(names), D)), strict=True)}
    shifts = {t: topic * rng.standard_normal(D) for t in sorted({t.topic for t in texts})}

    def give(rm, some, depth):
        rows = []
        for t in some:
            own = np.random.default_rng([seed, *f"{t.concept} {t.topic} {t.text} {t.polarity}".encode()])
            h = shifts[t.topic] + noise * own.standard_normal((2, D))
            if t.concept != "neutral":
                h = h + effect * directions[t.concept]
            h[:, 0] += nuisance * own.standard_normal()
            rows.append(h)
        states = np.array(rows)
        return TextStates(states, np.linalg.norm(states, axis=2), states[:, 1, 1])

    monkeypatch.setattr(module, "text_states", give)
    return directions


# --- texts --------------------------------------------------------------------------------------------------


def test_a_file_comes_back_as_it_was_written(tmp_path):
    rows = [
        {"concept": "calm", "topic": "tax", "text": "All is well.", "polarity": "positive"},
        {"concept": "calm", "topic": "tax", "text": "Help!", "polarity": "negative", "prompt": "What of tax?"},
        {"concept": "neutral", "topic": "tax", "text": "Taxes are due in May."},
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    texts = load_concepts(path)
    assert texts.concepts == ("calm",) and texts.topics == ("tax",) and len(texts) == 3
    assert [t.text for t in texts.of("negative")] == ["Help!"] and texts.of("negative")[0].messages == [
        {"role": "user", "content": "What of tax?"}
    ]
    assert "tax" in texts[0].messages[0]["content"] and texts.neutral[0].text == "Taxes are due in May."
    assert len(load_concepts(path, limit=1)) == 1
    assert "concepts 1, topics 1, negative 1, neutral 1" in repr(texts)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"concept": "a", "topic": "b"}, "line 1: the field 'text'.*no such column"),
        ({"concept": "a", "topic": "b", "text": " "}, "line 1: the field 'text'.*blank"),
        ({"concept": "a", "topic": 3, "text": "x"}, "line 1: the field 'topic'.*int 3"),
        ({"concept": "a", "topic": "b", "text": "x", "polarity": "pos"}, "'polarity'.*'positive' or 'negative'"),
        ({"concept": "neutral", "topic": "b", "text": "x", "polarity": "negative"}, "neutral text that is negative"),
        ({"concept": "a", "topic": "b", "text": "x", "prompt": 4}, "'prompt'"),
        ([1], "line 1.*an object with named fields"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path, row, message):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(rl.DataError, match=message):
        load_concepts(path)


def test_files_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(rl.DataError, match="nothing at that path"):
        load_concepts(tmp_path / "none.jsonl")
    monkeypatch.setattr("reward_lens.data.concepts.resources.files", lambda name: tmp_path)
    with pytest.raises(rl.DataError, match="bundled concept texts are not installed"):
        load_concepts("concepts")


def test_one_text_under_two_topics_is_refused():
    rows = [ConceptText("a", "x", "same"), ConceptText("a", "y", "same")]
    with pytest.raises(rl.DataError, match="under two topics.*'x' and 'y'"):
        ConceptTexts(rows)
    ConceptTexts([rows[0], ConceptText("b", "y", "same"), ConceptText("a", "x", "same")])
    ConceptTexts([ConceptText("a", "x", "same", prompt="one"), ConceptText("a", "y", "same", prompt="two")])
    with pytest.raises(rl.DataError, match=r"texts\[0\].*ConceptText"):
        ConceptTexts(["text"])
    with pytest.raises(rl.DataError, match="no concept texts"):
        ConceptTexts([])


# --- states -------------------------------------------------------------------------------------------------


def test_states_are_those_of_single_runs():
    rm, texts = model(), list(texts_of())[:3]
    found = text_states(rm, texts, 2)
    for i, text in enumerate(texts):
        tokens = rm.tokenize(text.messages, text.text)
        acts = rl.capture(rm, [tokens], ["L2.resid_pre"], "all")["L2.resid_pre"][0].double().numpy()
        said = acts[tokens.response.start : tokens.response.stop]
        np.testing.assert_allclose(found.states[i, 0], said.mean(0), atol=1e-5)
        np.testing.assert_allclose(found.states[i, 1], acts[tokens.reward_pos], atol=1e-5)
        np.testing.assert_allclose(found.norms[i, 0], np.linalg.norm(said, axis=1).mean(), rtol=1e-5)
        assert abs(found.rewards[i] - rm.score(text.messages, text.text)) < 1e-5


def test_cell_means_by_hand():
    texts = [ConceptText("a", "x", "1"), ConceptText("a", "x", "2"), ConceptText("b", "y", "3")]
    np.testing.assert_array_equal(
        cell_means(np.array([1.0, 3.0, 7.0]), texts, ["a", "b"], ["x", "y"]), [[2.0, np.nan], [np.nan, 7.0]]
    )


def test_neutral_components_are_the_fewest_that_hold_the_share():
    states = np.random.default_rng(0).standard_normal((50, 4)) * np.array([3.0, 2.0, 1.0, 0.1])
    values = np.linalg.eigvalsh(np.cov(states.T))[::-1]
    held = np.cumsum(values) / values.sum()
    for share in (0.1, 0.5, 0.9, 0.999999):
        basis = neutral_basis(states, share)
        assert held[len(basis) - 1] >= share and (len(basis) == 1 or held[len(basis) - 2] < share)
        np.testing.assert_allclose(basis @ basis.T, np.eye(len(basis)), atol=1e-12)
    assert len(neutral_basis(states, 0.0)) == 0
    same = (
        states[:1] + 1e-8 * states
    )  # one token in all texts, and rounding: no component says anything of neutral texts
    assert len(neutral_basis(same, 0.5)) == len(neutral_basis(states[[0] * 6], 0.5)) == 0


# --- vectors ------------------------------------------------------------------------------------------------


def test_planted_directions_are_recovered_whatever_the_topics_do(monkeypatch):
    texts = texts_of()
    directions = planted(monkeypatch, texts)
    result = concept_vectors(model(), texts, denoise_var=0)
    true = np.array([directions[c] for c in WORDS])
    true -= true.mean(0)
    for pos in ("response", "reward"):
        found = result.mean.sel(pos=pos).values
        cosines = (found * true).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(true, axis=1)
        assert (cosines > 0.99).all()
        np.testing.assert_allclose(result.value["norm"].sel(pos=pos), np.linalg.norm(found, axis=1))
    assert (result.value["reliability_low"] > 0.95).all()
    np.testing.assert_allclose(result.mean, result.value.mean("topic"))
    np.testing.assert_allclose(result.mean.sum("concept"), 0.0, atol=1e-12)
    assert result.meta["neutral"] == {"components": {"response": 0, "reward": 0}, "topics": 0}


def test_what_neutral_texts_vary_in_is_projected_out(monkeypatch):
    texts = texts_of()
    planted(monkeypatch, texts, topic=0.1, nuisance=30.0)
    with_it = concept_vectors(model(), texts, denoise_var=0)
    without = concept_vectors(model(), texts, denoise_var=0.5)
    assert without.meta["neutral"]["components"] == {"response": 1, "reward": 1}
    share = [float(np.abs(r.mean[..., 0] / r.value["norm"]).max()) for r in (with_it, without)]
    assert share[0] > 0.9 and share[1] < 0.1
    own = concept_vectors(model(), texts_of(neutral=False), neutral=texts.neutral)
    assert own.value.equals(without.value)


def test_pure_noise_has_no_reliability(monkeypatch):
    """A reliability interval over 0 in about all of 36 vectors of nothing, and a claim over one half in none."""
    texts, lows, values = texts_of(), [], []
    for seed in range(3):
        planted(monkeypatch, texts, seed=seed, effect=0.0)
        result = concept_vectors(model(), texts, denoise_var=0, seed=seed)
        lows.append(result.value["reliability_low"].values), values.append(result.value["reliability"].values)
    assert np.mean(np.array(lows) > 0) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 36)
    assert np.median(values) < 0.4


def test_permuting_concepts_permutes_and_more_texts_on_a_topic_are_no_topics(monkeypatch):
    texts = texts_of()
    planted(monkeypatch, texts)
    base = concept_vectors(model(), texts)
    turned = concept_vectors(model(), ConceptTexts(sorted(texts, key=lambda t: t.concept, reverse=True)))
    again = turned.sel(concept=list(base.value["concept"].values))
    np.testing.assert_allclose(again.value, base.value, atol=1e-12)
    np.testing.assert_allclose(again.value["reliability"], base.value["reliability"], atol=1e-9)
    twice = concept_vectors(model(), ConceptTexts([*texts, *texts]))
    np.testing.assert_allclose(twice.value, base.value, atol=1e-12)
    for name in ("reliability", "reliability_low", "reliability_high"):
        np.testing.assert_allclose(twice.value[name], base.value[name], atol=1e-9)
    assert (twice.value["texts"] == 2 * base.value["texts"]).all()


def test_topics_that_are_not_shared_are_left_out_and_named():
    texts = texts_of()
    fewer = [t for t in texts if not (t.concept == "shy" and t.topic == TOPICS[0])]
    result = concept_vectors(model(), fewer)
    assert result.meta["topics_left_out"] == [TOPICS[0]] and result.meta["n_topics"] == len(TOPICS) - 1
    whole = concept_vectors(model(), [t for t in texts if t.topic != TOPICS[0] or t.concept == "neutral"])
    assert whole.value.equals(result.value)


def test_saved_and_the_default_depth(tmp_path):
    rm = model()
    result = concept_vectors(rm, texts_of())
    assert result.meta["settings"]["depth"] == 2 and result.meta["settings"]["site"] == "L2.resid_pre"
    back = rl.load_result(result.save(tmp_path / "v.nc"))
    assert back.value.equals(result.value) and back.mean.equals(result.mean) and back.meta == result.meta
    last = concept_vectors(rm, texts_of(), depth=rm.n_layers)
    assert last.meta["settings"]["site"] == "L2.resid_post" and repr(last)


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        (texts_of(topics=TOPICS[:5]), {}, "share too few topics.*5 topics.*at least 6"),
        (texts_of(words={"calm": "sea"}), {}, "1 concepts.*at least 2"),
        (texts_of(neutral=False), {}, "too few neutral.*0 topics.*denoise_var=0"),
        (texts_of(), {"depth": 9}, "depth=9.*0 to 3"),
        (texts_of(), {"depth": 0}, "no direction.*calm .reward.*at depth 0"),
        (texts_of(), {"denoise_var": 1.0}, "denoise_var=1.0"),
        (texts_of(), {"n_splits": 3}, "n_splits=3"),
        ([dataclasses.replace(t, text="the same on this topic: " + t.topic) for t in texts_of()], {"denoise_var": 0},
         "no direction.*mean of zero"),
        (["a text"], {}, "ConceptText"),
        ([], {}, "no concept texts"),
    ],
)  # fmt: skip
def test_bad_input(texts, settings, message):
    with pytest.raises(rl.DataError, match=message):
        concept_vectors(model(), texts, **settings)
