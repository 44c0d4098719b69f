"""Latents of a dictionary: the split of a reward against the head itself, settings against plain interventions, and a
planted keyword as an answer key."""

import functools

import numpy as np
import pytest
import torch

import reward_lens as rl
from dictionaries import constant_sae, identity_sae, random_sae
from families import STRUCTURES, TEXT_PAIRS, tiny_model
from planted import KEYWORD, planted_model, planted_pairs
from reward_lens import stats
from reward_lens.edits.edit import TextEdit
from reward_lens.engine.intervention import values
from reward_lens.methods.latents.latent_clamping import clamp_latent
from reward_lens.methods.latents.latent_contexts import latent_contexts
from reward_lens.methods.latents.latent_contributions import latent_contributions
from reward_lens.methods.latents.latent_states import require_latents
from reward_lens.methods.latents.latent_tokens import latent_tokens
from reward_lens.methods.latents.reward_latents import probe_latents, reward_latents
from reward_lens.methods.shared.paired_shares import paired_change
from reward_lens.methods.shared.prompt_ratios import prompt_ratio
from reward_lens.sae.dictionary import SAE

PAIRS = [rl.Pair(*texts, id=f"p{i}") for i, texts in enumerate(TEXT_PAIRS)]
every = pytest.mark.parametrize("family", STRUCTURES)


@functools.cache
def model(family: str = "llama") -> rl.RewardModel:
    return rl.RewardModel(*tiny_model(family, seed=1), name=family)


def gap(result, name: str) -> float:
    return next(c.gap for c in result.checks if c.name == name)


def sided(result, kind: str) -> np.ndarray:
    return result.value.values[..., result.value["kind"].values == kind]


# --- the split ----------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("scale", ["shared", "own"])
def test_at_the_last_site_latents_bias_and_error_are_the_reward(family, scale):
    """E3, and every row against the head's own numbers."""
    rm, sae = model(family), random_sae()
    result = latent_contributions(rm, sae, PAIRS, scale=scale)
    assert result.meta["settings"]["estimator"] == "direct" and gap(result, "completeness") < 1e-5
    scores = rm.score_pairs(PAIRS).value.values
    np.testing.assert_allclose(result.value.sum("latent"), scores, atol=2e-5)
    h = rl.capture(rm, PAIRS, ["L2.resid_post"])["L2.resid_post"]
    z, direction = sae.encode(h), rm.readout.direction(h)
    own = z * (direction.u @ sae.W_dec.T)
    for i, side in enumerate(("chosen", "rejected")):
        got = result.value.sel(side=side)
        for label, index in zip(got["latent"].values, got["index"].values, strict=True):
            if index >= 0:
                np.testing.assert_allclose(got.sel(latent=label), own[i::2, index], atol=2e-5)
        np.testing.assert_allclose(got.sel(latent="b_dec"), (direction.u @ sae.b_dec)[i::2], atol=2e-5)
        left = ((h - sae(h)) * direction.u).sum(1)
        np.testing.assert_allclose(got.sel(latent="error"), left[i::2], atol=2e-5)
        np.testing.assert_allclose(got.sel(latent="rest"), direction.constant[i::2], atol=1e-6)
    inactive = set(range(48)) - set(result.value["index"].values.tolist())
    assert not (z[:, sorted(inactive)] != 0).any()
    if scale == "shared":
        mean_u = (direction.u[::2] + direction.u[1::2]) / 2
        expected = (z[::2] - z[1::2]) * (mean_u @ sae.W_dec.T)
        kept = [j for j in result.value["index"].values if j >= 0]
        got = result.value.sel(side="margin").values[:, : len(kept)]
        np.testing.assert_allclose(got, expected[:, kept], atol=2e-5)
        assert not result.value.sel(side="margin", latent="b_dec").any()  # both runs have the same one


def test_fewer_rows_have_the_same_sums():
    rm, sae = model(), random_sae()
    whole, some = (latent_contributions(rm, sae, PAIRS, top=top) for top in (None, 3))
    assert (some.value["kind"] == "latent").sum() == 3
    np.testing.assert_allclose(some.value.sum("latent"), whole.value.sum("latent"), atol=1e-9)
    kept = some.value["latent"].values[:3]
    np.testing.assert_array_equal(some.value.sel(latent=kept), whole.value.sel(latent=kept))
    size = np.abs(whole.value.sel(side="margin")).mean("pair")[whole.value["kind"].values == "latent"]
    assert set(kept) == set(size["latent"].values[np.argsort(-size.values)[:3]])


def test_frequencies_and_the_error_share():
    rm, sae = model(), random_sae()
    result = latent_contributions(rm, sae, PAIRS)
    z = sae.encode(rl.capture(rm, PAIRS, ["L2.resid_post"])["L2.resid_post"]) > 0
    kept = result.value["index"].values[result.value["index"].values >= 0]
    got = result.value.isel(latent=slice(0, len(kept)))
    np.testing.assert_allclose(got["frequency_chosen"], z[::2, kept].double().mean(0))
    difference = z[::2, kept].double() - z[1::2, kept].double()
    for j, column in enumerate(difference.numpy().T):
        *_, low, high = paired_change(column, [p.prompt_key for p in PAIRS])
        assert low < high  # also of a latent that is active in both responses of every pair
        ends = [float(got[f"frequency_difference_{end}"][j]) for end in ("low", "high")]
        np.testing.assert_allclose(ends, [low, high])
    parts = [np.abs(sided(result, kind).sum(-1)) for kind in ("latent", "b_dec", "error")]
    np.testing.assert_allclose(result.value["error_share"], parts[2] / sum(parts), atol=1e-9)
    perfect = latent_contributions(rm, identity_sae(), PAIRS)
    assert float(np.abs(perfect.value["error_share"]).max()) < 1e-6
    nothing = latent_contributions(rm, constant_sae(torch.zeros(32)), PAIRS)
    assert (nothing.value["error_share"] == 1).all() and nothing.value.sizes["latent"] == 4
    np.testing.assert_allclose(nothing.value.sum("latent"), rm.score_pairs(PAIRS).value, atol=2e-5)


@every
def test_gradient_is_the_slope_of_the_reward(family):
    """Against central differences of the reward along each latent, and first order for small steps."""
    rm, sae = model(family), random_sae(site="L1.resid_post")
    result = latent_contributions(rm, sae, PAIRS[:1], "gradient")
    np.testing.assert_allclose(result.value.sum("latent"), rm.score_pairs(PAIRS[:1]).value, atol=2e-5)
    z = sae.encode(rl.capture(rm, PAIRS[:1], ["L1.resid_post"])["L1.resid_post"])[0]
    text = [(PAIRS[0].messages, PAIRS[0].chosen)]
    for j in z.nonzero().flatten()[:2].tolist():
        ends = []
        for step in (0.02, -0.02):
            source = {"L1.resid_post": rl.add(step * sae.W_dec[j])}
            ends.append(float(rl.intervene(rm, text, source).value.sel(state="intervened")[0]))
        expected = float(z[j]) * (ends[0] - ends[1]) / 0.04
        assert abs(float(result.value.sel(side="chosen", latent=f"F{j}")[0]) - expected) < 2e-3 * max(1, abs(expected))


@pytest.mark.parametrize(("family", "at"), [("llama", "final"), ("gpt_neox", "response")])
def test_integration_along_the_latents_closes(family, at):
    rm, sae = model(family), random_sae(site="L0.resid_post")
    coarse, fine = (latent_contributions(rm, sae, PAIRS[:2], "integrated", at, steps=n) for n in (2, 48))
    assert gap(fine, "integration gap") < 1e-3 and gap(fine, "integration gap") < gap(coarse, "integration gap")
    np.testing.assert_allclose(fine.value.sum("latent"), rm.score_pairs(PAIRS[:2]).value, atol=2e-5)
    for i, pair in enumerate(PAIRS[:2]):
        for side, text in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            source = {"L0.resid_post": rl.constant(sae.b_dec)}
            begun = rl.intervene(rm, [(pair.messages, text)], source, at).value.sel(state="intervened")
            assert abs(float(fine.value.sel(side=side, latent="rest")[i]) - float(begun[0])) < 2e-3


@every
@pytest.mark.parametrize("at", ["final", "response"])
def test_ablation_is_a_plain_loop_of_interventions(family, at):
    rm, sae = model(family), random_sae(site="L1.resid_pre", k=2)
    pairs = PAIRS[1:2]
    result = latent_contributions(rm, sae, pairs, "ablation", at)
    assert gap(result, "clean row") < 1e-4
    for side, text in (("chosen", pairs[0].chosen), ("rejected", pairs[0].rejected)):
        got = result.value.sel(side=side, pair=pairs[0].id)
        one = [(pairs[0].messages, text)]
        z = sae.encode(rl.capture(rm, one, ["L1.resid_pre"], at)["L1.resid_pre"][0].reshape(-1, 32))
        changes = {f"F{j}": -z[:, j, None] * sae.W_dec[j] for j in z.any(0).nonzero().flatten()[:4].tolist()}
        changes["b_dec"] = -sae.b_dec
        for label, change in changes.items():
            state = rl.intervene(rm, one, {"L1.resid_pre": rl.add(change)}, at).value.sel(state="change")
            assert abs(float(got.sel(latent=label)) + float(state[0])) < 3e-5
    np.testing.assert_allclose(result.value.sum("latent"), rm.score_pairs(pairs).value, atol=3e-5)


def test_what_the_dictionary_is_made_of_does_not_matter_to_writes():
    """A dictionary of a write: the same identities, at another kind of site."""
    rm, sae = model(), random_sae(site="L1.mlp")
    result = latent_contributions(rm, sae, PAIRS[:2], "ablation")
    np.testing.assert_allclose(result.value.sum("latent"), rm.score_pairs(PAIRS[:2]).value, atol=3e-5)


# --- holding a latent ---------------------------------------------------------------------------------------


@every
def test_clamping_is_an_intervention_and_zero_is_the_ablation(family):
    rm, sae = model(family), random_sae(site="L0.resid_post", k=3)
    pairs = PAIRS[:2]
    j = int(sae.encode(rl.capture(rm, pairs, ["L0.resid_post"])["L0.resid_post"])[0].argmax())
    held = clamp_latent(rm, sae, pairs, j, (0.0, 2.5), "response")
    ablated = latent_contributions(rm, sae, pairs, "ablation", "response")
    np.testing.assert_allclose(held.value.sel(clamp=0.0), -ablated.value.sel(latent=f"F{j}"), atol=3e-5)
    for i, pair in enumerate(pairs):
        for side, text in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            x = rl.capture(rm, [(pair.messages, text)], ["L0.resid_post"], "response")["L0.resid_post"][0]
            z = sae.encode(x)[:, j]
            source = {"L0.resid_post": values(x + (2.5 - z)[:, None] * sae.W_dec[j])}
            change = rl.intervene(rm, [(pair.messages, text)], source, "response").value.sel(state="change")
            assert abs(float(held.value.sel(side=side, clamp=2.5)[i]) - float(change[0])) < 5e-5
            assert float(held.value["activation"].sel(side=side)[i]) == pytest.approx(float(z.max()), abs=1e-5)


def test_a_value_that_a_latent_has_changes_nothing():
    rm, sae = model(), constant_sae(torch.zeros(32))
    assert not clamp_latent(rm, sae, PAIRS[:2], 1, torch.tensor(0.0)).value.any()


# --- which latents ------------------------------------------------------------------------------------------


@functools.cache
def planted() -> tuple[rl.RewardModel, SAE, list[rl.Pair]]:
    """A model that rewards a keyword, and a dictionary of one latent for it (1 with, 0 without) among random ones."""
    rm = rl.RewardModel(*planted_model("keyword"), name="keyword")
    pairs = [rl.Pair(*texts, id=f"k{i}") for i, texts in enumerate(planted_pairs("keyword", 40, seed=5))]
    h = rl.capture(rm, [rl.Pair(*t) for t in planted_pairs("keyword", 60, seed=9)], ["L1.resid_post"])["L1.resid_post"]
    with_it, without = h[::2].mean(0), h[1::2].mean(0)
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(24, 32, generator=rng) * h.std(0)
    decoder = torch.cat([noise[:7], (with_it - without)[None], noise[7:]])
    encoder = torch.linalg.pinv(decoder)
    within = (h - torch.cat([with_it[None], without[None]]).repeat(len(h) // 2, 1)).T.cov() + 1e-3 * torch.eye(32)
    reader = torch.linalg.solve(within, decoder[7])
    encoder[:, 7] = reader / (reader @ decoder[7])
    bias = -(h.mean(0) @ encoder)
    bias[7] = -(without @ encoder[:, 7])
    return (
        rm,
        SAE(
            encoder, bias, decoder, torch.zeros(32), activation="relu", apply_b_dec_to_input=False, site="L1.resid_post"
        ),
        pairs,
    )


def test_the_keywords_latent_is_the_top_reward_latent():
    rm, sae, pairs = planted()
    result = reward_latents(rm, sae, pairs, top=5)
    first = result.value.isel(latent=0)
    assert int(first["index"]) == 7 and float(first["p_adjusted"]) < 0.01
    assert float(result.low.sel(side="margin")[0]) > 0.5
    sizes = np.abs(result.mean.sel(side="margin").values)
    assert (np.diff(sizes) <= 1e-12).all() and sizes[0] > 10 * sizes[1]
    tested = set(result.value["pair"].values)
    assert result.meta["prompts"]["screened"] + result.meta["prompts"]["tested"] == len({p.prompt_key for p in pairs})
    ablated = latent_contributions(rm, sae, [p for p in pairs if p.id in tested], "ablation").value.sel(latent="F7")
    np.testing.assert_allclose(
        first.sel(side=["chosen", "rejected"]), ablated.sel(side=["chosen", "rejected"]), atol=3e-5
    )
    direct = latent_contributions(rm, sae, pairs).mean.sel(side="margin")
    assert str(direct["latent"][int(np.abs(direct.values).argmax())].item()) == "F7"
    test = stats.sign_flip_test(first.sel(side="margin").values, first["prompt_id"].values.tolist())
    assert float(first["p"]) == test.p


def test_clamping_the_keywords_latent_moves_the_reward_by_what_was_planted():
    """The rule gives -1 without the keyword and +1 with it."""
    rm, sae, pairs = planted()
    moved = clamp_latent(rm, sae, pairs, 7, (0.0, 1.0), "final")
    assert abs(float(moved.mean.sel(side="rejected", clamp=1.0)) - 2) < 0.1
    assert abs(float(moved.mean.sel(side="chosen", clamp=0.0)) + 2) < 0.1


def test_the_latent_that_carries_an_edit():
    rm, sae, pairs = planted()
    edit = TextEdit(
        "keyword", "the keyword", lambda asked, text: text if KEYWORD in text.split() else f"{text} {KEYWORD}"
    )
    edited = rl.edited_pairs(pairs, edit)
    result = probe_latents(rm, sae, edited, top=4)
    first = result.value.isel(latent=0)
    assert int(first["index"]) == 7 and 0.9 < float(first["share"]) < 1.1
    assert float(first["share_low"]) < float(first["share"]) < float(first["share_high"])
    assert not result.value.sel(side="rejected").any()  # the text without the edit is left alone
    shift = result.value["shift"].values
    assert float(first["share"]) == pytest.approx(float(first.sel(side="margin").sum()) / shift.sum())
    zeroed = probe_latents(rm, sae, edited, top=4, replace="zero", at="response")
    assert zeroed.value.sel(side="rejected").any()


def test_edits_that_leave_a_latent_alone_are_not_carried_by_it():
    """Given back what it has already, a latent carries exactly nothing."""
    rm, sae = model(), random_sae()
    texts = [rl.Pair(p.prompt, p.chosen, p.rejected, id=p.id) for p in PAIRS]
    result = probe_latents(rm, sae, texts, top=48)
    acts = rl.capture(rm, texts, ["L2.resid_post"])["L2.resid_post"]
    z = sae.encode(acts)
    for i, name in enumerate(p.id for p in texts):
        if name in result.value["pair"].values:
            same = [f"F{j}" for j in result.value["index"].values if not z[2 * i, j] and not z[2 * i + 1, j]]
            assert same and not result.value.sel(side="margin", pair=name, latent=same).any()


def test_few_prompts_have_effects_without_a_test():
    result = reward_latents(model(), random_sae(), PAIRS[:3], top=2)
    assert np.isnan(result.value["p"]).all() and "needs at least 6" in result.meta["tests"]["reason"]
    assert result.meta["together"]["mean"] is not None and result.meta["together"]["low"] is None


def test_ratios():
    rng = np.random.default_rng(0)
    bottom, prompts = rng.normal(3, 1, 400), np.repeat(np.arange(200), 2)
    top = 0.5 * bottom + rng.normal(0, 0.2, 400)
    found = prompt_ratio(np.stack([top, bottom], 1), bottom, prompts)
    assert found.value[0] == pytest.approx(top.sum() / bottom.sum()) and found.value[1] == pytest.approx(1)
    assert found.low[0] < 0.5 < found.high[0] and found.high[0] - found.low[0] < 0.05
    assert np.isnan(prompt_ratio(top[:8], bottom[:8], prompts[:8]).low)
    assert all(np.isnan(end) for end in prompt_ratio([], [], []))


# --- contexts -----------------------------------------------------------------------------------------------


def test_contexts_are_the_largest_activations():
    rm, sae = model(), random_sae(site="L1.resid_post")
    result = latent_contexts(rm, sae, PAIRS, (5, 0, 9), top=3, around=2)
    held = rl.capture(rm, PAIRS, ["L1.resid_post"], "response")
    z = [sae.encode(x) for x in held["L1.resid_post"]]
    for latent in (5, 0, 9):
        row = result.value.sel(latent=f"F{latent}")
        peaks = sorted((float(one[:, latent].max()) for one in z), reverse=True)[:3]
        np.testing.assert_allclose(row.sel(offset=0).fillna(0.0), peaks, atol=1e-5)
        assert float(row["density"]) == pytest.approx(np.mean([float((o[:, latent] > 0).double().mean()) for o in z]))
        for c in range(3):
            if row["text"].values[c]:
                run = [f"{p.id} {side}" for p in PAIRS for side in ("chosen", "rejected")].index(row["text"].values[c])
                at, tokens = int(row["token"][c]), held.tokens[run]
                assert row["piece"].values[c, 2] == tokens.pieces[at]
                assert row["piece"].values[c, 1] == tokens.pieces[at - 1]
                before = at - 1 - tokens.response.start
                if before >= 0:
                    assert float(row[c, 1]) == pytest.approx(float(z[run][before, latent]), abs=1e-5)
                else:
                    assert np.isnan(row[c, 1])
    never = latent_contexts(rm, constant_sae(torch.zeros(32), site="L1.resid_post"), PAIRS, [2], top=2)
    assert (
        float(never.value["density"][0]) == 0 and np.isnan(never.value).all() and not never.value["text"].values.any()
    )


@pytest.mark.parametrize(
    ("family", "site"), [("llama", "L1.resid_post"), ("gpt2", "L2.resid_post"), ("bloom", "embed")]
)
def test_the_tokens_behind_a_latent_are_those_without_which_it_changes(family, site):
    rm, sae = model(family), random_sae(site=site)
    j = int(sae.encode(rl.capture(rm, PAIRS[:1], [site])[site])[0].argmax())
    result = latent_tokens(rm, sae, PAIRS[:2], j)
    text = (PAIRS[0].messages, PAIRS[0].chosen)
    tokens = rm.tokenize(*text)
    mean = rl.capture(rm, [text], ["embed"], "response")["embed"][0].mean(0)
    clean = sae.encode(rl.capture(rm, [text], [site])[site])[0, j]
    got = result.value.sel(side="chosen")[0]
    assert (
        float(got["activation"]) == pytest.approx(float(clean), abs=1e-5)
        and np.isnan(got[: tokens.response.start]).all()
    )
    for p in (tokens.response.start, tokens.response.start + 2, tokens.reward_pos):
        kept = []

        def replaced(x, p=p):
            x = x.clone()
            x[:, p] = mean
            return x

        deep = rm.n_layers if site == "L2.resid_post" else 2 if site == "L1.resid_post" else 0
        batch = next(iter(rm.batches([tokens])))
        reads = rm.trunk.read_residual(deep, lambda x, kept=kept: kept.append(x[0, tokens.reward_pos].clone()))
        with torch.no_grad():
            rm.trunk.run(batch, rm.trunk.edit_residual(0, replaced), reads)
        assert abs(float(got[p]) - float(clean - sae.encode(kept[0])[j])) < 2e-5
        assert got["piece"].values[p] == tokens.pieces[p]


# --- manners ------------------------------------------------------------------------------------------------


def test_saved_drawn_and_without_traces(tmp_path):
    rm, sae = model(), random_sae(site="L1.resid_post")
    before = {k: v.clone() for k, v in rm.module.state_dict().items()}
    results = [
        latent_contributions(rm, sae, PAIRS[:2], top=3),
        clamp_latent(rm, sae, PAIRS[:2], 3, (0.0, 1.0)),
        reward_latents(rm, sae, PAIRS, top=3),
        probe_latents(rm, sae, PAIRS, top=3),
        latent_contexts(rm, sae, PAIRS[:2], [1, 2], top=2, around=1),
    ]
    for result in results:
        back = rl.load_result(result.save(tmp_path / f"{result.name}.nc"))
        assert back.dataset.equals(result.dataset) and back.meta == result.meta
        assert rl.save_chart(result, tmp_path / f"{result.name}.svg").stat().st_size > 1000
    again = reward_latents(rm, sae, PAIRS, top=3)
    assert again.value.identical(results[2].value) and again.meta == results[2].meta
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in rm.module.modules())
    assert all(torch.equal(before[k], v) for k, v in rm.module.state_dict().items())
    assert sae.W_dec.grad is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda rm: latent_contributions(rm, random_sae(31), PAIRS), r"width.*31 \(the dictionary\), 32"),
        (lambda rm: latent_contributions(rm, random_sae(site=None), PAIRS), "not known.*sae.site=None.*L3.resid_post"),
        (lambda rm: latent_contributions(rm, random_sae(), PAIRS, site="L0.resid_post"), "not two different ones"),
        (lambda rm: latent_contributions(rm, random_sae(site="L0.head"), PAIRS), "residual stream or write"),
        (lambda rm: latent_contributions(rm, random_sae(site="L1.resid_post"), PAIRS, "direct"), "one place only"),
        (lambda rm: latent_contributions(rm, random_sae(), PAIRS, "direct", "response"), "at='response'"),
        (lambda rm: latent_contributions(rm, random_sae(), PAIRS, "gradient", scale="shared"), "direct split only"),
        (lambda rm: clamp_latent(rm, random_sae(), PAIRS, 48, 1.0), "48.*from 0 to 47"),
        (lambda rm: clamp_latent(rm, random_sae(), PAIRS, -1, 1.0), "from 0 to 47"),
        (lambda rm: clamp_latent(rm, random_sae(), PAIRS, 0, float("nan")), "nan.*finite"),
        (lambda rm: clamp_latent(rm, random_sae(), PAIRS, 0, "1.5"), "'1.5'.*finite"),
        (lambda rm: require_latents(random_sae(), [0, "F3", float("nan")]), "0, 'F3', nan.*from 0 to 47"),
        (lambda rm: reward_latents(rm, random_sae(), PAIRS[:1]), "1 prompts"),
        (lambda rm: reward_latents(rm, constant_sae(torch.zeros(32)), PAIRS), "zeros only"),
        (lambda rm: probe_latents(rm, random_sae(), PAIRS, at="response"), "replace='original', at='response'"),
        (lambda rm: latent_contexts(rm, random_sae(), PAIRS, [3, 3]), "different whole numbers"),
        (lambda rm: latent_contexts(rm, random_sae(), PAIRS, []), "none"),
        (lambda rm: latent_tokens(rm, random_sae(site="L1.mlp"), PAIRS, 0), "the site L1.mlp.*resid_post"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(rl.DataError, match=message):
        call(model())


def test_a_site_that_the_model_does_not_have():
    with pytest.raises(rl.StructureError, match="layers 0 to 2"):
        latent_contributions(model(), random_sae(site="L3.resid_post"), PAIRS)


def test_a_transcoder_is_no_dictionary_of_one_site():
    sae = random_sae()
    object.__setattr__(sae, "skip", lambda x: x)
    with pytest.raises(rl.DataError, match="does not reconstruct what it reads"):
        latent_contributions(model(), sae, PAIRS)


def test_a_dictionary_of_centred_residuals():
    """Refused where the model's norm centres; what the error says to do gives the latents of the centred states."""
    sae = random_sae()
    marked = SAE(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, activation="topk", k=6, site=sae.site,
                 meta={"centred_writes": True})  # fmt: skip
    latent_contributions(model("llama"), marked, PAIRS[:1])  # RMSNorm: there was nothing to centre
    with pytest.raises(rl.DataError, match="without its mean.*LayerNorm in gpt2"):
        latent_contributions(model("gpt2"), marked, PAIRS[:1])
    x = rl.capture(model("gpt2"), PAIRS, [sae.site])[sae.site]
    centred = SAE(sae.W_enc - sae.W_enc.mean(0), sae.b_enc - sae.b_dec.mean() * sae.W_enc.sum(0), sae.W_dec, sae.b_dec,
                  activation="topk", k=6)  # fmt: skip
    torch.testing.assert_close(centred.encode(x), sae.encode(x - x.mean(1, keepdim=True)), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(sae.encode(x), centred.encode(x), atol=0.1)


def test_two_names_of_one_residual_are_one_site():
    rm = model()
    one, two = (latent_contributions(rm, random_sae(site=s), PAIRS[:2], "ablation", site=t) for s, t in
                (("L1.resid_post", None), ("L1.resid_post", "L2.resid_pre")))  # fmt: skip
    np.testing.assert_allclose(one.value, two.value, atol=1e-5)
