"""`sae_report` and `spliced_rewards` for dictionaries whose answers are known."""

import functools

import numpy as np
import pytest
import torch

import reward_lens as rl
from dictionaries import constant_sae, identity_sae, random_sae
from encoders import loaded
from families import STRUCTURES, TEXT_PAIRS, tiny_model
from reward_lens import stats
from reward_lens.engine.intervention import values
from reward_lens.methods.latents.sae_report import sae_report
from reward_lens.methods.latents.splicing import spliced_rewards
from reward_lens.sae.dictionary import SAE

PAIRS = [rl.Pair(*texts, id=f"p{i}") for i, texts in enumerate(TEXT_PAIRS)]


@functools.cache
def model(family: str = "llama") -> rl.RewardModel:
    return rl.RewardModel(*tiny_model(family, seed=1), name=family)


def states(rm, site: str) -> list[torch.Tensor]:
    return [x.double() for x in rl.capture(rm, PAIRS, [site], "response")[site]]


@pytest.mark.parametrize("family", STRUCTURES)
@pytest.mark.parametrize("site", ["L0.resid_post", "L2.resid_post"])
def test_a_perfect_dictionary_changes_nothing(family, site):
    report = sae_report(model(family), identity_sae(site=site), PAIRS).value
    for at in ("final", "response"):
        got = report.sel(at=at)
        assert float(got.sel(measure="reward_recovered")) == pytest.approx(1, abs=1e-9)
        assert float(got.sel(measure="fvu")) < 1e-12 and float(got.sel(measure="error_norm")) < 1e-7
        assert float(got.sel(measure="sign_agreement")) == 1 and float(got.sel(measure="accuracy_change")) == 0
        assert float(got.sel(measure="l0")) == 32
        assert float(got.sel(measure="accuracy")) == float(got.sel(measure="accuracy_spliced"))
    spliced = spliced_rewards(model(family), identity_sae(site=site), PAIRS).value
    np.testing.assert_allclose(spliced.sel(run="sae, response"), spliced.sel(run="clean"), atol=1e-6)
    np.testing.assert_allclose(spliced.sel(run="clean"), model(family).score_pairs(PAIRS).value, atol=2e-5)


def test_a_dictionary_of_zeros():
    rm, sae = model(), constant_sae(torch.zeros(32), d_sae=5)
    result = sae_report(rm, sae, PAIRS)
    x = torch.cat(states(rm, "L2.resid_post"))
    got = result.value.sel(at="response")
    expected = float(x.square().sum() / (x - x.mean(0)).square().sum())
    assert float(got.sel(measure="fvu")) == pytest.approx(expected, rel=1e-6)
    assert float(got.sel(measure="l0")) == 0 and float(got.sel(measure="dead")) == 1
    assert float(got.sel(measure="error_norm")) == 1
    assert result.meta["dead"]["response"] == {"latents": 5, "of": 5, "positions": len(x)}
    zero = float(rm.readout.reward(torch.zeros(32)))
    spliced = spliced_rewards(rm, sae, PAIRS).value.sel(run="sae, final")
    np.testing.assert_allclose(spliced.sel(side=["chosen", "rejected"]), zero, atol=2e-5)
    assert float(result.value.sel(at="final", measure="accuracy_spliced")) == 0.5  # all rewards equal: ties
    clean = rm.score_pairs(PAIRS).value.sel(side=["chosen", "rejected"]).values
    ends = torch.stack([h[-1] for h in states(rm, "L2.resid_post")])
    mean = float(rm.readout.reward(ends.mean(0).float()))
    recovered = 1 - ((zero - clean) ** 2).sum() / ((mean - clean) ** 2).sum()
    assert float(result.value.sel(at="final", measure="reward_recovered")) == pytest.approx(recovered, abs=1e-3)


def test_the_mean_as_reconstruction_recovers_nothing():
    rm = model()
    ends = torch.stack([h[-1] for h in states(rm, "L1.resid_post")])
    got = sae_report(rm, constant_sae(ends.mean(0).float(), site="L1.resid_post"), PAIRS).value.sel(at="final")
    assert float(got.sel(measure="reward_recovered")) == pytest.approx(0, abs=1e-4)
    assert float(got.sel(measure="fvu")) == pytest.approx(1, abs=1e-5)


def test_where_the_mean_state_is_every_state_there_is_nothing_to_recover():
    """All texts are one, so what is left to divide by is rounding."""
    same = [rl.Pair("a prompt", "one text", "one text", id=f"p{i}") for i in range(3)]
    got = sae_report(model(), random_sae(site="L1.resid_post"), same).value
    for measure in ("fvu", "reward_recovered"):
        assert np.isnan(got.sel(measure=measure, at="final")) and np.isfinite(got.sel(measure=measure, at="response"))


def test_an_encoder_is_measured_at_its_first_token():
    """Its reward position, which is not in the response."""
    rm, site = loaded("bert"), "L1.resid_post"
    sae, pairs = random_sae(site=site), [pair for pair in PAIRS if isinstance(pair.prompt, str)]
    x = rl.capture(rm, pairs, [site])[site].double()
    left = (x - sae(x.float())).square().sum() / (x - x.mean(0)).square().sum()
    dead = (sae.encode(x.float()) == 0).all(0).double().mean()
    got = sae_report(rm, sae, pairs).value.sel(at="final")
    assert float(got.sel(measure="fvu")) == pytest.approx(float(left), rel=1e-4)
    assert float(got.sel(measure="dead")) == pytest.approx(float(dead))
    text, source = [(pairs[0].messages, pairs[0].chosen)], {site: rl.constant(x.mean(0).float())}
    spliced = spliced_rewards(rm, sae, pairs).value.sel(side="chosen", run="mean, final")[0]
    assert abs(float(spliced - rl.intervene(rm, text, source, "final").value.sel(state="intervened")[0])) < 5e-5


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_splicing_is_an_intervention_and_the_measures_are_of_it(family):
    rm, sae = model(family), random_sae(site="L1.resid_post", k=12)
    spliced = spliced_rewards(rm, sae, PAIRS).value
    for i, pair in enumerate(PAIRS[:3]):
        for at in ("final", "response"):
            x = rl.capture(rm, [(pair.messages, pair.chosen)], ["L1.resid_post"], at)["L1.resid_post"][0]
            source = {"L1.resid_post": values(sae(x.reshape(-1, 32)))}
            state = rl.intervene(rm, [(pair.messages, pair.chosen)], source, at).value.sel(state="intervened")
            assert abs(float(spliced.sel(side="chosen", run=f"sae, {at}")[i]) - float(state[0])) < 5e-5
    result = sae_report(rm, sae, PAIRS)
    got = result.value.sel(at="response")
    clean, new, mean = (spliced.sel(run=run).values for run in ("clean", "sae, response", "mean, response"))
    recovered = 1 - ((new - clean)[:, :2] ** 2).sum() / ((mean - clean)[:, :2] ** 2).sum()
    assert float(got.sel(measure="reward_recovered")) == pytest.approx(recovered, abs=1e-6)
    same = (np.sign(clean[:, 2]) == np.sign(new[:, 2])).astype(float)
    over = stats.proportion_interval(same, [p.prompt_key for p in PAIRS])
    cell = {"measure": "sign_agreement", "at": "response"}
    assert float(result.value.sel(cell)) == over.mean and float(result.low.sel(cell)) == over.low
    x = torch.cat(states(rm, "L1.resid_post")).float()
    assert float(got.sel(measure="dead")) == pytest.approx(float((~sae.encode(x).any(0)).double().mean()))
    left = (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert float(got.sel(measure="fvu")) == pytest.approx(float(left), rel=1e-4)
    low, high = (float(e.sel(measure="fvu", at="response")) for e in (result.low, result.high))
    assert low < float(left) < high


def test_latents_of_other_seeds():
    rm, sae = model(), random_sae()
    order = torch.randperm(48, generator=torch.Generator().manual_seed(3))
    shuffled = SAE(sae.W_enc[:, order], sae.b_enc[order], sae.W_dec[order], sae.b_dec, activation="topk", k=6,
                   apply_b_dec_to_input=True, site=sae.site)  # fmt: skip
    eye = torch.eye(32)
    other = SAE(eye, torch.zeros(32), eye, torch.zeros(32), activation="relu", site=sae.site)
    same, different = sae_report(rm, sae, PAIRS, seeds=[shuffled, other], n_relevant=6).meta["stability"]
    assert same["matched"] == 1 and same["median_cosine"] == pytest.approx(1, abs=1e-5) and same["n"] == 6
    assert same["low"] == pytest.approx(stats.wilson(6, 6)[0]) and same["matched_active"] == 1
    assert different["matched"] < 0.5 and different["n_active"] == same["n_active"] > 6
    assert sae_report(rm, sae, PAIRS[:2]).meta["stability"] == []


def test_saved_and_without_traces(tmp_path):
    rm = model()
    result = sae_report(rm, random_sae(), PAIRS[:3])
    back = rl.load_result(result.save(tmp_path / "report.nc"))
    assert back.dataset.equals(result.dataset) and back.meta == result.meta
    assert rl.save_chart(result, tmp_path / "report.svg").stat().st_size > 1000
    assert np.isnan(result.low.sel(measure="fvu")).all() and np.isnan(result.low.sel(measure="l0")).all()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in rm.module.modules())


def test_a_decoder_that_is_no_sum_of_latents_is_refused():
    class Scaled(SAE):
        def decode(self, z):
            return 2 * super().decode(z)

    plain = random_sae()
    scaled = Scaled(plain.W_enc, plain.b_enc, plain.W_dec, plain.b_dec, activation="topk", k=6, site=plain.site)
    with pytest.raises(rl.CheckFailed, match="decoder"):
        sae_report(model(), scaled, PAIRS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda rm: sae_report(rm, random_sae(31), PAIRS), r"31 \(the dictionary\)"),
        (lambda rm: sae_report(rm, random_sae(site=None), PAIRS), "not known"),
        (lambda rm: sae_report(rm, random_sae(), PAIRS, seeds=[random_sae(site="L0.resid_post")]), "not two different"),
        (lambda rm: sae_report(rm, random_sae(), PAIRS, n_relevant=0), "n_relevant=0"),
        (lambda rm: spliced_rewards(rm, random_sae(31), PAIRS), "equal widths"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(rl.DataError, match=message):
        call(model())
