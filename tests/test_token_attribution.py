"""Token attribution adds up where it says so, and every value is what an intervention by hand gives."""

import functools

import numpy as np
import pytest
import torch

from families import TEXT_PAIRS, by_family, tiny_model
from planted import KEYWORD, planted_model, planted_pairs
from reward_lens.data import Pair
from reward_lens.engine.hooks import attached
from reward_lens.errors import CheckFailed, DataError
from reward_lens.methods.observation import embedding_paths
from reward_lens.methods.observation.embedding_paths import (
    _quadrature,
    _walk,
    baseline_residual,
    integrated_path,
)
from reward_lens.methods.observation.token_attribution import _require, token_attribution
from reward_lens.methods.shared.units import units_of
from reward_lens.model.reward_model import RewardModel
from reward_lens.result import load_result

FAMILIES = ("llama", "gpt2", "gemma2", "bloom", "gpt_neox", "qwen3", "mixtral")
SHORT = [
    Pair("Is 7 a prime number?", "Yes, it is.", "Yes, it was", id="shared prefix"),
    Pair("Cheer me up", "Well \U0001f389\U0001f44d\U0001f3fd", "o", id="emoji, one token"),
    Pair("Say nothing.", "", "", id="empty"),
]
METHODS = (
    {"method": "prefix"},
    {"method": "truncate"},
    {"method": "gradient"},
    {"method": "integrated", "steps": 8},
    {"method": "leave_one_out"},
    {"method": "leave_one_out", "removal": "mask"},
)


@functools.cache
def model(family: str, dtype: torch.dtype = torch.float32) -> RewardModel:
    return RewardModel(*tiny_model(family, dtype=dtype))


def sums(result, pair: int, side: str) -> tuple[float, float, float]:
    cell = result.value.isel(pair=pair).sel(side=side)
    return float(cell.sum(skipna=True)), float(cell["start"]), float(cell["reward"])


def row(result, pair: int, side: str) -> np.ndarray:
    cell = result.value.isel(pair=pair).sel(side=side)
    return cell.values[: int(cell["n_positions"])]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("by", ["token", "word"])
def test_what_claims_a_sum_adds_up(family, by):
    rm = model(family)
    for settings in METHODS[:2] + METHODS[3:4]:
        if family == "mixtral" and settings["method"] == "integrated":
            continue  # see the test of jumps
        result = token_attribution(rm, SHORT, by=by, **settings)
        tolerance = 1e-2 if settings["method"] == "integrated" else 1e-5
        assert result.checks[0].tolerance == tolerance
        for pair, item in enumerate(SHORT):
            for side, response in zip(("chosen", "rejected"), item.responses, strict=True):
                total, start, reward = sums(result, pair, side)
                size = max(abs(start), abs(reward), np.abs(row(result, pair, side)).sum())
                if settings["method"] == "integrated":  # the claim is about the sizes of the tokens' values
                    assert result.checks[0].gap <= tolerance
                    size += 1.0
                assert abs(total - (reward - start)) <= tolerance * size
                assert reward == pytest.approx(rm.score(item.prompt, response), abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_reads_the_head_at_every_position(family):
    rm = model(family)
    result = token_attribution(rm, SHORT[:1], method="prefix")
    text = rm.tokenize(SHORT[0].prompt, SHORT[0].chosen)
    with torch.no_grad():
        ids = torch.tensor([text.ids])
        curve = rm.module.score(rm.trunk.module(input_ids=ids).last_hidden_state)[0, :, 0].double().numpy()
    first = text.response.start
    assert float(result.value["start"][0, 0]) == pytest.approx(curve[first - 1], abs=1e-5)
    np.testing.assert_allclose(row(result, 0, "chosen"), np.diff(curve[first - 1 :]), atol=1e-5)
    roles = result.value["role"].values[0, 0, : len(text) - first]
    assert list(roles) == ["response"] * len(text.response) + ["tail"] * len(text.tail)


@pytest.mark.parametrize("family", FAMILIES)
def test_truncation_and_removal_match_plain_hugging_face_calls(family):
    rm = model(family)
    text = rm.tokenize(SHORT[0].prompt, SHORT[0].chosen)
    head, body, tail = (list(text.ids[s.start : s.stop]) for s in (text.prompt, text.response, text.tail))

    def hf(ids, **extra):
        with torch.no_grad():
            return float(rm.module(input_ids=torch.tensor([ids]), **extra).logits[0, 0])

    read = [hf(head + body[:k] + tail) for k in range(len(body) + 1)]
    result = token_attribution(rm, SHORT[:1], method="truncate")
    np.testing.assert_allclose(row(result, 0, "chosen"), np.diff(read), atol=2e-5)

    gone = [read[-1] - hf(head + body[:k] + body[k + 1 :] + tail) for k in range(len(body))]
    result = token_attribution(rm, SHORT[:1], method="leave_one_out")
    np.testing.assert_allclose(row(result, 0, "chosen"), gone, atol=2e-5)
    assert float(result.value["start"][0, 0]) == pytest.approx(read[0], abs=2e-5)

    masked = []
    for k in text.response:
        mask = torch.ones(1, len(text), dtype=torch.long)
        mask[0, k] = 0
        kept = {} if family == "bloom" else {"position_ids": torch.arange(len(text))[None]}
        masked.append(read[-1] - hf(list(text.ids), attention_mask=mask, **kept))
    result = token_attribution(rm, SHORT[:1], method="leave_one_out", removal="mask")
    np.testing.assert_allclose(row(result, 0, "chosen"), masked, atol=2e-5)
    if family == "bloom":  # its positions are counted off the mask, so hiding a token closes the gap
        np.testing.assert_allclose(masked, gone, atol=2e-5)


@pytest.mark.parametrize("family", by_family())
def test_variants_that_go_on_from_the_texts_own_keys_are_those_run_whole(family, monkeypatch):
    """Each row goes on from another position; with windows, distances and position ids as in the text itself."""
    rm, pairs = model(family), [Pair(*texts) for texts in TEXT_PAIRS[:2]]
    assert rm.reuses_prefix(*rm.tokenize_pairs(pairs)[0])
    settings = [{"method": "truncate"}, *({"method": "leave_one_out", "removal": r} for r in ("delete", "mask"))]
    fast = [token_attribution(rm, pairs, **some) for some in settings]
    monkeypatch.setattr(RewardModel, "reuses_prefix", lambda self, *texts: False)
    for some, one in zip(settings, fast, strict=True):
        whole = token_attribution(rm, pairs, **some)
        scale = float(np.abs(whole.dataset["reward"]).max() + np.nanstd(whole.value))
        np.testing.assert_allclose(one.value.values, whole.value.values, atol=2e-5 * scale)
        assert float(whole.value.std()) > 1e-3


def test_words_are_removed_whole_and_summed_otherwise():
    rm = model("llama")
    text = rm.tokenize(SHORT[0].prompt, SHORT[0].chosen)
    words = units_of(text, "word")
    assert [u.text for u in words] == ["Yes,", " it", " is."]
    result = token_attribution(rm, SHORT[:1], method="leave_one_out", by="word")
    ids = [i for k, i in enumerate(text.ids) if k not in words[0].positions]
    with torch.no_grad():
        without = float(rm.module(input_ids=torch.tensor([ids])).logits[0, 0])
    lost = rm.score(SHORT[0].prompt, SHORT[0].chosen) - without
    assert row(result, 0, "chosen")[0] == pytest.approx(lost, abs=2e-5)
    for settings in METHODS[:4]:
        tokens = row(token_attribution(rm, SHORT[:1], **settings), 0, "chosen")
        by_word = row(token_attribution(rm, SHORT[:1], by="word", **settings), 0, "chosen")
        first = text.response.start
        summed = [tokens[u.positions.start - first : u.positions.stop - first].sum() for u in words]
        np.testing.assert_allclose(by_word[:3], summed, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bloom", "gpt_neox", "qwen3"])
def test_gradient_is_the_slope_along_the_line(family):
    """Against finite differences of the reward, one position moved at a time by editing block 0's input.

    Most norms compute in float32 whatever the model's precision, so the step is wide and extrapolated.
    """
    rm = model(family)
    text = rm.tokenize(SHORT[0].prompt, SHORT[0].chosen)
    base = baseline_residual(rm, len(text), "mean")
    result = token_attribution(rm, SHORT[:1], method="gradient")

    def moved(position, step):
        def edit(x):
            x = x.clone()
            x[0, position] += step * (x[0, position] - base[position])
            return x

        kept = []
        (batch,) = rm.batches([text])
        with torch.no_grad():
            rm.trunk.run(batch, rm.trunk.edit_residual(0, edit), rm.trunk.read_residual(rm.n_layers, kept.append))
            return float(rm.readout.reward(kept[0][0, text.reward_pos]))

    def slope(position, step):
        return (moved(position, step) - moved(position, -step)) / (2 * step)

    slopes = np.array([(4 * slope(p, 0.02) - slope(p, 0.04)) / 3 for p in text.response])
    np.testing.assert_allclose(row(result, 0, "chosen"), slopes, atol=2e-3 * np.abs(slopes).max())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_integrated_gradients_converge(family):
    rm = model(family, torch.float64)
    text = rm.tokenize(SHORT[0].prompt, SHORT[0].chosen)
    base = baseline_residual(rm, len(text), "pad")
    ends = _walk(rm, [text], base, np.array([[0.0, 1.0]]))[1][0]
    assert ends[1] == pytest.approx(rm.score(SHORT[0].prompt, SHORT[0].chosen), abs=1e-12)
    gaps = []
    for steps in (4, 16, 64):
        ((values, _),), _ = _walk(rm, [text], base, *_quadrature([(0.0, 1.0)], steps))
        gaps.append(abs(values.sum() - (ends[1] - ends[0])) / np.abs(values).sum())
    assert gaps[2] < 1e-5 and gaps[2] < gaps[0]  # llama's norms are float32 inside

    fine = integrated_path(rm, [text], "pad", ends[1:], 4, 1e-5)
    assert fine.steps[0] > 4
    np.testing.assert_allclose(fine.values[0], values, atol=1e-4 * np.abs(values).max())


@pytest.mark.parametrize(
    ("family", "cancelled"), [("llama", 0.4), ("gemma2", 0.05), ("gpt_neox", 0.4), ("qwen3", 0.04)]
)
def test_integrated_gradients_of_single_tokens(monkeypatch, family, cancelled):
    """Errors of tokens that cancel in a closed sum are found, by an estimate that is no smaller than they are."""
    rm = model(family)
    tokens = [t for both in rm.tokenize_pairs([Pair(*some) for some in TEXT_PAIRS]) for t in both]
    rewards, n = rm.rewards(tokens).double().numpy(), len(tokens)
    edges = np.linspace(0, 1, 9)
    fine = _quadrature(list(zip(edges[:-1], edges[1:], strict=True)), 32)
    nodes, weights = (np.stack([some.reshape(-1, *some.shape[2:])] * n) for some in fine)
    truth, _ = _walk(rm, tokens, embedding_paths._baseline_of(rm, tokens, "mean"), nodes, weights)

    def errors(path):
        pairs = zip(path.values, truth, strict=True)
        return np.array([np.abs(own - true).max() / np.abs(true).max() for own, (true, _) in pairs])

    path = integrated_path(rm, tokens, "mean", rewards, 4, 1e-2)
    assert errors(path).max() < 0.03 and (path.token_gaps <= 0.1).all()
    assert (errors(path) <= path.token_gaps + 1e-4).all()
    monkeypatch.setattr(embedding_paths, "TOKEN_TOLERANCE", np.inf)
    by_sum = integrated_path(rm, tokens, "mean", rewards, 4, 1e-2)
    assert by_sum.gaps.max() <= 1e-2 and errors(by_sum).max() > cancelled


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bloom"])
def test_baselines_are_what_they_are_called(family):
    rm = model(family)
    text = rm.tokenize(SHORT[0].prompt, SHORT[0].chosen)
    ids = [rm.pad_id if i in text.response else t for i, t in enumerate(text.ids)]
    with torch.no_grad():
        padded = float(rm.module(input_ids=torch.tensor([ids])).logits[0, 0])
    result = token_attribution(rm, SHORT[:1], method="gradient", baseline="pad")
    assert float(result.value["start"][0, 0]) == pytest.approx(padded, abs=2e-5)

    kept = []
    words = len(rm.tokenizer.hf)
    with torch.no_grad(), attached([rm.trunk.read_residual(0, lambda x: kept.append(x.clone()))]):
        rm.trunk.module(input_ids=torch.arange(words)[:, None].expand(words, 5))
    torch.testing.assert_close(baseline_residual(rm, 5, "mean"), kept[0].mean(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", METHODS[1:2] + METHODS[3:], ids=lambda s: "-".join(map(str, s.values())))
def test_a_planted_keyword_gets_the_points(settings):
    rm = RewardModel(*planted_model("keyword"))
    pairs = [Pair(*p) for p in planted_pairs("keyword", 24) if 3 <= len(p[1].split()) <= 8][:8]
    result = token_attribution(rm, pairs, by="word", **settings)
    found = []
    for i in range(len(pairs)):
        values, pieces = row(result, i, "chosen"), result.value["piece"].values[i, 0]
        found.append(pieces[values.argmax()].strip() == KEYWORD)
    assert np.mean(found) >= 0.8, found


@pytest.mark.parametrize("settings", METHODS, ids=lambda s: "-".join(map(str, s.values())))
def test_swapped_sides_repeated_calls_and_files(settings, tmp_path):
    rm = model("qwen3")
    state = {name: tensor.clone() for name, tensor in rm.module.state_dict().items()}
    result = token_attribution(rm, SHORT, **settings)
    again = token_attribution(rm, SHORT, **settings)
    np.testing.assert_array_equal(result.value.values, again.value.values)
    swapped = token_attribution(rm, [Pair(p.prompt, p.rejected, p.chosen, p.id) for p in SHORT], **settings)
    a, b = result.value.values, swapped.value.values
    np.testing.assert_allclose(a[:, [0, 1]], b[:, [1, 0]], atol=1e-5)
    np.testing.assert_allclose(a[:, 2], -b[:, 2], atol=1e-5)

    loaded = load_result(result.save(tmp_path / "one.nc"))
    assert loaded.value.identical(result.value) and loaded.meta == result.meta

    assert all(p.grad is None for p in rm.module.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in rm.module.modules())
    assert all(torch.equal(state[name], tensor) for name, tensor in rm.module.state_dict().items())


def test_margins_stand_where_the_texts_agree():
    rm = model("llama")
    for settings in METHODS:
        result = token_attribution(rm, SHORT, **settings)
        shared = [int(n) for n in result.value["n_positions"].sel(side="margin")]
        tail = len(rm.tokenize("a", "b").tail) if settings["method"] == "prefix" else 0
        assert shared == [6, 0, tail]  # Y, e, s, comma, " i", t; then " is" against " "
        margin = row(result, 0, "margin")
        expected = row(result, 0, "chosen")[: shared[0]] - row(result, 0, "rejected")[: shared[0]]
        np.testing.assert_array_equal(margin, expected)
        if settings["method"] == "truncate":
            assert not margin.any()


def test_a_unit_that_holds_the_reward_position_cannot_be_masked():
    _, tokenizer = tiny_model("llama")
    tokenizer.chat_template, tokenizer.add_bos_token = "{% for m in messages %}{{ m['content'] }}{% endfor %}", False
    rm = RewardModel(tiny_model("llama")[0], tokenizer)
    result = token_attribution(rm, SHORT[:1], method="leave_one_out", removal="mask")
    values = row(result, 0, "chosen")
    assert np.isnan(values[-1]) and np.isfinite(values[:-1]).all()
    assert any("own position" in check.note for check in result.checks)


def test_a_reward_that_jumps_along_the_line_is_refused(monkeypatch):
    monkeypatch.setattr(embedding_paths, "MAX_STEPS", 128)
    with pytest.raises(CheckFailed, match="jumps along the line"):
        token_attribution(model("mixtral"), SHORT[:1], method="integrated")


def test_sixteen_bits():
    rm = model("qwen3", torch.bfloat16)
    for settings in METHODS:
        token_attribution(rm, SHORT[:2], **settings)


def test_rows_are_counted():
    rm, pair = model("llama"), Pair("Say b.", "bb", "c")
    meta = token_attribution(rm, [pair], method="truncate").meta
    assert meta["forward_rows"] == 4 + 2  # the empty response once, "b", "bb" and "c"; the keys of each response
    meta = token_attribution(rm, [pair], method="leave_one_out").meta
    assert meta["forward_rows"] == 4 + 2  # deleting either "b" leaves the same text


UNITS = {
    "word": {
        "Hello  world. \n": ["Hello", "  world. \n"],
        " \n": [" \n"],
        "a\n\nb": ["a", "\n\nb"],
        "ok \U0001f44d\U0001f3fd!": ["ok", " \U0001f44d\U0001f3fd!"],
        "\u4f60\u597d\u3002ok": ["\u4f60", "\u597d\u3002ok"],
    },
    "sentence": {
        'It is 3.14. Yes! "No." e': ["It is 3.14.", " Yes!", ' "No."', " e"],
        "1. One\n2. Two": ["1. One\n", "2. Two"],
        "\u4f60\u597d\u3002\u518d\u89c1\uff01": ["\u4f60\u597d\u3002", "\u518d\u89c1\uff01"],
        "Good. \U0001f389": ["Good. \U0001f389"],
        "no end": ["no end"],
    },
}


@pytest.mark.parametrize("by", ["word", "sentence"])
def test_units(by):
    rm = model("llama")
    for response, expected in UNITS[by].items():
        text = rm.tokenize("Go on.", response)
        units = units_of(text, by)
        assert [u.text for u in units] == expected
        assert [i for u in units for i in u.positions] == list(text.response)
        assert all(not text.fragment(u.positions.start) for u in units)
    for _, *responses in TEXT_PAIRS:
        for response in responses:
            assert "".join(u.text for u in units_of(rm.tokenize("Go on.", response), by)) == response


def test_unknown_options():
    known = {"method": "prefix", "by": "token", "baseline": "mean", "removal": "delete"}
    for name in known:
        with pytest.raises(DataError, match=f"no {name} of this name"):
            _require(32, **(known | {name: "other"}))
    with pytest.raises(DataError, match="nodes"):
        token_attribution(model("llama"), SHORT, method="integrated", steps=0)
