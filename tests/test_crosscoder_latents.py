"""Latents that carry the difference of two rewards: sums against the models' own rewards, every row by hand, and a
planted difference as an answer key."""

import copy
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import reward_lens as rl
from dictionaries import random_crosscoder
from families import STRUCTURES, TEXT_PAIRS, tiny_model
from planted import planted_model, planted_pairs
from reward_lens.engine.gradients import gradients
from reward_lens.errors import DataError
from reward_lens.methods.behaviour.edited_texts import within_prompt_sd
from reward_lens.methods.latents.crosscoder_latents import _over_all, crosscoder_latents
from reward_lens.methods.latents.latent_screening import flip_tests
from reward_lens.sae.crosscoder import Crosscoder
from reward_lens.sae.latent_scaling import latent_scaling

PAIRS = [rl.Pair(*texts, id=f"p{i}") for i, texts in enumerate(TEXT_PAIRS)]
MANY = [rl.Pair(*texts, id=f"p{i}") for i, texts in enumerate(planted_pairs("length", 12))]


@functools.cache
def model(family: str = "llama", seed: int = 1) -> rl.RewardModel:
    return rl.RewardModel(*tiny_model(family, seed=seed), name=f"{family}{seed}")


def two(family: str = "llama") -> dict[str, rl.RewardModel]:
    return {"one": model(family, 1), "two": model(family, 2)}


def gap(result, name: str) -> float:
    return next(c.gap for c in result.checks if c.name == name)


# sums, and every row by hand


@pytest.mark.parametrize("family", STRUCTURES)
@pytest.mark.parametrize("scale", ["shared", "own"])
def test_latents_bias_and_error_are_the_rewards_and_their_difference(family, scale):
    models, crosscoder = two(family), random_crosscoder()
    result = crosscoder_latents(models, crosscoder, PAIRS, scale=scale, top=None)
    assert result.meta["settings"]["estimator"] == "direct"
    assert (
        gap(result, "completeness") < 1e-5 and gap(result, "difference") < 1e-5 and gap(result, "margin split") < 1e-5
    )
    scores = [rm.score_pairs(PAIRS).value.values for rm in models.values()]
    sums = result.value.sum("latent")
    for name, expected in zip(("one", "two", "difference"), (*scores, scores[1] - scores[0]), strict=True):
        np.testing.assert_allclose(sums.sel(model=name), expected, atol=4e-5)
    states = [rl.capture(rm, PAIRS, ["L2.resid_post"])["L2.resid_post"] for rm in models.values()]
    z = crosscoder.encode(*states)
    for m, (name, rm) in enumerate(models.items()):
        u = rm.readout.direction(states[m]).u
        own = z * (u @ crosscoder.W_dec[m].T)
        error = ((states[m] - crosscoder.decode(z)[m]) * u).sum(1)
        for i, side in enumerate(("chosen", "rejected")):
            got = result.value.sel(side=side, model=name)
            for label, index in zip(got["latent"].values, got["index"].values, strict=True):
                if index >= 0:
                    np.testing.assert_allclose(got.sel(latent=label), own[i::2, index], atol=4e-5)
            np.testing.assert_allclose(got.sel(latent="error"), error[i::2], atol=4e-5)
            np.testing.assert_allclose(got.sel(latent="b_dec"), (u @ crosscoder.b_dec[m])[i::2], atol=4e-5)
        got = result.value.sel(side="margin", model=name)
        index = int(got["index"][0])
        mean_u = (u[::2] + u[1::2]) / 2
        shared = (z[::2, index] - z[1::2, index]) * (mean_u @ crosscoder.W_dec[m][index])
        expected = shared if scale == "shared" else own[::2, index] - own[1::2, index]
        np.testing.assert_allclose(got[:, 0], expected, atol=4e-5)
    kept = result.value["index"].values[result.value["kind"].values == "latent"]
    assert not z[:, sorted(set(range(20)) - set(kept.tolist()))].any()


@pytest.mark.parametrize("at", ["final", "response"])
def test_elsewhere_the_gradient_stands_for_the_direction(at):
    """Gradients taken alone, states captured alone; the rest closes the sum."""
    models, crosscoder = two(), random_crosscoder(site="L1.resid_post")
    result = crosscoder_latents(models, crosscoder, PAIRS[:2], at=at, top=None)
    assert result.meta["settings"]["estimator"] == "gradient" and result.meta["settings"]["scale"] == "own"
    scores = [rm.score_pairs(PAIRS[:2]).value.values for rm in models.values()]
    np.testing.assert_allclose(result.value.sum("latent").sel(model="difference"), scores[1] - scores[0], atol=4e-5)
    site = rl.Site.parse("L1.resid_post")
    for i, text in enumerate(t for both in model().tokenize_pairs(PAIRS[:2]) for t in both):
        span = slice(text.response.start if at == "response" else text.reward_pos, text.reward_pos + 1)
        found = [gradients(rm, text, [site]) for rm in models.values()]
        z = crosscoder.encode(*(f.values[site][span] for f in found))
        for m, name in enumerate(models):
            expected = (z * (found[m].slopes[site][span] @ crosscoder.W_dec[m].T)).sum(0)
            got = result.value.sel(side=("chosen", "rejected")[i % 2], model=name)[i // 2]
            for label, index in zip(got["latent"].values, got["index"].values, strict=True):
                if index >= 0:
                    assert float(got.sel(latent=label)) == pytest.approx(float(expected[index]), abs=4e-5)


def test_shares_sum_to_one_and_order_the_latents():
    models, crosscoder = two(), random_crosscoder()
    whole, some = (crosscoder_latents(models, crosscoder, MANY, top=top) for top in (None, 3))
    part = whole.value.sel(side="margin", model="difference").values
    total = part.sum(1)
    share = (part * total[:, None]).sum(0) / (total**2).sum()
    np.testing.assert_allclose(whole.value["share"], share, atol=1e-9)
    assert share.sum() == pytest.approx(1)
    latents = np.abs(share[whole.value["kind"].values == "latent"])
    assert (np.diff(latents) <= 0).all()
    assert (some.value["kind"] == "latent").sum() == 3 and some.value["kind"].values[3] == "other latents"
    np.testing.assert_array_equal(some.value["latent"][:3], whole.value["latent"][:3])
    np.testing.assert_allclose(some.value.sum("latent"), whole.value.sum("latent"), atol=1e-9)
    assert float(some.value["share"].sum()) == pytest.approx(1)
    inside = (some.value["share_low"] <= some.value["share"]) & (some.value["share"] <= some.value["share_high"])
    assert inside.all()
    p = some.value["p"].values[:3]
    n = some.meta["n_active"]
    assert n == len(latents) and (some.value["p_adjusted"].values[:3] >= p).all()
    smallest = np.sort(p)[0]
    assert some.value["p_adjusted"].values[:3].min() == pytest.approx(min(1, smallest * n))
    assert np.isnan(some.value["p"].values[3:]).all()


def test_models_of_equal_margins_share_no_difference_out():
    """One model under two names: what is left of the difference of its margins is rounding."""
    result = crosscoder_latents({"one": model(), "again": model()}, random_crosscoder(), PAIRS, top=3)
    assert np.abs(result.value.sel(side="margin", model="difference").sum("latent")).max() < 1e-9
    assert np.isnan(result.value["share"]).all() and np.isnan(result.value["share_low"]).all()


def test_coordinates_are_those_of_the_crosscoder_and_the_texts():
    models, crosscoder = two(), random_crosscoder()
    result = crosscoder_latents(models, crosscoder, MANY)
    kept = result.value["index"].values
    kept = kept[kept >= 0]
    states = [rl.capture(rm, MANY, ["L2.resid_post"])["L2.resid_post"] for rm in models.values()]
    z = crosscoder.encode(*states)
    found = {name: result.value[name].values[: len(kept)] for name in result.value.coords if name != "pair"}
    np.testing.assert_allclose(found["delta"], crosscoder.delta[kept], atol=1e-6)
    np.testing.assert_allclose(found["cosine"], crosscoder.cosine[kept], atol=1e-6)
    np.testing.assert_allclose(found["frequency_chosen"], (z[::2] > 0).float().mean(0)[kept], atol=1e-6)
    np.testing.assert_allclose(found["frequency_rejected"], (z[1::2] > 0).float().mean(0)[kept], atol=1e-6)
    scaled = latent_scaling(crosscoder, states, kept.tolist())
    np.testing.assert_allclose(found["nu_error"], scaled.nu_error, rtol=1e-5)
    np.testing.assert_allclose(found["nu_reconstruction"], scaled.nu_reconstruction, rtol=1e-5)
    assert list(found["stronger"]) == [("one", "two")[int(s)] for s in scaled.stronger]
    for m, name in enumerate(models):
        left = float((states[m] - crosscoder(*states)[m]).square().sum())
        expected = left / float((states[m] - states[m].mean(0)).square().sum())
        assert result.meta["fvu"][name] == pytest.approx(expected, rel=1e-4)
    assert set(result.meta["models"]) == {"one", "two"} and result.meta["models"]["two"]["model"] == "llama2"


def test_rewards_can_be_put_in_units_of_their_spread():
    models, crosscoder = two(), random_crosscoder()
    pairs = [rl.Pair("the same prompt", chosen, rejected) for _, chosen, rejected in planted_pairs("length", 6)]
    plain, scaled = (crosscoder_latents(models, crosscoder, pairs, unit=u, top=None) for u in ("reward", "reward_sd"))
    assert scaled.unit == "reward_sd"
    sums = []
    for name, rm in models.items():
        rewards = rm.score_pairs(pairs).value.values[:, :2]
        sd = within_prompt_sd(rewards, [p.prompt_key for p in pairs], [list(p.responses) for p in pairs])
        a, b = (r.value.sel(model=name, latent="error").values for r in (plain, scaled))
        np.testing.assert_allclose(b, a / sd, rtol=1e-5)
        sums.append(rewards[:, 0] / sd)
    got = scaled.value.sum("latent").sel(model="difference", side="chosen")
    np.testing.assert_allclose(got, sums[1] - sums[0], atol=1e-4)


def test_one_model_is_in_memory_at_a_time_and_any_form_of_it_does(tmp_path):
    made = []

    def loader(seed: int):
        def load():
            made.append(seed)
            return rl.RewardModel(*tiny_model("llama", seed=seed), name=f"llama{seed}")

        return load

    crosscoder = random_crosscoder()
    lazy = crosscoder_latents({"one": loader(1), "two": loader(2)}, crosscoder, PAIRS)
    assert made == [1, 2]
    assert lazy.value.identical(crosscoder_latents(two(), crosscoder, PAIRS).value)
    assert rl.load_result(lazy.save(tmp_path / "r.nc")).value.identical(lazy.value)


def test_models_of_other_widths_share_latents_but_no_directions():
    rng = torch.Generator().manual_seed(0)
    narrow, tokenizer = tiny_model("llama", seed=3)
    config = copy.deepcopy(narrow.config)
    config.hidden_size, config.head_dim = 24, narrow.config.head_dim
    torch.manual_seed(0)
    other = rl.RewardModel(type(narrow)(config).eval(), tokenizer, name="narrow")
    widths = (32, 24)
    crosscoder = Crosscoder(
        [torch.randn(w, 16, generator=rng) for w in widths], torch.zeros(16),
        [torch.randn(16, w, generator=rng) for w in widths], [torch.zeros(w) for w in widths],
        threshold=torch.zeros(16), sites=["L2.resid_post"] * 2,
    )  # fmt: skip
    result = crosscoder_latents({"one": model(), "narrow": other}, crosscoder, PAIRS)
    assert np.isnan(result.value["nu_error"].values).all() and np.isnan(result.value["cosine"].values).all()
    assert "widths differ" in result.meta["latent_scaling"] and np.isfinite(result.value.values).all()
    with pytest.raises(DataError, match="order that the crosscoder was trained in"):
        crosscoder_latents({"narrow": other, "one": model()}, crosscoder, PAIRS)


# an answer key


@functools.cache
def pays_and_not() -> dict[str, rl.RewardModel]:
    """A model that pays for a keyword, and the same whose last block cannot write the direction it pays on."""
    module, tokenizer = planted_model("keyword")
    pays = rl.RewardModel(module, tokenizer, name="pays")
    pairs = [rl.Pair(*texts) for texts in planted_pairs("keyword", 60)]
    h = rl.capture(pays, pairs, ["L1.resid_post"])["L1.resid_post"]
    paid = F.normalize((h[::2] - h[1::2]).mean(0), dim=0)
    changed = copy.deepcopy(module)
    block = changed.model.layers[-1]
    with torch.no_grad():
        for weight in (block.mlp.down_proj.weight, block.self_attn.o_proj.weight):
            weight -= torch.outer(paid, paid @ weight)
    return {"does not": rl.RewardModel(changed, tokenizer, name="does not"), "pays": pays}


def test_a_planted_difference_is_carried_by_its_latent():
    models = pays_and_not()
    texts = [rl.Pair(*texts) for texts in planted_pairs("keyword", 150, seed=7)]
    stores = tuple(rl.store_activations(rm, texts, "L1.resid_post", "reward") for rm in models.values())
    crosscoder = rl.train_crosscoder(stores, 32, 2, n_train=600 * 64, batch_size=64)
    pairs = [rl.Pair(*texts) for texts in planted_pairs("keyword", 40)]
    margins = [rm.score_pairs(pairs).value.sel(side="margin").values.mean() for rm in models.values()]
    planted = margins[1] - margins[0]
    assert planted > 1.5 and margins[0] < 0.3
    result = crosscoder_latents(models, crosscoder, pairs, top=5)
    first = result.value.sel(side="margin", model="difference").isel(latent=0)
    assert first["frequency_chosen"] > 0.95 and first["frequency_rejected"] < 0.05  # of the texts with the keyword
    assert first["share_low"] > 0.7 and first["p_adjusted"] < 0.01
    assert 0.6 < float(first.mean("pair")) / planted < 1.2
    assert abs(float(result.value["share"].values[1])) < 0.3
    with pytest.raises(DataError, match="trained on another model.*as model 1"):
        crosscoder_latents(dict(reversed(models.items())), crosscoder, pairs)


def test_one_of_many_active_latents_can_be_found():
    """40 prompts of one sign: of 1,000 tests, 9,999 flips leave no p under .1."""
    p, _, said = flip_tests(np.ones((40, 1)), [str(i) for i in range(40)], "holm", 0, of=1000)
    assert _over_all(p, 1000) < 0.05 and said["smallest_p"] < 5e-5


# bad input


def test_models_of_other_tokens_are_refused():
    module, tokenizer = tiny_model("llama", seed=2)
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>: {{ m.content }} {% endfor %}"
    other = rl.RewardModel(module, changed, name="other template")
    with pytest.raises(DataError, match="do not read the same tokens.*one tokenizer and chat template"):
        crosscoder_latents({"one": model(), "two": other}, random_crosscoder(), PAIRS)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"estimator": "direct", "at": "response"}, "'direct' where both"),
        ({"estimator": "gradient", "scale": "shared"}, "direct split only"),
        ({"top": 0}, "top=0"),
        ({"sites": ["L1.resid_post"] * 2}, "site to read the dictionary at"),
    ],
)
def test_settings_that_do_not_go_together_are_named(settings, words):
    with pytest.raises(DataError, match=words):
        crosscoder_latents(two(), random_crosscoder(), PAIRS, **settings)


def test_other_numbers_of_models_and_dead_crosscoders_are_named():
    crosscoder = random_crosscoder()
    with pytest.raises(DataError, match="models one, two, three"):
        crosscoder_latents({**two(), "three": model()}, crosscoder, PAIRS)
    with pytest.raises(DataError, match="models difference, two"):
        crosscoder_latents({"difference": model(), "two": model("llama", 2)}, crosscoder, PAIRS)
    with pytest.raises(DataError, match="1 model"):
        crosscoder_latents([model()], crosscoder, PAIRS)
    with pytest.raises(DataError, match="site to read"):
        crosscoder_latents(two(), Crosscoder(**_without_sites(crosscoder)), PAIRS)
    dead = Crosscoder(**_without_sites(crosscoder) | {"threshold": torch.full((20,), 1e6), "sites": crosscoder.sites})
    with pytest.raises(DataError, match="No latent of the crosscoder is active"):
        crosscoder_latents(two(), dead, PAIRS)
    same = [rl.Pair("a prompt", "one text", "one text")]
    with pytest.raises(DataError, match="no spread"):
        crosscoder_latents(two(), crosscoder, same, unit="reward_sd")


def _without_sites(crosscoder: Crosscoder) -> dict:
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "scale")
    return {name: getattr(crosscoder, name) for name in names}
