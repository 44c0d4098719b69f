"""Divergence of intervened states and counterfactual patches, against loops, identities and a model with a rule."""

import copy
import re

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.optimize import minimize
from scipy.stats import binom

import reward_lens as rl
from families import tiny_model
from planted import planted_model, planted_pairs
from reward_lens import data
from reward_lens.charts import kind
from reward_lens.methods.causation import divergence as behind
from reward_lens.methods.causation.counterfactual import pulled_to, remaining_gradient
from reward_lens.methods.causation.divergence import _nearest_class, divergence, set_aside
from reward_lens.methods.causation.downstream import Psi, Units, downstream, natural_states
from reward_lens.methods.causation.interchange import Interchange, first_mlp, lands_at, sites_named
from reward_lens.methods.causation.natural_distance import natural_standard
from test_conformance import fingerprint

FEW = {"n_neighbours": 12, "n_permutations": 99}


def different_prompts(rule: str, n: int, seed: int = 1) -> list[rl.Pair]:
    pairs: dict = {}
    for i, texts in enumerate(planted_pairs(rule, 3 * n, seed)):
        pairs.setdefault(texts[0], rl.Pair(*texts, subset="even" if i % 2 else "odd"))
    assert len(pairs) >= n
    return list(pairs.values())[:n]


PAIRS, NATURAL = different_prompts("keyword", 40)[:12], different_prompts("keyword", 40)[12:]


@pytest.fixture(scope="module")
def planted():
    return rl.RewardModel(*planted_model("keyword"), name="planted")


@pytest.fixture(scope="module")
def table(planted):
    return divergence(planted, PAIRS, "components", NATURAL, **FEW)


def tiny(family: str) -> rl.RewardModel:
    module, tokenizer = tiny_model(family, seed=1)
    return rl.RewardModel(module, tokenizer, name=family)


# the table


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mixtral"])
def test_valid_on_a_family(family, tmp_path, capfd):
    rm = tiny(family)
    before = fingerprint(rm)
    capfd.readouterr()
    first, again = (divergence(rm, PAIRS[:6], ["L0.attn", "L1.mlp", "L1.H2"], NATURAL[:16], **FEW) for _ in range(2))
    assert capfd.readouterr() == ("", "")
    assert fingerprint(rm) == before
    assert first.value.identical(again.value)
    assert first.value.dims == ("component", "measure")
    assert list(first.value.component.values) == ["L0.attn", "L1.mlp", "L1.H2", "clean"]
    loaded = rl.load_result(first.save(tmp_path / "result.nc"))
    assert loaded.value.identical(first.value) and loaded.checks == first.checks and loaded.meta == first.meta
    assert kind(first) == "table" and len(first.top(3)) == 3 and "by measure" in repr(first)
    routed = family == "mixtral"
    assert np.isnan(first.value.sel(measure="hidden units")).all() == routed
    assert any("units cannot be read" in check.note for check in first.checks) == routed


def test_a_patch_that_does_nothing_is_like_the_clean_run(table):
    """At the reward position both runs have one token, so patching the embedding changes nothing."""
    rows = [m for m in table.value.measure.values if m != "permutation p (BH)"]
    same = table.value.sel(measure=rows)
    np.testing.assert_allclose(same.sel(component="embed"), same.sel(component="clean"), atol=1e-4)
    assert table.value.sel(component="embed", measure="permutation p") > 0.05
    assert table.value.sel(component="embed", measure="energy ratio") < 2


def test_a_patch_that_leaves_the_natural_states_is_seen(table):
    """The rule is written by the last blocks: the rejected word with the rest of the chosen run is no natural state."""
    last = table.value.sel(component="L1.mlp")
    assert last.sel(measure="energy ratio") > 5
    assert last.sel(measure="permutation p (BH)") < 0.05
    assert last.sel(measure="local PCA distance") > 5 * last.sel(measure="local PCA baseline")
    assert last.sel(measure="reward change") > 5 * last.sel(measure="reward change, natural")
    assert last.sel(measure="share harmless") < 0.5 < last.sel(measure="share harmless, natural")
    assert np.isnan(last.sel(measure="hidden units"))  # no MLP comes after it
    assert any("no MLP between the site and the depth" in check.note for check in table.checks)


def test_settings_say_what_was_compared(table):
    settings = table.meta["settings"]
    assert settings["natural_class"] == "both" and settings["depth"] == 2 and settings["at"] == "final"
    assert settings["eps_rule"].startswith("0.05 SD of the reward")
    assert settings["evaluation_subsets"] == ["even", "odd"] and settings["n_evaluation"] == 2 * len(NATURAL)
    assert set(table.value.nearer_class.values) <= {"chosen", "rejected"}
    assert dict(zip(table.value.measure.values, table.value.unit.values, strict=True))["reward change"] == "reward"
    note = next(check.note for check in table.checks if check.name == "evaluation states")
    assert note == "200 are recommended, of several subsets; 2 subsets here"


def test_by_pair_holds_what_the_sites_summarise(planted, table):
    single = divergence(planted, PAIRS, "components", NATURAL, by="pair", **FEW)
    assert single.value.dims == ("pair", "component", "measure") and "low" in single.dataset
    value = single.value.sel(component=["L0.attn", "L1.attn", "clean"])
    summary = table.value.sel(component=value.component)
    for measure in ("effect", "local PCA distance", "share harmless", "hidden units"):
        np.testing.assert_allclose(
            value.sel(measure=measure).mean("pair"), summary.sel(measure=measure), rtol=1e-9, atol=1e-12
        )
    median = value.sel(measure="reward change").median("pair")
    np.testing.assert_allclose(median, summary.sel(measure="reward change"))
    few = divergence(planted, PAIRS, ["L1.attn"], NATURAL, by="pair", n_tested=3, **FEW)
    tested = few.value.sel(measure="reward change").notnull()
    assert (tested.sum("pair") == 3).all()
    assert any("not put to the null-space test" in check.note for check in few.checks)


def test_scaling_the_head_scales_what_is_in_reward_units(planted, table):
    module = copy.deepcopy(planted.module)
    with torch.no_grad():
        module.get_submodule(planted.structure.head).weight.mul_(4.0)
    scaled = divergence(rl.RewardModel(module, planted.tokenizer.hf), PAIRS, "components", NATURAL, **FEW)
    factor = xr.where(table.value.unit == "reward", 4.0, 1.0)
    np.testing.assert_allclose(scaled.value, table.value * factor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mode", ["zero", "mean", "resample"])
def test_ablations_run_the_chosen_response(planted, mode):
    values, rest = set_aside(data.as_pairs(NATURAL), seed=0)
    left = len(NATURAL) if mode == "zero" else len(rest)
    found = divergence(planted, PAIRS, ["L0.mlp"], NATURAL, mode=mode, by="pair", min_evaluation=left, **FEW)
    assert found.meta["settings"]["n_natural"] == left
    assert found.meta["settings"]["natural_class"] == "chosen"
    effect = found.value.sel(component="L0.mlp", measure="effect")
    if mode == "resample":
        assert effect.std() > 0
        return
    acts = rl.capture(planted, values, ["L0.mlp"])
    source = rl.zeros() if mode == "zero" else rl.constant(acts.chosen("L0.mlp").mean(0))
    change = rl.intervene(planted, PAIRS, {"L0.mlp": source}).value.sel(side="chosen", state="change")
    np.testing.assert_allclose(effect, -change, atol=1e-5)


def test_a_resampled_state_is_not_held_against_what_it_was_made_from():
    """The last block behind another text's residual: of that text's own state it would be a near copy."""
    pairs, values = different_prompts("keyword", 60), []
    for source in (None, pairs[48:]):
        with pytest.MonkeyPatch.context() as patch:
            if source is not None:  # values from pairs that are natural states of nothing
                given = data.as_pairs(source)
                patch.setattr(behind, "Interchange", lambda *a, given=given: Interchange(*a[:4], given, *a[5:]))
            found = divergence(tiny("llama"), pairs[:12], ["L2.resid_pre"], pairs[12:48], mode="resample",
                               min_evaluation=20, **FEW)  # fmt: skip
        values.append(found.value.sel(component="L2.resid_pre", measure="local PCA distance").item())
        baseline = found.value.sel(component="L2.resid_pre", measure="local PCA baseline").item()
    assert values[0] > 0.85 * baseline and values[0] == pytest.approx(values[1], rel=0.15)


@pytest.mark.parametrize("mode", ["noise", "denoise"])
@pytest.mark.parametrize("at", ["final", "all"])
def test_effects_are_those_of_the_intervention(planted, mode, at):
    pairs = PAIRS[:6] if at == "final" else [rl.Pair(p.prompt, "sun hat", "hat sun") for p in PAIRS[:6]]
    found = divergence(planted, pairs, ["L0.attn"], NATURAL, mode=mode, at=at, by="pair", **FEW)
    source = rl.from_run(rl.capture(planted, pairs, ["L0.attn"], at=at).swapped())
    side, sign = ("chosen", -1) if mode == "noise" else ("rejected", 1)
    change = rl.intervene(planted, pairs, {"L0.attn": source}, at=at).value.sel(side=side, state="change")
    np.testing.assert_allclose(found.value.sel(component="L0.attn", measure="effect"), sign * change, atol=1e-5)


def test_a_result_of_effects_is_run_again(planted):
    settings = {"sites": ["L0.attn", "L1.attn"], "mode": "denoise", "at": "final", "path": "total", "align": None}
    value = xr.DataArray(np.zeros(2), dims=("component",), coords={"component": settings["sites"]})
    effects = rl.Result("effects", value, unit="reward", meta={"settings": settings})
    again = divergence(planted, PAIRS, effects, NATURAL, **FEW)
    direct = divergence(planted, PAIRS, settings["sites"], NATURAL, mode="denoise", **FEW)
    assert again.value.identical(direct.value)
    changes = ({"path": "direct"}, {"align": "diff"}, {"spans": "position"}, {"layers": [1]}, {"norm": "frozen"})
    for change in changes:
        with pytest.raises(rl.DataError, match=f"cannot be run again.*{re.escape(str(change))}"):
            other = rl.Result("effects", value, unit="reward", meta={"settings": settings | change})
            divergence(planted, PAIRS, other, NATURAL)


def test_states_of_one_class_are_compared_with_that_class():
    """Chosen states are no mixture of both; "like neither class" is not rejected for them, nor for rejected ones."""
    rng = np.random.default_rng(0)
    natural = {"chosen": rng.normal(size=(40, 6)) + 2, "rejected": rng.normal(size=(40, 6)) - 2}
    for name, shift in (("chosen", 2), ("rejected", -2)):
        distance, baseline, p, nearer = _nearest_class(rng.normal(size=(20, 6)) + shift, natural, 99, 0)
        assert nearer == name and p > 0.05 and distance < 2 * baseline
    assert _nearest_class(rng.normal(size=(20, 6)), natural, 99, 0)[2] == pytest.approx(0.01)


def test_the_p_value_errs_at_its_rate_on_states_of_a_network(planted):
    """Random splits of prompts, nothing intervened on: chosen states of 20 against natural ones of 20, scale of 20."""
    prompts: dict = {}
    for texts in planted_pairs("keyword", 400, seed=5):
        prompts.setdefault(texts[0], rl.Pair(*texts))
    acts = rl.capture(planted, list(prompts.values()), ["L1.resid_post"])
    chosen, rejected = acts.chosen("L1.resid_post").double().numpy(), acts.rejected("L1.resid_post").double().numpy()
    count, n = 0, 200
    for seed in range(n):
        order = np.random.default_rng(seed).permutation(len(chosen))
        ours, theirs, others = order[:20], order[20:40], order[40:60]
        standard = natural_standard(np.concatenate([chosen[others], rejected[others]]))
        classes = {"chosen": standard(chosen[theirs]), "rejected": standard(rejected[theirs])}
        count += _nearest_class(standard(chosen[ours]), classes, 99, seed)[2] <= 0.05
    assert binom.ppf(0.0005, n, 0.05) <= count <= binom.ppf(0.9995, n, 0.05)


# what the table is made of


def test_states_and_units_equal_plain_hooks():
    """One site, one pair, by hooks of its own: the residual at every depth and the units of every later block."""
    rm = tiny("llama")
    pairs, natural = data.as_pairs(PAIRS[:1]), data.as_pairs(NATURAL[:12])
    site = rl.Site("attn", 1)
    plan = Interchange(rm, [site], "noise", "final", natural)
    known = natural_states(rm, natural, 3, "both", np.random.default_rng(0))
    units = Units(rm, [site], 3, known.tokens, known.reference)
    run = downstream(rm, pairs, plan, 3, units, spread=1.0)
    ((chosen, rejected),) = rm.tokenize_pairs(pairs)
    model, seen = rm.module.model, {}

    def write(module, args, output):
        seen["write"] = output[0][0, -1].clone()

    def patch(module, args, output):
        output[0][0, chosen.reward_pos] = seen["write"]

    def ran(tokens, hook):
        handles = [model.layers[1].self_attn.register_forward_hook(hook)]
        for layer in range(3):
            read = lambda m, args, layer=layer: seen.__setitem__(layer, args[0][0, -1])  # noqa: E731
            handles.append(model.layers[layer].mlp.down_proj.register_forward_pre_hook(read))
        handles.append(model.norm.register_forward_pre_hook(lambda m, args: seen.__setitem__("last", args[0][0, -1])))
        rm.module(input_ids=torch.tensor([tokens.ids]))
        for handle in handles:
            handle.remove()

    with torch.no_grad():
        assert rejected.reward_pos == len(rejected) - 1 and chosen.reward_pos == len(chosen) - 1
        ran(rejected, write)
        ran(chosen, patch)
    np.testing.assert_allclose(run.states[0, 0], seen["last"], atol=1e-5)
    share = np.mean([units.ranges[layer].outside(seen[layer].double().numpy()).mean() for layer in (1, 2)])
    assert run.hidden[0, 0] == pytest.approx(share)
    assert 0 < share < 1
    held = rl.capture(rm, list(natural), ["L1.neuron", "L2.neuron"])
    rare = [
        units.ranges[layer].outside(held[f"L{layer}.neuron"].double().numpy()[~known.reference]).mean()
        for layer in (1, 2)
    ]
    assert units.baseline()[0] == pytest.approx(np.mean(rare))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_psi_is_the_network_from_there(depth):
    """Against the model itself with the vector added by a hook; at the last depth psi is norm and head alone."""
    rm = tiny("gpt_neox")
    natural = data.as_pairs(NATURAL[:12])
    known = natural_states(rm, natural, depth, "both", np.random.default_rng(0))
    vectors = np.random.default_rng(1).normal(size=(3, rm.d_model))
    chosen = [0, 5, 8]
    changes = Psi(rm, known, depth, chosen).change(vectors)
    site = rl.Site("resid_post", depth - 1)
    for column, run in enumerate(chosen):
        text = known.tokens[run]
        for row, vector in enumerate(vectors):
            value = rl.intervene(rm, [text], {site: rl.add(torch.from_numpy(vector))}).value
            assert changes[row, column] == pytest.approx(float(value.sel(state="change")[0]), abs=2e-5)


def test_what_the_head_does_not_read_is_harmless():
    """Without a final norm psi is linear at the last depth: D of v is |w . v| for every evaluation state."""
    rm = tiny("llama")
    norm = rm.readout.norm
    known = natural_states(rm, data.as_pairs(NATURAL[:12]), 3, "both", np.random.default_rng(0))
    w = rm.readout.weight.double().numpy() * norm.gain.double().numpy()
    v = np.random.default_rng(1).normal(size=(2, rm.d_model))
    v[0] -= (v[0] @ w) / (w @ w) * w
    linear = copy.copy(rm)
    linear.readout = type("Linear", (), {
        "norm": norm, "reward": staticmethod(lambda h, inputs=None: (h.double() @ torch.from_numpy(w)).to(h))
    })()  # fmt: skip
    changes = Psi(linear, known, 3, range(len(known.states))).change(v)
    assert np.abs(changes[0]).max() < 1e-4
    np.testing.assert_allclose(np.abs(changes[1]), abs(v[1] @ w), rtol=1e-4)


def test_an_earlier_depth(planted):
    found = divergence(
        planted, PAIRS, "components", NATURAL, depth=1, n_tested=2, n_evaluation=8, min_evaluation=8, **FEW
    )
    assert list(found.value.component.values) == ["embed", "L0.attn", "L0.mlp", "clean"]
    assert found.meta["settings"]["n_tested"] == 2
    worst = found.value.sel(measure="reward change", component=["L0.attn", "clean"])
    assert worst[0] > worst[1] >= 0


def test_where_a_site_lands_and_who_reads_it():
    llama, neox = tiny("llama"), tiny("gpt_neox")
    rows = {"embed": (0, 0, 0), "L1.resid_pre": (1, 1, 1), "L1.attn": (2, 1, 2), "L1.H0": (2, 1, 2),
            "L1.V0": (2, 1, 2), "L1.mlp": (2, 2, 2), "L1.N3": (2, 2, 2), "L1.resid_post": (2, 2, 2)}  # fmt: skip
    for written, expected in rows.items():
        site = rl.Site.parse(written)
        assert (lands_at(site), first_mlp(llama, site), first_mlp(neox, site)) == expected
    assert [str(s) for s in sites_named(llama, "residual", 3)] == ["embed", "L1.resid_pre", "L2.resid_pre"]
    assert len(sites_named(llama, "heads", 2)) == 8
    assert [str(s) for s in sites_named(llama, ["L1.attn", "L1.attn"], 2)] == ["L1.attn"]


def test_natural_states_are_split_by_prompt():
    rm = tiny("llama")
    pairs = data.as_pairs([*NATURAL[:12], rl.Pair(NATURAL[0].prompt, "the", "red cat")])
    known = natural_states(rm, pairs, 3, "both", np.random.default_rng(0))
    assert not set(known.prompts[known.reference]) & set(known.prompts[~known.reference])
    for name, runs in known.compared.items():
        assert len(set(known.prompts[runs])) == len(runs) == 6 and not known.reference[runs].any()
        assert (np.asarray(runs) % 2 == (name == "rejected")).all()
    np.testing.assert_allclose(known.rewards, rm.rewards(known.tokens).numpy(), atol=1e-5)


# refusals


def refused(planted, match, pairs=PAIRS, sites="components", natural=NATURAL, **settings):
    with pytest.raises(rl.RewardLensError, match=match):
        divergence(planted, pairs, sites, natural, **(FEW | settings))


def test_too_little_data_is_refused_with_the_number_needed(planted):
    refused(planted, "Found: 5 prompts among the pairs. Expected: at least 6", pairs=PAIRS[:5])
    refused(planted, "Found: 11 natural prompts. Expected: at least 12", natural=NATURAL[:11])
    refused(planted, "Found: 54 natural states of other prompts.*at least 60.*smaller n_neighbours", n_neighbours=60)
    refused(planted, "Found: 56 natural states to evaluate on. Expected: at least 57", min_evaluation=57)


def test_natural_pairs_of_the_same_prompt_are_refused(planted):
    refused(planted, "share prompts.*1 shared prompts.*split the pairs by prompt", natural=[*NATURAL, PAIRS[2]])


def test_what_cannot_be_asked_is_refused(planted):
    refused(planted, "L1.mlp cannot be seen at depth 1", sites=["L1.mlp"], depth=1)
    refused(planted, "its own source's state", sites=["L1.resid_post"])
    refused(planted, "Found: depth=3. Expected: 1 to 2", depth=3)
    refused(planted, "no intervention 'swap'", mode="swap")
    refused(planted, "mode='mean' is known at the reward position only", mode="mean", at="all")
    refused(planted, "n_tested at least 1", n_tested=0)
    refused(planted, "There are no sites", sites=[])
    refused(planted, "cannot be read", sites=["L7.attn"])
    unequal = [p for p, (a, b) in zip(PAIRS, planted.tokenize_pairs(PAIRS), strict=True) if len(a) != len(b)]
    refused(planted, "cannot be compared position by position", pairs=unequal, at="all")


# counterfactual patches


@pytest.mark.parametrize("variant", ["paper", "code"])
@pytest.mark.parametrize("weight", [0.1, 1.0, 10.0])
def test_the_pull_is_the_minimum_of_its_loss(variant, weight):
    """Against a general minimiser with autograd's gradient."""
    generator = torch.Generator().manual_seed(0)
    for width, size in ((3, 1.0), (8, 1.0), (8, 5.0)):
        s, c = (size * torch.randn(width, generator=generator, dtype=torch.float64) + 1 for _ in range(2))

        def loss(x, s=s, c=c):
            h = torch.tensor(x, requires_grad=True)
            cosine = torch.nn.functional.cosine_similarity(h, c, dim=0)
            if variant == "paper":
                value = (h - s).square().sum() / 2 + weight * ((h - c).square().sum() / 2 - cosine / 2)
            else:
                value = (h - s).square().mean() + weight * ((h - c).square().mean() + 1 - cosine)
            value.backward()
            return float(value.detach()), h.grad.numpy()

        found = pulled_to(s, c, weight, variant)
        np.testing.assert_allclose(found, minimize(loss, s.numpy(), jac=True, tol=1e-10).x, atol=1e-5)
        assert remaining_gradient(found, s, c, weight, variant) < 1e-9
        assert remaining_gradient(s, s, c, weight, variant) > 1e-3  # the check can fail


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_the_pull_of_a_value_that_points_away_is_the_lower_of_two_minima(variant):
    """In the plane of s and h_CL: no point of a grid has a lower loss, the neighbourhood of the origin included."""
    generator = torch.Generator().manual_seed(1)
    angles, lengths = torch.linspace(0, torch.pi, 181).double(), torch.linspace(1e-6, 2, 200).double()
    plane = lengths[:, None, None] * torch.stack([angles.cos(), angles.sin()], -1)
    c, ends = torch.tensor([1.0, 0.0]).double(), []
    for _ in range(120):
        size, away, weight = torch.rand(3, generator=generator).double().tolist()
        s, weight = 1.5 * size * torch.tensor([-(away**0.5), (1 - away) ** 0.5]).double(), 0.5 * weight

        def loss(h, s=s, weight=weight):
            near, pull = ((h - x).square().sum(-1) for x in (s, c))
            cosine = h[..., 0] / h.norm(dim=-1)
            return near / 2 + weight * (pull / 2 - cosine * (0.5 if variant == "paper" else 1.0))

        found = pulled_to(s, c, weight, variant)
        ends.append(bool(found.any()))
        assert float(loss(found if ends[-1] else 1e-9 * c)) <= float(loss(plane).min()) + 1e-6
    assert 0 < sum(ends) < len(ends)


def test_the_ends_of_the_pull():
    s, c = torch.tensor([1.0, 2.0, -1.0]).double(), torch.tensor([0.5, -1.0, 3.0]).double()
    assert torch.equal(pulled_to(s, c, 0.0), s)
    np.testing.assert_allclose(pulled_to(s, c, 1e9), c, atol=1e-6)
    np.testing.assert_allclose(pulled_to(s, s, 5.0), s, atol=1e-12)
    assert torch.equal(pulled_to(s, 0 * c, 1.0), s / 2)
    assert torch.equal(pulled_to(-1e-3 * c, c, 1e-4), 0 * c)  # points away and is too small: falls to the origin


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_counterfactual_patches_beside_plain_ones(family, tmp_path, capfd):
    rm = tiny(family)
    sites = ["L0.attn", "L1.mlp", "L1.H2", "L2.resid_pre"]
    before = fingerprint(rm)
    capfd.readouterr()
    found, again = (rl.counterfactual_patch(rm, PAIRS[:6], sites, NATURAL, n_natural=5) for _ in range(2))
    assert capfd.readouterr() == ("", "")
    assert fingerprint(rm) == before and found.value.identical(again.value)
    assert found.value.dims == ("pair", "component", "patch")
    assert [check.name for check in found.checks] == ["minimum", "clean row"]
    for site in sites:
        source = rl.from_run(rl.capture(rm, PAIRS[:6], [site]).swapped())
        change = rl.intervene(rm, PAIRS[:6], {site: source}).value.sel(side="chosen", state="change")
        np.testing.assert_allclose(found.value.sel(component=site, patch="plain"), -change, atol=2e-5)
    plain, pulled, difference = (found.value.sel(patch=p) for p in ("plain", "counterfactual", "difference"))
    np.testing.assert_allclose(difference, pulled - plain, atol=1e-12)
    assert (np.abs(difference) > 0).any()
    assert (found.value.distance_after < found.value.distance_before).all()
    loaded = rl.load_result(found.save(tmp_path / "result.nc"))
    assert loaded.value.identical(found.value) and loaded.checks == found.checks
    assert found.mean is not None and kind(found) in ("list", "grid", "components")


def test_weight_0_is_the_plain_patch_exactly(planted):
    found = rl.counterfactual_patch(planted, PAIRS, "components", NATURAL, weight=0.0)
    assert (found.value.sel(patch="difference") == 0).all()
    assert (found.value.sel(patch="counterfactual") == found.value.sel(patch="plain")).all()


def test_a_large_weight_is_the_patch_of_a_natural_mean(planted):
    """With all natural values averaged, a mean ablation with the mean of the other class."""
    found = rl.counterfactual_patch(planted, PAIRS, ["L1.attn"], NATURAL, weight=1e8, n_natural=len(NATURAL))
    mean = rl.capture(planted, NATURAL, ["L1.attn"]).rejected("L1.attn").mean(0)
    change = rl.intervene(planted, PAIRS, {"L1.attn": rl.constant(mean)}).value.sel(side="chosen", state="change")
    np.testing.assert_allclose(found.value.sel(component="L1.attn", patch="counterfactual"), -change, atol=1e-4)


def test_noise_of_a_pair_is_minus_denoise_of_the_swapped_pair(planted):
    def swapped(pairs):
        return [rl.Pair(p.prompt, p.rejected, p.chosen, id=p.id, subset=p.subset) for p in pairs]

    noise = rl.counterfactual_patch(planted, PAIRS, "components", NATURAL)
    back = rl.counterfactual_patch(planted, swapped(PAIRS), "components", swapped(NATURAL), mode="denoise")
    np.testing.assert_allclose(noise.value, -back.value, atol=1e-5)


def test_counterfactual_patch_refuses_what_has_no_answer(planted):
    for settings, match in (
        ({"mode": "zero"}, "only there has the value a class"),
        ({"at": "all"}, "at='all'"),
        ({"weight": -1.0}, "weight at least 0"),
        ({"variant": "other"}, "variant 'paper' or 'code'"),
        ({"n_natural": 29}, "too few natural values.*Found: 28 natural pairs. Expected: at least 29"),
    ):
        with pytest.raises(rl.DataError, match=match):
            rl.counterfactual_patch(planted, PAIRS, ["L1.attn"], NATURAL, **settings)
    with pytest.raises(rl.DataError, match="share prompts"):
        rl.counterfactual_patch(planted, PAIRS, ["L1.attn"], PAIRS, n_natural=3)


@pytest.mark.parametrize("family", ["llama", "falcon", "mixtral"])  # falcon: one key and value head for all
def test_values_neurons_and_experts_are_patched_as_effects_patches_them(family):
    rm = tiny(family)
    sites = ["L1.V0", "L1.H1", "L0.R1" if family == "mixtral" else "L0.N3"]
    effects = rl.effects(rm, PAIRS[:6], sites).value
    plain = rl.counterfactual_patch(rm, PAIRS[:6], sites, NATURAL, weight=0.0).value.sel(patch="plain")
    whole = divergence(rm, PAIRS[:6], sites, NATURAL, by="pair", **FEW).value.sel(component=sites, measure="effect")
    for found in (plain, whole):
        np.testing.assert_allclose(found.values, effects.values, atol=1e-5 * max(1, np.abs(effects).max()))


def test_what_holds_positions_is_not_exchanged_between_texts():
    rm = tiny("llama")
    for call in (rl.divergence, rl.counterfactual_patch):
        with pytest.raises(rl.DataError, match=r"L1.Q1 belongs to its position.*'L1.V0'"):
            call(rm, PAIRS, ["L1.Q1"], NATURAL)
