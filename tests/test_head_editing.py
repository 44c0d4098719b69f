"""From an edit's direction to an edited head and its checkpoint: against written-out formulas, numpy, transformers."""

import functools
import json
import tracemalloc

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import reward_lens as rl
from families import TEXT_PAIRS, tiny_model
from planted import KEYWORD, planted_model
from reward_lens import stats
from reward_lens.methods.repair.alpha_selection import _needed, select_alpha
from reward_lens.methods.repair.bias_direction import _against_flips, _left_out_norms, bias_direction
from reward_lens.methods.repair.erasure import erase_concept
from reward_lens.methods.repair.head_editing import edit_head, edit_report
from reward_lens.methods.shared.paired_shares import paired_change
from reward_lens.methods.shared.split_half import halves, spearman_brown

PAIRS = [rl.Pair(*texts, id=f"p{i}") for i, texts in enumerate(TEXT_PAIRS)]
TEXTS = [(p.prompt, r) for p in PAIRS for r in p.responses]
FAMILIES = ("llama", "gpt2", "gemma", "olmo2", "gpt_neox")
EVERY = [(f, d) for f in FAMILIES for d in (torch.float32, torch.float64)]
every = pytest.mark.parametrize(("family", "dtype"), EVERY, ids=[f"{f} {str(d)[6:]}" for f, d in EVERY])
LAYER_NORM = {"gpt2", "gpt_neox"}
WORDS = "cat dog sun tree red old sea hat run it you and is on".split()


@functools.cache
def model(family: str = "llama", dtype: torch.dtype = torch.float32, num_labels: int = 1) -> rl.RewardModel:
    module, tokenizer = tiny_model(family, dtype=dtype, num_labels=num_labels)
    return rl.RewardModel(module, tokenizer, name=family, objective=1 if num_labels > 1 else None)


def vectors(k: int, family: str = "llama", seed: int = 0) -> torch.Tensor:
    """Random directions, orthogonal to each other as the family's norm sees them."""
    v = torch.randn(k, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    v = v - v.mean(1, keepdim=True) if family in LAYER_NORM else v
    return torch.linalg.qr(v.T)[0].T


def edited_texts(n: int, seed: int = 0, extra: str = " sorry") -> list[rl.Pair]:
    rng = np.random.default_rng(seed)
    said = [" ".join(rng.choice(WORDS, 4)) for _ in range(n)]
    return [rl.Pair(f"Say {seed} {i}", text + extra, text) for i, text in enumerate(said)]


def residuals(rm: rl.RewardModel, texts=TEXTS) -> torch.Tensor:
    return rl.capture(rm, texts, [f"L{rm.n_layers - 1}.resid_post"])[f"L{rm.n_layers - 1}.resid_post"]


def rewards(rm: rl.RewardModel, texts=TEXTS) -> torch.Tensor:
    return rm.rewards([rm.tokenize(*t) for t in texts])


def normed(rm: rl.RewardModel, h: torch.Tensor, scale_of: torch.Tensor | None = None) -> torch.Tensor:
    """The final norm written out from the module's own parameters, its scale that of `scale_of`."""
    norm = rm.module.get_submodule(rm.structure.final_norm)
    family, scale_of = rm.name.split(" ")[0], h if scale_of is None else scale_of
    if family in LAYER_NORM:
        s = 1 / (scale_of.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
        return norm.weight * (h - h.mean(-1, keepdim=True)) * s + norm.bias
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    gain = 1 + norm.weight if family == "gemma" else norm.weight
    return gain * h * (scale_of.square().mean(-1, keepdim=True) + eps).rsqrt()


def own_precision(family: str, dtype: torch.dtype) -> float:
    """Of the network's own norm: the RMSNorm classes compute in float32 whatever they are given, and the gain is
    measured with probes beside which an epsilon of 1e-5 is not quite nothing (1e-11)."""
    return 3e-6 if dtype == torch.float32 else 1e-12 if family in LAYER_NORM else 1e-7


# --- the direction ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 1, 3, None])
def test_the_direction_is_the_mean_over_prompts_of_the_differences(depth):
    rm = model("gpt2")
    pairs = [*PAIRS, rl.Pair(PAIRS[0].prompt, "Paris, and it is old.", "Paris.")]  # a prompt that counts once
    site = "L2.resid_post" if depth in (3, None) else f"L{depth}.resid_pre"
    acts = rl.capture(rm, pairs, [site])[site].double()
    moves = (acts[::2] - acts[1::2]).numpy()
    moves[0] = (moves[0] + moves[6]) / 2
    mean = moves[:6].mean(0)
    result = bias_direction(rm, pairs, depth)
    assert result.value.dims == ("d_model",) and result.meta["n_prompts"] == 6
    np.testing.assert_allclose(result.value, mean / np.linalg.norm(mean), atol=1e-9)
    assert result.meta["norm"]["value"] == pytest.approx(np.linalg.norm(mean))
    share = np.linalg.norm(mean) / acts[1::2].norm(dim=1).mean()
    assert result.meta["norm_share"] == pytest.approx(float(share))
    if depth is None:  # u by automatic differentiation of the norm written out, its scale held
        h = residuals(rm)[:1].requires_grad_()
        (u,) = torch.autograd.grad(normed(rm, h, h.detach()) @ rm.head.weight[0], h)
        cosine = torch.cosine_similarity(u[0].double(), torch.tensor(mean), dim=0)
        assert result.meta["cosine_with_u"]["value"] == pytest.approx(float(cosine), abs=1e-6)


def test_reliability_against_a_loop_over_halves_and_prompts_left_out():
    moves = np.random.default_rng(3).normal(0.4, 1, (9, 5))
    value, without = halves(moves, 60, np.random.default_rng(1))
    order = np.argsort(np.random.default_rng(1).random((60, 9)), axis=1)

    def mean_cosine(left_out=None):
        out = []
        for row in order:
            a, b = ([i for i in half if i != left_out] for half in (row[:4], row[4:]))
            a, b = moves[a].mean(0), moves[b].mean(0)
            out.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        return np.mean(out)

    assert value == pytest.approx(mean_cosine())
    np.testing.assert_allclose(without, [mean_cosine(i) for i in range(9)], atol=1e-12)
    assert spearman_brown(np.arctanh(0.5)) == pytest.approx(2 / 3)
    assert spearman_brown(-np.inf) == pytest.approx(-1)


def test_memory_of_a_direction_grows_with_its_prompts_and_not_with_their_square():
    moves = np.random.default_rng(0).normal(0.4, 1, (4000, 3))
    tracemalloc.start()
    halves(moves, 50, np.random.default_rng(1))
    nulls = _against_flips(moves, 1.0, 100, np.random.default_rng(1))
    norms = _left_out_norms(moves)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4000**2 * 8 / 4
    signs = np.random.default_rng(1).choice([-1.0, 1.0], size=(100, 4000))
    assert nulls["median"] == pytest.approx(np.median(np.linalg.norm(signs @ moves / 4000, axis=1)))
    assert norms[7] == pytest.approx(np.linalg.norm(np.delete(moves, 7, 0).mean(0)))


def test_intervals_of_a_direction_are_the_jackknife_of_the_prompts():
    rm = model()
    acts = rl.capture(rm, PAIRS, ["L2.resid_post"])["L2.resid_post"].double()
    moves, u = (acts[::2] - acts[1::2]).numpy(), rm.readout.direction(acts[:1]).u[0].double().numpy()
    without = np.array([np.delete(moves, i, 0).mean(0) for i in range(6)])
    size = np.linalg.norm(without, axis=1)
    meta = bias_direction(rm, PAIRS).meta
    for key, left_out, to, back in (
        ("norm", size, np.log, np.exp),
        ("cosine_with_u", without @ u / size / np.linalg.norm(u), np.arctanh, np.tanh),
    ):
        x = to(left_out)
        half = 2.5705818 * np.sqrt(5 / 6 * ((x - x.mean()) ** 2).sum())  # t(5) at .975
        found = meta[key]
        np.testing.assert_allclose(
            [found["low"], found["high"]], back(to(found["value"]) + half * np.array([-1, 1])), atol=1e-7
        )
    assert -1 <= meta["reliability"]["low"] < meta["reliability"]["value"] < meta["reliability"]["high"] <= 1


def test_a_planted_edit_has_a_direction_that_pays_and_swapped_labels_have_none():
    rm = rl.RewardModel(*planted_model("keyword"), name="keyword")
    pairs = edited_texts(24, extra=f" {KEYWORD}")
    found = bias_direction(rm, pairs, n_boot=500).meta
    assert found["reliability"]["low"] > 0.8 and found["cosine_with_u"]["low"] > 0.5
    assert found["nulls"]["quantile"] == 1 and found["nulls"]["p"] == pytest.approx(1 / 501)
    assert found["norm"]["low"] > found["nulls"]["q95"]
    turned = [rl.Pair(p.prompt, p.rejected, p.chosen) if i % 2 else p for i, p in enumerate(pairs)]
    null = bias_direction(rm, turned, n_boot=500).meta
    assert null["reliability"]["low"] < 0.5 and null["norm"]["value"] < found["norm"]["value"] / 3
    assert null["nulls"]["p"] > 0.05
    back = bias_direction(rm, [rl.Pair(p.prompt, p.rejected, p.chosen) for p in pairs], n_boot=500)
    np.testing.assert_allclose(back.value, -bias_direction(rm, pairs, n_boot=500).value, atol=1e-12)
    assert back.meta["reliability"] == found["reliability"]


def test_a_direction_is_saved_drawn_and_repeated(tmp_path):
    result = bias_direction(model(), PAIRS, seed=3)
    again = bias_direction(model(), PAIRS, seed=3)
    assert again.meta == result.meta and again.value.equals(result.value)
    back = rl.load_result(result.save(tmp_path / "v.nc"))
    assert back.value.equals(result.value) and back.meta == result.meta
    assert rl.save_chart(result, tmp_path / "v.svg").stat().st_size > 1000
    number = f"{result.meta['reliability']['value']:.2f}"
    assert number in result.meta["shows"] and "reliability of 0.50" in result.meta["cannot_show"]
    assert edit_head(model(), back).edits[0]["rank"] == 1


@pytest.mark.parametrize(
    ("pairs", "settings", "message"),
    [
        (PAIRS[:5], {}, "5 different prompts.*at least 6"),
        ([rl.Pair(f"Say {i}", "yes", "yes") for i in range(6)], {}, "mean difference of zero over 6 prompts"),
        (PAIRS, {"depth": 4}, "depth=4.*0 to 3"),
        (PAIRS, {"n_splits": 10}, "n_splits=10.*at least 50"),
        (PAIRS, {"n_boot": 0}, "n_boot=0.*n_boot of at least 1"),
        (edited_texts(21), {"n_boot": 99}, "direction was not understood.*n_boot=99.*n_boot of at least 100"),
    ],
)
def test_no_direction(pairs, settings, message):
    with pytest.raises(rl.DataError, match=message):
        bias_direction(model(), pairs, **settings)


# --- the edited head -------------------------------------------------------------------------------------------------


@every
def test_the_edited_head_is_blind_to_the_directions_at_every_input(family, dtype):
    rm, v = model(family, dtype), vectors(2, seed=4)  # not centred: the norm does that
    edited = edit_head(rm, 3 * v)
    h = residuals(rm)
    tiny = 1e-6 if dtype == torch.float32 else 1e-13
    before, after = rm.readout.direction(h).u.double(), edited.readout.direction(h).u.double()
    assert ((before @ v.T).abs() > 1e-3).any()
    assert ((after @ v.T).abs() < tiny * before.norm(dim=1, keepdim=True)).all()
    # the same from the network's own parameters
    moved = h + 5 * v[0].to(h)
    row = edited.module.get_submodule(edited.structure.head).weight[0]
    size = (normed(rm, h) * row).abs().sum(-1)
    change = (normed(rm, moved, h) - normed(rm, h)) @ row
    assert (change.abs() < own_precision(family, dtype) * size).all()
    assert edited.edits[0]["left"] < tiny


@every
def test_adding_a_direction_pays_one_minus_alpha_of_what_it_paid(family, dtype):
    rm, v = model(family, dtype), vectors(2, seed=6)
    h = residuals(rm)
    moved = h + (2 * v[0] - 3 * v[1]).to(h)
    old = (normed(rm, moved, h) - normed(rm, h)) @ rm.head.weight[0]
    assert old.abs().max() > 0.1
    for alpha in (0.3, 2, -0.5):
        new = (normed(rm, moved, h) - normed(rm, h)) @ edit_head(rm, v, alpha).head.weight[0]
        torch.testing.assert_close(new, (1 - alpha) * old, rtol=0, atol=10 * own_precision(family, dtype))


@every
def test_no_alpha_no_change_and_orthogonal_edits_commute(family, dtype):
    rm, v = model(family, dtype), vectors(3, family)
    untouched = {key: x.clone() for key, x in rm.module.state_dict().items()}
    assert torch.equal(rewards(edit_head(rm, v, 0)), rewards(rm))
    one, other = edit_head(edit_head(rm, v[:1]), v[1:], 0.7), edit_head(edit_head(rm, v[1:], 0.7), v[:1])
    tiny = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(one.readout.weight, other.readout.weight, rtol=0, atol=tiny)
    assert [e["alpha"] for e in one.edits] == [1.0, 0.7] and one.edits[1]["model"] != rm.name
    assert all(torch.equal(untouched[key], x) for key, x in rm.module.state_dict().items()) and rm.edits == ()
    head = rm.structure.head + "."
    shared = {n: p.data_ptr() for n, p in rm.module.named_parameters() if not n.startswith(head)}
    assert shared == {n: p.data_ptr() for n, p in one.module.named_parameters() if not n.startswith(head)}
    assert not [m for m in one.module.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert one.config is not rm.config


@pytest.mark.parametrize("family", FAMILIES)
def test_the_edited_model_is_a_reward_model(family):
    rm = model(family)
    edited = edit_head(rm, vectors(2, seed=1), 0.8)
    parts = rl.contributions(edited, PAIRS)  # raises where they do not add up
    np.testing.assert_allclose(parts.value.sel(side="chosen").sum("component"), rewards(edited)[::2], atol=1e-5)
    for prompt, response in TEXTS[:3]:
        assert edited.score(prompt, response) == pytest.approx(edited.hf_score(prompt, response), abs=1e-5)
    scale = residuals(rm)
    expected = normed(rm, scale) @ edited.module.get_submodule(edited.structure.head).weight[0]
    torch.testing.assert_close(rewards(edited), expected.detach(), rtol=0, atol=1e-5)
    with pytest.raises(rl.DataError, match="not of these inputs and this model"):
        rl.accuracy(edited, PAIRS, rm.score_pairs(PAIRS))
    shift = edited.edits[0]["constant_shift"]
    assert (shift != 0) == (family in LAYER_NORM)
    w = edited.readout.weight - rm.readout.weight
    assert shift == pytest.approx(float(w @ rm.readout.norm.shift), abs=1e-6)


def test_only_the_span_counts():
    rm, v = model(), vectors(2)
    mixed = torch.stack([v[0] * 1e20, v[0] - 4 * v[1], v[1] * 1e-20, v[0] + v[1]])
    one, other = edit_head(rm, v), edit_head(rm, mixed)
    torch.testing.assert_close(one.readout.weight, other.readout.weight, rtol=0, atol=1e-7)
    assert (other.edits[0]["directions"], other.edits[0]["rank"]) == (4, 2)
    for form in (list(v), v.numpy(), [v[0].numpy(), v[1].float()]):
        torch.testing.assert_close(edit_head(rm, form).readout.weight, one.readout.weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(edit_head(rm, v[0]).readout.weight, edit_head(rm, v[:1]).readout.weight)


def test_of_several_rows_only_the_one_that_is_read_is_changed():
    rm = model("qwen2", num_labels=3)
    edited = edit_head(rm, vectors(1))
    old, new = rm.head.weight, edited.head.weight
    assert torch.equal(old[[0, 2]], new[[0, 2]]) and not torch.equal(old[1], new[1])
    assert edited.row == 1 and edited.edits[0]["row"] == 1
    other = edited.for_objective(0)
    assert torch.equal(rewards(other), rewards(rm.for_objective(0)))


def test_sixteen_bits_keep_what_the_checkpoint_can_hold():
    rm, v = model("llama", torch.bfloat16), vectors(1)
    edited = edit_head(rm, v)
    assert edited.head.weight.dtype == torch.bfloat16 and edited.edits[0]["head_dtype"] == "bfloat16"
    assert torch.equal(edited.readout.weight, edited.head.weight[0].float())
    u = edited.readout.direction(residuals(rm)).u.double()
    left = (u @ v[0]).abs() / rm.readout.direction(residuals(rm)).u.double().norm(dim=1)
    assert 1e-7 < float(left.max()) < 1e-2 and edited.edits[0]["left"] == pytest.approx(float(left.max()), rel=1e-3)
    assert torch.equal(rewards(edit_head(rm, v, 0)), rewards(rm))


def test_refused_edits():
    rm = model()
    u = rm.readout.direction(residuals(rm)[:1]).u[0]
    for bad, message in [
        (torch.ones(31), r"shape \(31,\) in direction 1.*32 finite numbers"),
        (torch.zeros(2, 32), "zeros only in direction 1"),
        ([torch.ones(32), torch.full((32,), torch.nan)], "NaN or infinite entries in direction 2"),
        ([], "no directions"),
        (["honesty"], "no numbers, but an object of type str in direction 1"),
        (3, "an object of type int"),
        (u, "Nothing of the reward would be left"),
        (rm.score_pairs(PAIRS), "a Result of score_pairs"),
        (bias_direction(rm, PAIRS, depth=1), "a direction at depth 1.*depth 3"),
        (bias_direction(model("gemma"), PAIRS), "a direction of gemma"),
    ]:
        with pytest.raises(rl.DataError, match=message):
            edit_head(rm, bad)
    with pytest.raises(rl.DataError, match="alpha=nan"):
        edit_head(rm, vectors(1), float("nan"))
    with pytest.raises(rl.DataError, match="constant vectors"):
        edit_head(model("gpt2"), 7 * torch.ones(32))
    module, tokenizer = tiny_model("llama", seed=1)
    module.model.norm.weight.data[3] = 1e-5
    with pytest.raises(rl.DataError, match="gain is too near 0"):
        edit_head(rl.RewardModel(module, tokenizer), vectors(1))


def test_a_direction_of_the_model_before_serves_the_edited_one():
    rm = model()
    direction = bias_direction(rm, PAIRS)
    twice = edit_head(edit_head(rm, direction, 0.5), direction, 0.5)
    expected = edit_head(rm, direction, 0.75)
    torch.testing.assert_close(twice.readout.weight, expected.readout.weight, rtol=0, atol=1e-6)
    assert edit_head(twice, bias_direction(twice, PAIRS)).edits[-1]["rank"] == 1


# --- what is left ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_report_against_residuals_changed_by_hand(family):
    rm, v = model(family), vectors(2, seed=5)
    v = torch.stack([v[0], v[0] + v[1]])
    edited = edit_head(rm, v)
    result = edit_report(rm, edited, 2 * v, PAIRS)
    assert result.value.dims == ("pair", "side", "direction", "route", "model")
    h, unit = residuals(rm).double(), v / v.norm(dim=1, keepdim=True)
    for name, span in [("1", unit[:1]), ("2", unit[1:]), ("all", torch.linalg.qr(v.T)[0].T)]:
        without = (h - h @ span.T @ span).float()
        for label, m in (("before", rm), ("after", edited)):
            row = m.module.get_submodule(m.structure.head).weight[0]
            total = ((normed(rm, without) - normed(rm, h.float())) @ row).detach().numpy()
            cell = result.value.sel(direction=name, model=label)
            np.testing.assert_allclose(cell.sel(route="total", side="chosen"), total[::2], atol=2e-5)
            np.testing.assert_allclose(cell.sel(route="total", side="margin"), total[::2] - total[1::2], atol=4e-5)
    parts = result.value.sel(route=["direct", "scale"]).sum("route")
    np.testing.assert_allclose(parts, result.value.sel(route="total"), atol=2e-5)
    after = result.value.sel(model="after")
    assert np.abs(after.sel(route="direct")).max() < 1e-5 < 1e-3 < np.abs(after.sel(route="scale")).max()
    assert result.mean is not None and result.meta["edited"] == edited.name


def test_the_report_is_of_one_trunk_and_can_be_kept(tmp_path):
    rm, v = model(), vectors(2)
    with pytest.raises(rl.CheckFailed, match="same trunk"):
        edit_report(rm, rl.RewardModel(*tiny_model("llama", seed=5)), v, PAIRS)
    result = edit_report(rm, edit_head(rm, v, 0.5), v, PAIRS)
    half = result.value.sel(route="direct")
    np.testing.assert_allclose(half.sel(model="after"), half.sel(model="before") / 2, atol=1e-6)
    assert rl.load_result(result.save(tmp_path / "r.nc")).value.equals(result.value)
    assert rl.save_chart(result, tmp_path / "r.svg").stat().st_size > 1000


# --- erasure ---------------------------------------------------------------------------------------------------------


def leace(x: np.ndarray, z: np.ndarray, tolerance: float) -> np.ndarray:
    """r(x) = x - S^(1/2) P S^(-1/2) (x - m), matrix by matrix."""
    mean = x.mean(0)
    sigma, shared = np.cov(x.T, bias=True), (x - mean).T @ (z - z.mean()) / len(x)
    values, axes = np.linalg.eigh(sigma)
    kept = values > tolerance * values.max()
    root = axes[:, kept] * np.sqrt(values[kept]) @ axes[:, kept].T
    whiten = axes[:, kept] / np.sqrt(values[kept]) @ axes[:, kept].T
    a = whiten @ shared
    projector = np.outer(a, a) / (a @ a)
    return x - (x - mean) @ (root @ projector @ whiten).T


@pytest.mark.parametrize("n", [8, 40])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_after_erasure_the_reward_does_not_covary_with_the_edit(family, n):
    rm, pairs = model(family), edited_texts(n)
    erased = erase_concept(rm, pairs)
    texts = [(p.prompt, r) for p in pairs for r in p.responses]
    z = np.tile([1.0, 0.0], n)
    old, new = rewards(rm, texts).double().numpy(), rewards(erased, texts).double().numpy()
    record = erased.edits[0]
    assert np.cov(old, z, bias=True)[0, 1] == pytest.approx(record["covariance_before"], abs=1e-5)
    assert abs(record["covariance_before"]) > 1e-3
    assert abs(np.cov(new, z, bias=True)[0, 1]) < 1e-5 and abs(record["covariance_after"]) < 1e-5
    assert abs(erased.score_pairs(pairs).value.sel(side="margin").mean()) < 4e-5
    x = normed(rm, residuals(rm, texts)).detach().double().numpy()
    states = leace(x, z, 1e-6)
    w = rm.head.weight[0].detach().double().numpy()
    assert np.linalg.norm((states - states.mean(0)).T @ (z - 0.5)) / len(x) < 1e-6
    expected = states @ w
    np.testing.assert_allclose(new[::2] - new[1::2], expected[::2] - expected[1::2], atol=5e-5)
    assert record["rank"] <= min(32, 2 * n - 1) and (record["rank"] == 32 - (family in LAYER_NORM)) == (n == 40)
    assert rm.head.bias is None and erased.head.bias is None
    np.testing.assert_allclose(new + record["constant_shift"], expected, atol=1e-4)


def test_a_head_with_a_bias_keeps_the_constant():
    module, tokenizer = tiny_model("llama", seed=2)
    head = torch.nn.Linear(32, 1)
    head.weight.data, head.bias.data = module.score.weight.data, torch.tensor([0.7])
    module.score = head
    rm, pairs = rl.RewardModel(module, tokenizer, name="llama"), edited_texts(10)
    erased = erase_concept(rm, pairs)
    assert erased.edits[0]["constant_shift"] == 0.0 and rm.head.bias.item() == pytest.approx(0.7)
    texts = [(p.prompt, r) for p in pairs for r in p.responses]
    x = normed(rm, residuals(rm, texts)).detach().double().numpy()
    expected = leace(x, np.tile([1.0, 0.0], 10), 1e-6) @ head.weight[0].detach().double().numpy() + 0.7
    np.testing.assert_allclose(rewards(erased, texts), expected, atol=1e-4)
    assert edit_head(rm, vectors(1)).head.bias.item() == pytest.approx(0.7)


def test_nothing_to_erase():
    with pytest.raises(rl.DataError, match="5 different prompts.*at least 6"):
        erase_concept(model(), PAIRS[:5])
    with pytest.raises(rl.DataError, match="nothing to erase.*same mean state"):
        erase_concept(model(), [rl.Pair(f"Say {i}", "yes", "yes") for i in range(6)])


# --- the choice of alpha ---------------------------------------------------------------------------------------------


def guard_pairs(n: int, repeats: int = 1) -> list[rl.Pair]:
    rng = np.random.default_rng(11)
    texts = [[" ".join(rng.choice(WORDS, 3)) for _ in range(2)] for _ in range(n)]
    return [rl.Pair(f"Guard {i // repeats}", *both) for i, both in enumerate(texts)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_alpha_is_the_edited_model(family, dtype):
    rm, dev, guard = model(family, dtype), edited_texts(8), guard_pairs(30, repeats=2)
    v = bias_direction(rm, edited_texts(12, seed=1))
    result = select_alpha(rm, [v], dev, guard, [0, 0.5, 2], margin=0.4)
    assert result.value.dims == ("pair", "alpha") and result.meta["guard"]["n_prompts"] == 15
    before = (np.sign(rm.score_pairs(guard).value.sel(side="margin").values) + 1) / 2
    for alpha in (0, 0.5, 2):
        edited = edit_head(rm, v, alpha)
        shift = edited.score_pairs(dev).value.sel(side="margin").values
        cell = result.value.sel(alpha=alpha)
        np.testing.assert_allclose(cell, shift, atol=1e-5 if dtype == torch.float32 else 1e-2)
        over = stats.mean_interval(cell.values, [p.prompt_key for p in dev])
        assert float(result.mean.sel(alpha=alpha)) == pytest.approx(over.mean)
        assert float(result.low.sel(alpha=alpha)) == pytest.approx(over.low)
        after = (np.sign(edited.score_pairs(guard).value.sel(side="margin").values) + 1) / 2
        if dtype == torch.float32:
            assert float(cell["accuracy"]) == pytest.approx(after.mean())
            assert float(cell["accuracy_change"]) == pytest.approx((after - before).mean())
            assert float(cell["gains"] - cell["losses"]) == pytest.approx((after - before).mean())
    still = result.value.sel(alpha=0)
    assert float(still["accuracy_change_low"]) == float(still["accuracy_change_high"]) == 0 and int(still["allowed"])


def test_the_allowed_alpha_with_the_smallest_shift_is_chosen():
    rm = rl.RewardModel(*planted_model("keyword"), name="keyword")
    extra = f" {KEYWORD}"
    train, dev = edited_texts(20, 1, extra), edited_texts(10, 2, extra)
    # What the rule pays for is what the labels are about, or is not: then the edit costs accuracy, or nothing.
    costly = [rl.Pair(f"Guard {i}", p.chosen, p.rejected) for i, p in enumerate(edited_texts(80, 3, extra))]
    v = bias_direction(rm, train)
    held = select_alpha(rm, v, dev, costly)
    assert held.value["alpha"].values.tolist() == np.linspace(0, 2, 9).tolist()
    shifts = held.mean.values
    allowed = held.value["allowed"].values == 1
    assert allowed[0] and not allowed[-1]
    np.testing.assert_array_equal(allowed, held.value["accuracy_change_low"] > -0.05)
    assert held.meta["alpha"] == held.value["alpha"].values[allowed][np.abs(shifts[allowed]).argmin()]
    free = [rl.Pair(p.prompt, p.rejected, p.chosen) for p in costly]
    taken = select_alpha(rm, v, dev, free)
    assert taken.value["allowed"].values.all() and taken.meta["alpha"] >= 0.75
    assert taken.meta["alpha"] == taken.value["alpha"].values[np.abs(shifts).argmin()]
    assert abs(shifts).min() < abs(shifts[0]) / 4 and f"alpha {taken.meta['alpha']:g}" in taken.meta["reason"]
    none = select_alpha(rm, v, dev, costly, [2.0])
    assert none.meta["alpha"] is None and "no alpha is allowed" in none.meta["reason"]
    counted = {c.name: c.gap for c in select_alpha(rm, v, train, costly).checks}
    assert counted["prompts of the directions in dev or guard"] == 20


def test_an_alpha_is_allowed_where_the_interval_of_its_change_ends_within_the_margin():
    rm, dev, guard = model(), edited_texts(6), guard_pairs(80)
    low = select_alpha(rm, vectors(3), dev, guard, [0.5, 1, 2]).value["accuracy_change_low"].values
    assert (low < -0.06).all() and len(set(low)) == 3
    for margin in (*(-low - 1e-6), *(-low + 1e-6)):
        result = select_alpha(rm, vectors(3), dev, guard, [0.5, 1, 2], float(margin))
        np.testing.assert_array_equal(result.value["allowed"], low > -margin)
        assert (result.meta["alpha"] is None) == (not (low > -margin).any())
    with_none = select_alpha(rm, vectors(3), dev, guard, [0, 0.5, 1, 2], 0.06)
    assert with_none.meta["alpha"] == 0 and "no alpha that changes the head is allowed" in with_none.meta["reason"]


def test_the_interval_of_a_change_in_accuracy():
    prompts = np.arange(80)
    nothing = paired_change(np.zeros(80), prompts)
    assert nothing[2] == -stats.wilson(0, 80)[1] == -nothing[3]
    lost = np.where(prompts < 8, -1.0, 0.0)
    assert paired_change(lost, prompts)[:2] == (0.0, 0.1)
    low, high = paired_change(lost, prompts)[2:]
    np.testing.assert_allclose(paired_change(-lost, prompts)[2:], (-high, -low))
    assert low < -0.1 < high < 0
    wide = paired_change(np.repeat(lost, 3), np.repeat(prompts, 3))  # three pairs that say the same add nothing
    np.testing.assert_allclose(wide[2:], (low, high), atol=5e-3)
    assert paired_change(np.full(6, -1.0), np.arange(6))[2] == pytest.approx(-1, abs=1e-9)
    for margin in (0.02, 0.05, 0.1):
        n = _needed(margin)
        assert stats.wilson(0, n)[1] < margin <= stats.wilson(0, n - 1)[1]


@pytest.mark.parametrize(
    ("dev", "guard", "settings", "message"),
    [
        (edited_texts(8), [*guard_pairs(80), rl.Pair("Say 0 3", "a", "b")], {}, "1 prompts in dev and in guard"),
        (edited_texts(5), guard_pairs(80), {}, "5 different prompts.*at least 6"),
        (edited_texts(6), guard_pairs(72), {}, "72 different prompts in 72 pairs.*at least 73 prompts"),
        (edited_texts(6), guard_pairs(5), {"margin": 0.9}, "5 different prompts in 5 pairs.*at least 6 prompts"),
        (edited_texts(6), guard_pairs(140, repeats=2), {}, "70 different prompts in 140 pairs, worth 70 prompts"),
        (edited_texts(6), [*guard_pairs(77), *guard_pairs(8) * 4], {}, "77 different prompts in 109 pairs, worth 44"),
        (edited_texts(6), guard_pairs(80), {"alphas": [0, 0]}, "different finite alphas"),
        (edited_texts(6), guard_pairs(80), {"margin": 0.0}, "margin=0.0"),
    ],
)
def test_no_choice(dev, guard, settings, message):
    with pytest.raises(rl.DataError, match=message):
        select_alpha(model(), vectors(1), dev, guard, **settings)


# --- the checkpoint --------------------------------------------------------------------------------------------------

CASES = [("llama", 1, False), ("llama", 1, True), ("gpt2", 1, True), ("qwen2", 3, True), ("gemma", 2, False)]


@pytest.mark.parametrize(("family", "labels", "tie"), CASES)
def test_plain_transformers_load_the_edited_model(family, labels, tie, tmp_path):
    module, tokenizer = tiny_model(family, num_labels=labels, tie=tie)
    rm = rl.RewardModel(module, tokenizer, name=family, objective=labels - 1)
    edited = edit_head(edit_head(rm, vectors(2)), vectors(1, seed=9), 0.5)
    config = json.dumps(rm.config.to_dict(), default=str), json.dumps(edited.config.to_dict(), default=str)
    folder = edited.save_pretrained(tmp_path / "new" / "model")
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    plain_tokenizer = AutoTokenizer.from_pretrained(folder)
    for prompt, response in TEXTS:
        text = rm.tokenize(prompt, response)
        messages = rl.Pair(prompt, response, "").messages + [{"role": "assistant", "content": response}]
        ids = plain_tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert tuple(ids) == text.ids
        with torch.no_grad():
            logits = plain(torch.tensor([ids])).logits[0]
            ours = edited.module(torch.tensor([ids])).logits[0]
            theirs = rm.module(torch.tensor([ids])).logits[0]
        assert torch.equal(logits, ours)
        assert float(logits[-1]) == pytest.approx(edited.score(prompt, response), abs=1e-5)
        assert torch.equal(logits[:-1], theirs[:-1]) and logits[-1] != theirs[-1]
    state, original = plain.state_dict(), rm.module.state_dict()
    assert state.keys() == original.keys()
    changed = [key for key in state if not torch.equal(state[key], original[key])]
    assert changed == [rm.structure.head + ".weight"]
    assert (json.dumps(rm.config.to_dict(), default=str), json.dumps(edited.config.to_dict(), default=str)) == config
    reloaded = rl.load(folder, objective=labels - 1 if labels > 1 else None)
    assert torch.equal(rewards(reloaded), rewards(edited))


def test_the_card_says_what_was_changed(tmp_path):
    rm, pairs = model(), edited_texts(8)
    edited = erase_concept(edit_head(rm, vectors(2), 0.5), pairs)
    text = (edited.save_pretrained(tmp_path) / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\nlibrary_name: transformers")
    for words in ("edits of the head: 2", "| alpha | 0.5 |", "| directions removed | 2 |", "Edit 2: erase_concept"):
        assert words in text
    version = edited.surroundings()["versions"]["reward-lens"]
    assert f"reward-lens {version}" in text and f"{edited.edits[0]['weight_norm_before']:.6g}" in text
    record = json.loads(text.split("```json\n")[1].split("\n```")[0])
    assert record == list(edited.edits)
    assert "No weight was changed" in (rm.save_pretrained(tmp_path / "same") / "README.md").read_text(encoding="utf-8")


def test_nothing_is_overwritten(tmp_path):
    kept = tmp_path / "notes.txt"
    kept.write_text("mine", encoding="utf-8")
    for path, found in ((tmp_path, "a folder that is not empty"), (kept, "a file of that name")):
        with pytest.raises(rl.DataError, match=found):
            model().save_pretrained(path)
    assert kept.read_text(encoding="utf-8") == "mine" and list(tmp_path.iterdir()) == [kept]
