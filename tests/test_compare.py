"""Comparison of models: identities, figures counted by hand, simulated intervals, and models that come and go."""

import copy
import gc
import json
import tracemalloc
import weakref

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import cohen_kappa_score
from tokenizers import Tokenizer

import reward_lens as rl
from families import tiny_model, tiny_tokenizer
from planted import planted_pairs
from reward_lens.errors import DataError
from reward_lens.methods.comparison import compared_scores as scores
from reward_lens.methods.comparison import compared_states as states
from reward_lens.methods.comparison.compare import compare, compare_checkpoints, disagreements
from reward_lens.methods.comparison.compared_curves import compared_curves
from reward_lens.methods.comparison.model_summary import summaries
from reward_lens.model.head import with_row
from ruled import Ruled, noise, text_of

CORRELATIONS = ["reward pearson", "reward spearman", "margin pearson", "margin spearman"]
INSIDE = ["lens", "contributions", "cka prompts", "cka differences", "reward angle"]


@pytest.fixture(scope="module")
def pairs():
    """Short texts, a pair a prompt."""
    found = rl.data.as_pairs([rl.Pair(*texts) for texts in planted_pairs("length", 12)])
    assert found.n_prompts == 12
    return found


def model(seed=0, family="llama", name=None, **options):
    module, tokenizer = tiny_model(family, seed=seed, **options)
    return rl.RewardModel(module, tokenizer, name=name or f"{family} {seed}")


@pytest.fixture(scope="module")
def llama():
    return model()


def bytes_only():
    """A tokenizer that merges nothing: more tokens for the same text."""
    tokenizer = tiny_tokenizer(add_bos=False, chat_template="chatml")
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["model"]["merges"] = []
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend))
    return tokenizer


@pytest.fixture(scope="module")
def different(pairs, llama):
    """A llama, another one, and a gemma2 of more layers with another tokenizer."""
    gemma = model(1, "gemma2", n_layers=5, tokenizer=bytes_only())
    return compare({"a": llama, "b": model(3), "g": gemma}, pairs, n_permutations=49)


def test_a_model_beside_itself(pairs, llama):
    pairs = pairs[:6]
    result = compare({"one": llama, "two": llama}, pairs, ("lens", "contributions", "states", "effects"), ["pad_4"])
    value = result.value.isel(models=0)
    np.testing.assert_allclose(value.sel(measure=[*CORRELATIONS, *INSIDE, "effects", "agreement"]), 1.0, atol=1e-6)
    assert value["alignment"] == pytest.approx(1)
    for name in ("lens", "contributions", "effects", "probes"):
        curves = compared_curves(result, name)
        apart = curves.dataset.sel(curve="one minus two")
        for key in ("value", "low", "high"):
            assert not apart[key].values.any(), (name, key)
    lens = compared_curves(result, "lens")
    np.testing.assert_allclose(lens.value.isel(depth=-1, curve=[0, 1]), 1.0, atol=1e-5)
    caused = [rl.effects(llama, pairs, ["L0.attn", "L1.attn", "L2.attn"], mode).value for mode in ("noise", "denoise")]
    margins = llama.score_pairs(pairs).value.sel(side="margin").values
    share = (np.sign(margins)[:, None] * (caused[0] + caused[1]).values / 2).sum(0) / np.abs(margins).sum()
    found = compared_curves(result, "effects").value.sel(curve="one", part="attn")
    np.testing.assert_allclose(found, share, atol=1e-5)
    at = compared_curves(result, "states").value.values
    assert np.isnan(at[..., 0]).all()  # every text ends in the same token
    np.testing.assert_allclose(at[..., 2:], 1.0, atol=1e-6)


def test_a_reward_has_no_scale_and_no_origin(pairs, llama):
    def rescaled():
        rm = with_row(llama, 3 * llama.readout.weight, {"method": "test"})
        rm.readout = type(rm.readout)(rm.readout.norm, rm.readout.weight, rm.readout.bias + 2, rm.readout.objective)
        return rm

    other = model(3)
    plain, scaled = (compare({"a": m, "b": other}, pairs, n_permutations=0) for m in (llama, rescaled))
    for key in ("value", "low", "high"):
        np.testing.assert_allclose(plain.dataset[key], scaled.dataset[key], atol=2e-4)


def test_a_head_turned_round(pairs, llama):
    turned = with_row(llama, -llama.readout.weight, {"method": "test"})
    result = compare({"a": llama, "turned": turned}, pairs, n_permutations=19)
    value = result.value.isel(models=0)
    assert value.sel(measure="agreement") == 0
    wanted = [*CORRELATIONS, "lens", "contributions", "reward angle"]
    np.testing.assert_allclose(value.sel(measure=wanted), -1.0, atol=1e-6)
    np.testing.assert_allclose(value.sel(measure=["cka prompts", "cka differences"]), 1.0, atol=1e-6)
    assert set(value["p"].sel(measure=["cka prompts", "cka differences"]).values) == {1 / 20}


def test_on_one_trunk_the_angle_is_the_correlation_of_rewards(pairs, llama):
    row = llama.readout.weight + torch.randn(llama.d_model, generator=torch.Generator().manual_seed(0))
    result = compare({"a": llama, "edited": with_row(llama, row, {"method": "test"})}, pairs, ("states",))
    cells = result.dataset.isel(models=0).sel(measure=["reward angle", "reward pearson"])
    for key in ("value", "low", "high"):
        assert cells[key][0] == pytest.approx(float(cells[key][1]), abs=1e-4)
    assert 0 < float(cells["value"][0]) < 1


def test_order_of_models(different, pairs, llama):
    turned = compare({"b": model(3), "a": llama}, pairs, n_permutations=0)
    forth, back = (r.dataset.isel(models=0) for r in (different, turned))
    for key in ("value", "low", "high"):
        np.testing.assert_allclose(forth[key], back[key], atol=1e-12)
    assert different.value["models"].values.tolist() == ["a ~ b", "a ~ g", "b ~ g"]


def test_families_tokenizers_and_depths_that_differ(different):
    about = different.meta["models"]
    assert about["a"]["tokens"]["chosen"] < about["g"]["tokens"]["chosen"] and about["g"]["n_layers"] == 5
    value = different.value
    angle = value.sel(measure="reward angle")
    assert np.isnan(angle).all() and (np.abs(angle["alignment"]) < 0.5).all()
    assert "no versions of each other" in str(angle["reason"].values[0])
    assert np.isfinite(value.drop_sel(measure="reward angle")).all()
    assert different.meta["settings"]["n_bins"] == 3
    assert (
        ((different.low <= value) & (value <= different.high))
        .where(different.low.notnull(), True)
        .where(value.notnull(), True)
        .all()
    )


def test_measures_by_independent_tools(different, pairs, llama):
    margins = different.meta["pairs"]["margins"]
    a, b = (np.array(margins[k]) for k in "ab")
    cell = different.value.isel(models=0)
    assert cell.sel(measure="margin pearson") == pytest.approx(pearsonr(a, b)[0])
    assert cell.sel(measure="margin spearman") == pytest.approx(spearmanr(a, b)[0])
    assert cell.sel(measure="agreement") == pytest.approx(np.mean((a > 0) == (b > 0)))
    assert cell.sel(measure="kappa") == pytest.approx(cohen_kappa_score(a > 0, b > 0))
    assert cell["expected"].sel(measure="agreement") == pytest.approx(
        np.mean(a > 0) * np.mean(b > 0) + np.mean(a < 0) * np.mean(b < 0)
    )
    np.testing.assert_allclose(a, llama.score_pairs(pairs).value.sel(side="margin"), atol=1e-6)
    # A prompt with one pair: its two deviations are half the margin either way.
    assert cell.sel(measure="reward pearson") == pytest.approx(a @ b / np.sqrt(a @ a * (b @ b)))
    lens = rl.reward_lens(llama, pairs).value.sel(side="margin").values
    share = (lens * np.sign(a)[:, None]).sum(0) / np.abs(a).sum()
    np.testing.assert_allclose(compared_curves(different, "lens").value.sel(curve="a"), share, atol=1e-6)
    found = compared_curves(different, "contributions").value.sel(curve="a", part="mlp")
    writes = rl.contributions(llama, pairs).value.sel(side="margin", component=["L0.mlp", "L1.mlp", "L2.mlp"]).values
    np.testing.assert_allclose(found, (writes * np.sign(a)[:, None]).sum(0) / np.abs(a).sum(), atol=1e-6)


def test_disagreements(different):
    table = disagreements(different, "a", "b")
    assert (np.sign(table["a"]) * np.sign(table["b"]) == -1).all() and (np.diff(table["gap"]) <= 0).all()
    share = float(different.value.sel(models="a ~ b", measure="agreement"))
    assert len(table) == round((1 - share) * 12)
    assert len(disagreements(different, n=1)) == 1
    with pytest.raises(DataError, match="nothing to list"):
        disagreements(different, "a", "nobody")
    with pytest.raises(DataError, match="nothing to list"):
        disagreements(compared_curves(different, "lens"))


def test_saved_and_read_back(different, tmp_path):
    back = rl.load_result(different.save(tmp_path / "compared.nc"))
    assert back.dataset.equals(different.dataset) and back.meta == different.meta
    assert compared_curves(back, "states").dataset.equals(compared_curves(different, "states").dataset)
    assert disagreements(back).equals(disagreements(different))
    with pytest.raises(DataError, match="no curves 'effects'"):
        compared_curves(back, "effects")
    repr(back)


def test_clones_are_no_evidence(pairs):
    models = {"a": Ruled(noise(0)), "b": Ruled(noise(1))}
    cloned = [rl.Pair(p.prompt, p.chosen, p.rejected) for p in pairs for _ in range(3)]
    once, thrice = (compare(models, some, ()) for some in (pairs, cloned))
    for key in ("value", "low", "high"):
        np.testing.assert_array_equal(once.dataset[key], thrice.dataset[key])
    assert [c.gap for c in thrice.checks if c.name == "repeated pairs"] == [24]
    # More pairs of the same prompts that say the same add nothing to the interval of a correlation.
    rng = np.random.default_rng(0)
    x, y, prompts = rng.normal(size=10), rng.normal(size=10), np.arange(10)
    for figure in (scores.correlation, scores.uncentred_correlation, scores.kappa):
        alone, twice = figure(x, y, prompts), figure(*(np.tile(v, 2) for v in (x, y, prompts)))
        assert (alone.value, alone.low, alone.high) == pytest.approx((twice.value, twice.low, twice.high))


def test_one_model_in_memory_at_a_time(pairs):
    alive, met = [], []

    def loader(seed):
        def load():
            gc.collect()
            met.append(sum(ref() is not None for ref in alive))
            rm = model(seed)
            alive.append(weakref.ref(rm.module))
            return rm

        return load

    result = compare({"a": loader(0), "b": loader(3), "c": loader(4)}, pairs[:3], probes=["pad_1"], n_permutations=0)
    assert met == [0, 0, 0]
    assert result.value.sizes == {"models": 3, "measure": 11}


def test_prompts_with_several_pairs_of_shared_responses(llama):
    """Every response counts once for its prompt, however many pairs it is in."""
    texts = {f"Question {i}": [f"{word} {i}" for word in ("yes", "no way", "perhaps it is")] for i in range(7)}
    pairs = [rl.Pair(q, r[i], r[j]) for q, r in texts.items() for i, j in ((0, 1), (1, 2), (0, 2))]
    other = model(3)
    result = compare({"a": llama, "b": other}, pairs, ("states",), n_permutations=0)
    rewards = np.array([[[m.score(q, t) for t in r] for q, r in texts.items()] for m in (llama, other)])
    away = (rewards - rewards.mean(2, keepdims=True)).reshape(2, -1)
    cell = result.value.sel(measure="reward pearson")
    assert float(cell[0]) == pytest.approx(np.sum(away[0] * away[1]) / np.sqrt(np.prod((away**2).sum(1))), abs=1e-5)
    assert (int(cell["n"][0]), int(cell["n_prompts"][0])) == (21, 7)
    kept = summaries({"a": llama, "b": other}, rl.data.as_pairs(pairs), ("states",), None)[0].states
    h = rl.capture(llama, [(q, t) for q, r in texts.items() for t in r], ["L2.resid_post"])["L2.resid_post"]
    h = h.reshape(7, 3, -1)
    np.testing.assert_allclose(kept.prompts[-1], h.mean(1), atol=1e-5)
    np.testing.assert_allclose(kept.differences[-1], (h[:, 0] - h[:, 2]) * 2 / 3, atol=1e-5)
    np.testing.assert_allclose(kept.scaled @ kept.row, away[0], atol=1e-4)
    of_depth = rl.capture(llama, [(q, t) for q, r in texts.items() for t in r], ["L0.resid_post"])["L0.resid_post"]
    np.testing.assert_allclose(kept.prompts[3], of_depth.reshape(7, 3, -1).mean(1), atol=1e-5)


def test_a_folder_is_loaded(pairs, llama, tmp_path):
    folder = llama.save_pretrained(tmp_path / "saved")
    result = compare([llama, folder], pairs[:6], ())
    assert result.value["models"].values.tolist() == [f"llama 0 ~ {folder}"]
    np.testing.assert_allclose(result.value.sel(measure=CORRELATIONS), 1.0, atol=1e-6)


def test_probes_side_by_side(pairs):
    models = {"a": Ruled(lambda t: 0.25 * len(t.response)), "b": Ruled(noise(1))}
    result = compare(models, pairs, (), ["pad_4", "exclaim"])
    assert set(result.value["measure"].values.tolist()) == {*CORRELATIONS, "agreement", "kappa"}
    curves = compared_curves(result, "probes").value
    alone = rl.probe_hacking(models["a"], pairs, ["pad_4", "exclaim"])
    np.testing.assert_allclose(curves.sel(curve="a"), alone.value["shift_sd"], rtol=1e-6)
    np.testing.assert_allclose(curves.sel(curve="a minus b"), curves.sel(curve="a") - curves.sel(curve="b"), atol=1e-9)


def test_probes_of_as_many_prompts_as_are_resampled():
    pairs = [rl.Pair(*texts) for texts in planted_pairs("length", 24)]
    models = {"a": Ruled(lambda t: 0.25 * len(t.response)), "b": Ruled(noise(1))}
    curves = compared_curves(compare(models, pairs, (), ["pad_4"]), "probes")
    alone = rl.probe_hacking(models["a"], pairs, ["pad_4"])
    np.testing.assert_allclose(curves.value.sel(curve="a"), alone.value["shift_sd"], rtol=1e-6)
    assert (curves.low < curves.value).sel(curve="b").all()


def test_a_difference_of_probes_counts_what_the_models_sds_differ_by_chance():
    """Bold is worth 1 to every model, the rest is noise of the text: with the SDs held no interval holds 0."""

    def model(salt: int) -> Ruled:
        def rule(tokens) -> float:
            text = text_of(tokens)
            return ("**" in text) + float(np.random.default_rng([salt, *text.replace("**", "").encode()]).normal())

        return Ruled(rule)

    pairs, held = rl.load_pairs("demo")[:16], 0
    for i in range(4):
        result = compare({"a": model(2 * i), "b": model(2 * i + 1)}, pairs, (), ["add_bold"])
        difference = compared_curves(result, "probes").sel(curve="a minus b", probe="add_bold")
        held += bool(difference.low <= 0 <= difference.high)
    assert held >= 3


def trained(llama, size, seed=0):
    """A copy whose every parameter has moved."""
    rm = copy.deepcopy(llama.module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in rm.parameters():
            p.add_(size * p.std() * torch.randn(p.shape, generator=generator)) if p.numel() > 1 else None
    return rl.RewardModel(rm, llama.tokenizer.hf, name=f"moved {size}")


def test_checkpoints(pairs, llama):
    models = [llama, trained(llama, 0.02), trained(llama, 0.2)]
    result = compare_checkpoints(models, pairs, steps=[0, 10, 100], n_permutations=9)
    value = result.value
    assert value["step"].values.tolist() == [0, 10, 100]
    own = value.sel(step=0)
    same = [*CORRELATIONS, "agreement", "reward sd ratio", "cka prompts", "reward angle"]
    np.testing.assert_allclose(own.sel(measure=same), 1.0, atol=1e-6)
    assert own.sel(measure="accuracy change") == 0
    for measure in ("reward pearson", "cka prompts", "reward angle"):
        near, far = value.sel(measure=measure, step=[10, 100]).values
        assert far < near < 1
    accuracy = [float(rl.accuracy(m, pairs).value.sel(subset="all", rule="reward model")) for m in models]
    np.testing.assert_allclose(value.sel(measure="accuracy"), accuracy)
    np.testing.assert_allclose(value.sel(measure="accuracy change"), np.array(accuracy) - accuracy[0], atol=1e-12)
    last = compare_checkpoints(models, pairs, against="last", n_permutations=0).value
    assert last.sel(measure="reward pearson")[-1] == pytest.approx(1)
    assert last.sel(measure="reward pearson")[0] == pytest.approx(float(value.sel(measure="reward pearson")[-1]))
    with pytest.raises(DataError, match="steps do not go"):
        compare_checkpoints(models, pairs, steps=[0, 10, 10])
    named = {f"run/checkpoint-{step}": model for step, model in zip((1000, 500), models, strict=False)}
    with pytest.raises(DataError, match=r"steps \[1000, 500\].*in the order of training"):  # as sorted by name
        compare_checkpoints(named, pairs)
    by_step = compare_checkpoints(dict(reversed(named.items())), pairs, profiles=(), n_permutations=0)
    assert by_step.value["step"].values.tolist() == [500, 1000]


def test_models_that_are_alike_are_found_to_be(pairs, llama):
    """Twelve tests of four models, as of seven checkpoints, need more permutations than 199 for a p under .05."""
    result = compare({name: model(name=name) for name in "abcd"}, pairs, ("states", "lens"))
    p = result.value["p_holm"].sel(measure=["cka prompts", "cka differences"])
    assert p.size == 12 and (p < 0.05).all() and result.meta["settings"]["n_permutations"] == 240
    assert (result.high.sel(measure="lens") <= 1).all()
    run = compare_checkpoints([llama, model(3), model(name="again")], pairs, n_permutations=9)
    p = run.value["p"].sel(measure="cka prompts")
    assert np.isnan(p[0]) and p[2] == 0.1


@pytest.mark.parametrize(
    ("models", "found"),
    [
        ({"a": "demo"}, "1 model"),
        ({}, "0 model"),
        ("demo", "one str"),
        (3, "one int"),
        (["demo", "demo"], "'demo' more than once"),
        ({"a": "demo", "": "demo"}, "without a name"),
        ({"a": "demo", "b": 3}, "a int"),
    ],
)
def test_models_that_cannot_be_compared(models, found, pairs):
    with pytest.raises(DataError, match=found):
        compare(models, pairs)


def test_other_bad_input(pairs, llama):
    with pytest.raises(DataError, match="no pairs"):
        compare({"a": llama, "b": llama}, [])
    with pytest.raises(DataError, match="not understood"):
        compare({"a": llama, "b": llama}, pairs, ("lens", "dreams"))
    with pytest.raises(DataError, match="loaded no reward model"):
        compare({"a": dict, "b": llama}, pairs)
    few = compare({"a": llama, "b": model(3)}, pairs[:5], n_permutations=9)
    assert np.isnan(few.low).all() and np.isnan(few.high).all() and np.isnan(few.value["p"]).all()
    assert "5 prompts" in str(few.value["reason"].values[0, 0])
    one = compare({"a": llama, "b": model(3)}, pairs[:1], n_permutations=9)
    assert (
        np.isfinite(one.value.sel(measure="agreement")).all()
        and np.isnan(one.value.sel(measure="margin pearson")).all()
    )


# --- the figures by themselves ------------------------------------------------------------------------------


def test_debiased_cka_against_the_definition():
    """Song's unbiased HSIC, written out, also with every row left out in turn."""

    def hsic(x, y):
        k, ll = (v @ v.T for v in (x, y))
        n = len(k)
        for g in (k, ll):
            np.fill_diagonal(g, 0)
        one = np.ones(n)
        cross = one @ k @ ll @ one
        return (np.trace(k @ ll) + k.sum() * ll.sum() / ((n - 1) * (n - 2)) - 2 * cross / (n - 2)) / (n * (n - 3))

    def cka(x, y):
        return hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))

    rng = np.random.default_rng(0)
    x = rng.normal(size=(9, 4)) + 3
    y = x[:, :2] @ rng.normal(size=(2, 6)) + 0.5 * rng.normal(size=(9, 6))
    found = states.debiased_cka(x, y)
    assert found.value == pytest.approx(cka(x, y))
    left = np.array([cka(np.delete(x, i, 0), np.delete(y, i, 0)) for i in range(9)])
    low, high = scores.jackknife(np.arctanh(found.value), np.arctanh(left))
    assert (found.low, found.high) == pytest.approx((np.tanh(low), np.tanh(high)))
    turn, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    assert states.debiased_cka(5 * x @ turn + 100, y).value == pytest.approx(found.value)
    assert states.debiased_cka(np.ones((9, 3)), y).reason == states.STATES_CONSTANT
    few = states.debiased_cka(y[:3], y[:3])  # they differ: that is not what is missing
    assert np.isnan(few.value) and few.reason == "3 prompts; CKA needs 4" and few.n == 3


def test_correlations_leave_out_one_prompt_in_turn():
    rng = np.random.default_rng(1)
    prompts = np.array([0, 0, 1, 2, 2, 2, 3, 4, 4, 5, 6, 6])
    x = rng.normal(size=12)
    y = x + rng.normal(size=12)

    def away(v, keep):
        return np.concatenate([v[keep & (prompts == g)] - v[keep & (prompts == g)].mean() for g in set(prompts[keep])])

    def pooled(keep):
        a, b = away(x, keep), away(y, keep)
        return a @ b / np.sqrt(a @ a * (b @ b))

    ways = [
        (scores.correlation(x, y, prompts), lambda k: pearsonr(x[k], y[k])[0]),
        (scores.correlation(x, y, prompts, ranks=True), lambda k: spearmanr(x[k], y[k])[0]),
        (scores.correlation(x, y, prompts, within=True), pooled),
        (scores.correlation(x, y, prompts, within=True, ranks=True), lambda k: spearmanr(away(x, k), away(y, k))[0]),
    ]
    for found, direct in ways:
        everything = np.ones(12, bool)
        left = np.array([direct(prompts != g) for g in range(7)])
        low, high = scores.jackknife(np.arctanh(direct(everything)), np.arctanh(left))
        assert (found.value, found.low, found.high) == pytest.approx((direct(everything), np.tanh(low), np.tanh(high)))
        assert (found.n, found.n_clusters) == (12, 7)
    spread = scores.spread(x, prompts)
    assert spread.value == pytest.approx(np.sqrt(np.sum(away(x, everything) ** 2) / (12 - 7)))
    doubled = scores.spread_ratio(2 * x, x, prompts)
    assert (doubled.value, doubled.low, doubled.high) == pytest.approx((2, 2, 2))


def test_ties_and_constants():
    prompts = np.arange(8)
    tied = np.zeros(8)
    some = np.array([1.0, -1, 2, -2, 3, -3, 4, -4])
    assert scores.agreement(tied, some, prompts).value == 0.5
    assert scores.correlation(tied, some, prompts).reason == scores.CONSTANT
    ones = np.ones(8)
    assert np.isnan(scores.kappa(ones, ones, prompts).value) and "same side" in scores.kappa(ones, ones, prompts).reason
    assert scores.correlation(some, 2 * some, prompts).reason == scores.PERFECT


def coverage(estimate, truth, runs):
    """Share of runs whose interval holds the truth."""
    found = [estimate(np.random.default_rng(run)) for run in range(runs)]
    return np.mean([f.low <= truth <= f.high for f in found])


@pytest.mark.parametrize("n", [12, 40])
def test_intervals_hold_the_truth(n):
    """Independent and correlated normal margins, two pairs of every prompt that share half of their variance."""
    runs = 150

    def margins(rng, rho):
        prompts = np.repeat(np.arange(n), 2)
        z = (rng.normal(size=(n, 2))[prompts] + rng.normal(size=(2 * n, 2))) / np.sqrt(2)
        return z[:, 0], rho * z[:, 0] + np.sqrt(1 - rho**2) * z[:, 1], prompts

    worst = 0.95 - 3 * np.sqrt(0.05 * 0.95 / runs)
    assert coverage(lambda rng: scores.agreement(*margins(rng, 0.0)), 0.5, runs) >= worst
    assert coverage(lambda rng: scores.kappa(*margins(rng, 0.0)), 0.0, runs) >= worst - 0.02
    for rho in (0.0, 0.7):
        assert coverage(lambda rng, rho=rho: scores.correlation(*margins(rng, rho)), rho, runs) >= worst - 0.02
        spearman = 6 / np.pi * np.arcsin(rho / 2)
        assert (
            coverage(lambda rng, rho=rho: scores.correlation(*margins(rng, rho), ranks=True), spearman, runs)
            >= worst - 0.02
        )


def test_many_prompts_need_no_further_arrays_of_the_gram_matrix_size():
    rng, n = np.random.default_rng(0), 1500
    x, y = rng.normal(size=(2, n, 3))
    tracemalloc.start()
    a = states.centred_gram(x)
    made, one = tracemalloc.get_traced_memory()[1], a.nbytes
    b = states.centred_gram(y)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    states.cka_of(a, b)
    null = states.cka_null(a, b, 2, 0)
    used = tracemalloc.get_traced_memory()[1] - held
    tracemalloc.stop()
    assert made < 1.3 * one and used < 0.5 * one
    again = np.random.default_rng(0)
    for value, order in zip(null, [again.permutation(n) for _ in null], strict=True):
        moved = b[np.ix_(order, order)]
        assert value == pytest.approx((a * moved).sum() / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-14)


def test_cka_of_unrelated_states():
    """No bias at a width far above n, a null whose p is uniform, and an interval that holds 0."""
    runs, values, p, held = 200, [], [], []
    for run in range(runs):
        rng = np.random.default_rng(run)
        a, b = (states.centred_gram(rng.normal(size=(20, 200))) for _ in range(2))
        found = states.cka_of(a, b)
        null = states.cka_null(a, b, 39, run)
        values.append(found.value)
        p.append((1 + (null >= found.value).sum()) / 40)
        held.append(found.low <= 0 <= found.high)
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(runs)
    assert np.mean(np.array(p) <= 0.05) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / runs)
    assert abs(np.mean(p) - 0.5) < 0.08
    assert np.mean(held) >= 0.93


def test_the_interval_of_cka_holds_its_population_value():
    """Normal states: CKA is then |S_xy|^2 / (|S_xx| |S_yy|), Frobenius norms of the covariances."""
    runs = 200
    sizes = np.array([3.0, 2.0, 1.0, 0.5])
    mix = np.random.default_rng(9).normal(size=(4, 6)) * sizes[:, None] ** -0.5

    def estimate(rng):
        x = rng.normal(size=(30, 4)) * sizes
        return states.debiased_cka(x, x @ mix + 2 * rng.normal(size=(30, 6)))

    xx = np.diag(sizes**2)
    truth = np.sum((xx @ mix) ** 2) / np.linalg.norm(xx) / np.linalg.norm(mix.T @ xx @ mix + 4 * np.eye(6))
    assert 0.3 < truth < 0.9
    assert coverage(estimate, truth, runs) >= 0.95 - 3 * np.sqrt(0.05 * 0.95 / runs) - 0.02
