"""Crosscoders: planted directions of one model and of both found, latent scaling against ratios fitted by hand, stores
read side by side, runs that stop and go on."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

import reward_lens as rl
from families import TEXT_PAIRS, tiny_model
from reward_lens.engine.joined_stores import JoinedStores
from reward_lens.errors import DataError, LoadError
from reward_lens.sae.crosscoder import Crosscoder
from reward_lens.sae.crosscoder_training import CrossRun, train_crosscoder
from reward_lens.sae.joined_samples import JoinedSamples
from reward_lens.sae.latent_scaling import latent_scaling
from reward_lens.sae.recipe import Recipe, completed, geometric_median

SHARED, ONLY, WIDTHS = 24, 8, (32, 24)
SIZE = 7.0  # of the second model's activations beside the first's
SHORT = {"n_train": 40 * 32, "batch_size": 32}


def planted(n: int, seed: int = 0):
    """Sums of about three of 40 causes: 24 with a direction in either model, 8 in one only, 8 in the other only."""
    generator = torch.Generator().manual_seed(0)
    first, second = (F.normalize(torch.randn(SHARED + 2 * ONLY, w, generator=generator), dim=1) for w in WIDTHS)
    first[SHARED + ONLY :], second[SHARED : SHARED + ONLY] = 0, 0
    generator = torch.Generator().manual_seed(seed + 1)
    on = torch.rand(n, len(first), generator=generator) < 3 / len(first)
    z = on * (0.5 + torch.rand(n, len(first), generator=generator))
    return (z @ first + 1, SIZE * (z @ second) - 3), (first, SIZE * second)


DATA, KNOWN = planted(5000)
SMALL = tuple(x[:600, :12].contiguous() for x in DATA)


def same(one: Crosscoder, other: Crosscoder) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def by_hand(d: int = 12, d_sae: int = 9, seed: int = 0, widths=None, **more) -> Crosscoder:
    rng = torch.Generator().manual_seed(seed)
    widths = widths or (d, d)
    enc, dec, bias = ([torch.randn(shape, generator=rng) for shape in shapes] for shapes in
                      ([(w, d_sae) for w in widths], [(d_sae, w) for w in widths], [(w,) for w in widths]))  # fmt: skip
    settings = {"threshold": torch.full((d_sae,), 0.5), "scale": torch.tensor([1.0, 0.5]), **more}
    return Crosscoder([w / d for w in enc], torch.randn(d_sae, generator=rng), dec, bias, **settings)


# what is found


def test_planted_directions_are_found_with_the_models_they_are_of():
    crosscoder = train_crosscoder(DATA, 64, 3, n_train=800 * 64, batch_size=64)
    units = [s * torch.ones(w) for s, w in zip(crosscoder.scale, WIDTHS, strict=True)]
    wide = [torch.cat([w * u for w, u in zip(pair, units, strict=True)], 1) for pair in (KNOWN, crosscoder.W_dec)]
    closest, at = (F.normalize(wide[0], dim=1) @ F.normalize(wide[1], dim=1).T).max(1)
    assert closest.min() > 0.98
    delta = crosscoder.delta[at]
    assert (delta[:SHARED] - 0.5).abs().max() < 0.05  # though the second model's activations are seven times as large
    assert delta[SHARED : SHARED + ONLY].max() < 0.1 and delta[SHARED + ONLY :].min() > 0.9
    held_out, _ = planted(2000, seed=5)
    z = crosscoder.encode(*held_out)
    assert (z > 0).sum(1).float().mean() == pytest.approx(3, abs=0.4)
    for x, found, fvu in zip(held_out, crosscoder(*held_out), crosscoder.meta["fvu_of_models"], strict=True):
        left = float((x - found).square().sum() / (x - x.mean(0)).square().sum())
        assert left < 0.1 and left == pytest.approx(fvu, abs=0.05)
    torch.testing.assert_close(crosscoder.norms.sum(0), torch.ones(64))


def shrunk_and_true(n: int = 4000):
    """Three latents of model 1. 0: truly absent from model 2. 1: in model 2 at full strength, with a row shrunk to a
    tenth. 2: in model 2 at full strength, written there by latent 3, which is active with it."""
    rng = torch.Generator().manual_seed(1)
    directions = torch.linalg.qr(torch.randn(12, 12, generator=rng)).Q[:3]
    z = (torch.rand(n, 3, generator=rng) < 0.2) * (1 + torch.rand(n, 3, generator=rng))
    xs = (z @ directions, z @ (directions * torch.tensor([[0.0], [1.0], [1.0]])))
    rows = torch.cat([directions, directions[2:]])
    in_first, in_second = torch.tensor([1.0, 1, 1, 0]), torch.tensor([0, 0.1, 0, 1.0])
    crosscoder = Crosscoder(
        [rows.T, torch.zeros(12, 4)], torch.zeros(4), [rows * in_first[:, None], rows * in_second[:, None]],
        [torch.zeros(12)] * 2, threshold=torch.full((4,), 0.5),
    )  # fmt: skip
    return xs, crosscoder, z


def test_latent_scaling_tells_a_shrunk_and_a_decoupled_latent_from_a_true_one():
    xs, crosscoder, z = shrunk_and_true()
    torch.testing.assert_close(crosscoder.encode(*xs)[:, :3], z, atol=1e-5, rtol=0)
    assert crosscoder.delta.tolist() == pytest.approx([0, 0.1 / 1.1, 0, 1])
    found = latent_scaling(crosscoder, xs)
    assert found.stronger.tolist() == [0, 0, 0, 1] and found.n_active.tolist() == (z > 0).sum(0).tolist() + [
        int((z[:, 2] > 0).sum())
    ]
    assert found.nu_error[:3].tolist() == pytest.approx([0, 1, 0], abs=1e-5)
    assert found.nu_reconstruction[:3].tolist() == pytest.approx([0, 0.1, 1], abs=1e-5)


def test_latent_scaling_is_a_ratio_of_least_squares():
    """Every beta fitted by numpy on the stacked samples, of a crosscoder that is no good."""
    crosscoder = by_hand()
    xs = tuple(torch.randn(1500, 12, generator=torch.Generator().manual_seed(m)) * (1 + m) for m in range(2))
    found = latent_scaling(crosscoder, xs, [4, 0, 7])
    z, outs = crosscoder.encode(*xs), crosscoder(*xs)
    for i, j in enumerate([4, 0, 7]):
        s = int(crosscoder.norms[:, j].argmax())
        d = crosscoder.W_dec[s][j] * crosscoder.scale[s]
        betas = {}
        for m in range(2):
            own = z[:, j, None] * crosscoder.W_dec[m][j]
            targets = {"error": xs[m] - outs[m] + own, "reconstruction": outs[m] - crosscoder.b_dec[m]}
            for name, target in targets.items():
                design = (z[:, j, None] * d).double().flatten().numpy()[:, None]
                fitted = np.linalg.lstsq(design, (target * crosscoder.scale[m]).double().flatten().numpy(), rcond=None)
                betas[name, m] = float(fitted[0][0])
        assert float(found.nu_error[i]) == pytest.approx(betas["error", 1 - s] / betas["error", s], rel=1e-3)
        expected = betas["reconstruction", 1 - s] / betas["reconstruction", s]
        assert float(found.nu_reconstruction[i]) == pytest.approx(expected, rel=1e-3)
    with pytest.raises(DataError, match="widths 5, 7"):
        latent_scaling(by_hand(widths=(5, 7)), (torch.ones(3, 5), torch.ones(3, 7)))
    for latents in ([-1], [0, crosscoder.d_sae]):  # -1 was taken for the last
        with pytest.raises(DataError, match=f"no such latent.*{latents[-1]}.*0 to {crosscoder.d_sae - 1}"):
            latent_scaling(crosscoder, xs, latents)


# the training


def new_run(sources=SMALL) -> CrossRun:
    samples = JoinedSamples(sources, 0, torch.device("cpu"))
    return CrossRun(samples, completed(Recipe(24, 3, **SHORT), samples))


def test_each_model_has_its_own_scale_and_half_of_the_loss():
    run = new_run()
    for x, part in zip(SMALL, run.scale_in.split((12, 12)), strict=True):
        assert part.unique().numel() == 1
        assert ((x - x.mean(0)) * part).square().sum(1).mean() == pytest.approx(1, rel=1e-5)
    middles = torch.cat([geometric_median(x) for x in SMALL])
    torch.testing.assert_close(run.net.b_dec.detach(), middles * run.scale_in)
    dec = run.net.dec.detach()
    torch.testing.assert_close(dec[:, :12].norm(dim=1) + dec[:, 12:].norm(dim=1), torch.ones(24))
    torch.testing.assert_close((run.net.enc.detach() * dec).sum(1), torch.ones(24))  # along its row x is kept
    x, _ = next(run.samples.batches(32))
    scaled = x * run.scale_in
    out = run._forward(scaled).parts[-1].detach()
    expected = torch.stack([(scaled - out)[:, part].square().sum(1).mean() for part in (slice(12), slice(12, None))])
    run._step(x, None)
    assert float(run.sums[1]) == pytest.approx(float(expected.mean()), rel=1e-5)
    dec = run.net.dec.detach()
    torch.testing.assert_close(dec[:, :12].norm(dim=1) + dec[:, 12:].norm(dim=1), torch.ones(24))


def test_what_comes_out_is_what_was_trained():
    """In the models' own units, with the threshold in place of the selection."""
    run = new_run()
    run.train(None, 1000, None, None, None, None)
    crosscoder = Crosscoder(**run.weights())
    x = torch.cat(SMALL, 1) * run.scale_in
    pre = (x - run.net.b_dec) @ run.net.enc.T + run.net.b_enc
    z = torch.where(pre > run.level, pre, 0.0)
    torch.testing.assert_close(crosscoder.encode(*SMALL), z, atol=1e-5, rtol=1e-4)
    out = (z @ run.net.dec + run.net.b_dec) / run.scale_out
    torch.testing.assert_close(torch.cat(crosscoder(*SMALL), 1), out.detach(), atol=1e-4, rtol=1e-4)
    assert not any(p.requires_grad for p in crosscoder.parameters()) and crosscoder.threshold.unique().numel() == 1


def model(seed: int) -> rl.RewardModel:
    return rl.RewardModel(*tiny_model("llama", seed=seed), name=f"m{seed}")


PAIRS = [rl.Pair(f"{prompt} {i}", *both) for i in range(3) for prompt, *both in TEXT_PAIRS if isinstance(prompt, str)]


@pytest.fixture(scope="module")
def models():
    return model(1), model(2)


def stored(rm, folder=None, exclude=("first",), pairs=PAIRS, **settings):
    site = settings.pop("site", "L2.resid_post")
    return rl.store_activations(rm, pairs, site, folder=folder, exclude=exclude, **settings)


def iterated(sources):
    return zip(*(torch.cat([x] * 3).split(70) for x in sources), strict=True)


class Stop(Exception):
    pass


@pytest.mark.parametrize("source", ["tensors", "iterator", "chunks", "stores"])
def test_a_stopped_run_goes_on_to_the_same_weights(source, tmp_path, models):
    stores = [stored(rm, tmp_path / rm.name, shard_mb=mb) for rm, mb in zip(models, (0.01, 0.02), strict=True)]
    make = {
        "tensors": lambda: SMALL, "iterator": lambda: iterated(SMALL), "chunks": lambda: list(iterated(SMALL)),
        "stores": lambda: tuple(rl.ActivationStore.open(store.folder) for store in stores),
    }[source]  # fmt: skip
    settings = {**SHORT, "report_every": 3}
    whole = train_crosscoder(make(), 24, 3, **settings)

    def stop(entry):
        if entry["step"] == 27:
            raise Stop

    checkpoint = tmp_path / "run"
    with pytest.raises(Stop):
        train_crosscoder(make(), 24, 3, checkpoint=checkpoint, checkpoint_every=10, progress=stop, **settings)
    seen = []
    resumed = train_crosscoder(make(), 24, 3, checkpoint=checkpoint, progress=seen.append, **settings)
    assert same(whole, resumed) and seen[0]["step"] == 21
    assert resumed.meta["progress"] == whole.meta["progress"]
    with pytest.raises(DataError, match="k 3, now 4"):
        train_crosscoder(make(), 24, 4, checkpoint=checkpoint, **settings)


def test_one_seed_repeats_and_two_differ():
    one, again, other = (train_crosscoder(SMALL, 24, 3, seed, **SHORT) for seed in (0, 0, 1))
    assert same(one, again) and not same(one, other)


def test_three_models_are_trained_together():
    found = train_crosscoder((*SMALL, SMALL[0][:, :5]), 24, 3, names=["a", "b", "c"], **SHORT)
    assert found.widths == (12, 12, 5) and found.norms.shape == (3, 24) and len(found.decode(torch.zeros(24))) == 3
    torch.testing.assert_close(found.norms.sum(0), torch.ones(24))
    assert found.names == ("a", "b", "c") and "c [5]" in repr(found)
    with pytest.raises(DataError, match="3 models"):
        _ = found.delta


def test_few_samples_are_said_to_be_few():
    few = train_crosscoder(tuple(x[:200] for x in SMALL), 48, 2, n_train=3200, batch_size=64)
    assert not few.meta["enough"]["passed"] and "200 different samples" in few.meta["trust"]
    assert few.meta["settings"]["k"] == 2 and json.dumps(few.meta)


# stores side by side


def test_stores_are_read_side_by_side_whatever_their_shards(tmp_path, models):
    """A batch holds the rows of one sample from both stores: found again by their values."""
    sizes = (0.01, 0.037)
    stores = [stored(rm, tmp_path / rm.name, shard_mb=mb) for rm, mb in zip(models, sizes, strict=True)]
    assert len({len(store.shard_sizes) for store in stores}) == 2
    joined = JoinedStores(stores)
    every = torch.cat([store.tensor() for store in stores], 1)
    got = torch.cat(list(joined.batches(64, seed=3, buffer=100)))
    assert got.shape == every.shape == (len(joined), 64) and not torch.equal(got, every)
    order = [rows[rows[:, 0].argsort()] for rows in (got, every)]
    torch.testing.assert_close(order[0], order[1])
    batches = joined.batches(64, seed=3, buffer=100)
    next(batches)
    again = joined.batches(64, seed=3, buffer=100, start=json.loads(json.dumps(batches.state())))
    torch.testing.assert_close(next(again), got[64:128])
    column = stores[0].column("position", 5, len(joined) - 3)
    assert column.tolist() == [stores[0].at(i).position for i in range(5, len(joined) - 3)]


def test_stores_say_what_they_are_of(models):
    found = train_crosscoder(tuple(stored(rm) for rm in models), 24, 3, **SHORT)
    assert found.names == ("m1", "m2") and found.sites == ("L2.resid_post",) * 2
    fingerprints = [one["fingerprint"] for one in found.meta["trained_on"]]
    assert len(set(fingerprints)) == 2 and found.meta["n_samples"] == len(stored(models[0]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pairs": PAIRS[1:] + PAIRS[:1]}, "inputs_hash"),
        ({"pairs": PAIRS[:-1]}, "inputs_hash"),
        ({"positions": "all"}, "positions all"),
        ({"exclude": ("sinks",), "sink_multiple": 1.05}, "n_samples"),
        ({"per_text": 10, "seed": 1}, r"position \d+ \(store 2\), \d+ \(store 1\) at sample"),
    ],
)
def test_stores_of_other_samples_are_refused(change, words, models):
    one = stored(models[0], **({"per_text": 10} if "per_text" in change else {}), positions="response")
    with pytest.raises(DataError, match=words):
        train_crosscoder((one, stored(models[1], **{"positions": "response", **change})), 24, 3, **SHORT)


def test_stores_of_other_tokens_are_refused(models, monkeypatch):
    """As of two tokenizers that cut a text into equally many tokens."""
    one, other = (stored(rm) for rm in models)
    column = other.column
    monkeypatch.setattr(other, "column", lambda name, *rows: column(name, *rows) + (name == "token"))
    with pytest.raises(DataError, match=r"token \d+ \(store 2\), \d+ \(store 1\) at sample 0.*one tokenizer"):
        train_crosscoder((one, other), 24, 3, **SHORT)


# bad input


NAN = SMALL[1].clone()
NAN[7, 3] = torch.nan


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ((SMALL[0], SMALL[1][:-1]), "the same n"),
        (tuple(x[:150] for x in SMALL), "150 samples.*at least 200.*take 50 more"),
        ((SMALL[0], NAN), "NaN or infinity"),
        ((SMALL[0], torch.ones(600, 4)), "samples of model 1 are all equal"),
        ((SMALL[0], SMALL[1].long()), "int64"),
        (SMALL[0], "several models.*one Tensor"),
        ((SMALL[0],), "several models.*1 of them"),
        ((), "several models.*0 of them"),
        (iter([SMALL[0]] * 9), "not a batch of samples"),
        (iter([SMALL, SMALL[::-1], (SMALL[0], SMALL[1][:, :5])]), "different widths"),
        (7, "not understood.*int"),
    ],
)
def test_what_cannot_be_trained_on_is_named(sources, words):
    with pytest.raises(DataError, match=words):
        train_crosscoder(sources, 24, 3, **{**SHORT, "n_train": 1792})


def test_settings_out_of_range_are_named():
    with pytest.raises(DataError, match="k=25"):
        train_crosscoder(SMALL, 24, 25, **SHORT)
    with pytest.raises(DataError, match="how long"):
        train_crosscoder(iterated(SMALL), 24, 3)


# the module and its file


def test_a_crosscoder_is_saved_and_loaded(tmp_path):
    crosscoder = by_hand(widths=(12, 7), names=["one", None], sites=["L1.resid_post", None], meta={"seed": 3})
    found = Crosscoder.load(crosscoder.save(tmp_path / "c"))
    assert same(found, crosscoder)
    for name in ("names", "sites", "meta", "widths", "d_sae"):
        assert getattr(found, name) == getattr(crosscoder, name)
    with pytest.raises(LoadError, match="cannot be read"):
        Crosscoder.load(tmp_path)
    with pytest.raises(DataError, match="meta cannot be written"):
        by_hand(meta={"seen": {1}}).save(tmp_path / "other")
    shared = shrunk_and_true()[1]  # both models have one b_dec
    assert same(Crosscoder.load(shared.save(tmp_path / "shared")), shared)
    file = tmp_path / "c" / "crosscoder.safetensors"
    with safe_open(file, framework="pt") as opened:
        head, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    for changed in ({"b_enc": torch.zeros(3)}, {"b_dec.2": tensors.pop("b_dec.1")}):
        save_file({**tensors, **changed}, file, metadata=head)
        with pytest.raises(LoadError, match="lack or do not fit"):
            Crosscoder.load(tmp_path / "c")
    rl.train_sae(SMALL[0], 24, 3, checkpoint=tmp_path, **SHORT)
    (tmp_path / "training.safetensors").rename(tmp_path / "crosscoder.safetensors")
    with pytest.raises(LoadError, match="format 'reward-lens sae training 1'"):
        Crosscoder.load(tmp_path)


def test_the_formulas_of_the_module():
    crosscoder = by_hand()
    xs = [torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(m), requires_grad=True) for m in range(2)]
    pre = sum((x - b) @ w for x, b, w in zip(xs, crosscoder.b_dec, crosscoder.W_enc, strict=True)) + crosscoder.b_enc
    z = crosscoder.encode(*xs)
    torch.testing.assert_close(z, torch.where(pre > 0.5, pre, 0.0))
    for out, w, b in zip(crosscoder(*xs), crosscoder.W_dec, crosscoder.b_dec, strict=True):
        torch.testing.assert_close(out, z @ w + b)
    first, second = crosscoder.W_dec
    norms = first.norm(dim=1), 0.5 * second.norm(dim=1)
    torch.testing.assert_close(crosscoder.delta, norms[1] / (norms[0] + norms[1]))
    torch.testing.assert_close(crosscoder.cosine, F.cosine_similarity(first, second, dim=1))
    assert torch.autograd.grad(z.sum(), xs[0])[0].abs().sum() > 0
    wide = by_hand(widths=(12, 7))
    assert wide.cosine.isnan().all() and wide.delta.isfinite().all()
    with pytest.raises(DataError, match="do not fit the crosscoder"):
        wide.encode(xs[0], xs[1])
    with pytest.raises(DataError, match="do not fit the crosscoder"):
        crosscoder.encode(xs[0], xs[1][:, :2])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"threshold": -torch.ones(9)}, "negative"),
        ({"threshold": torch.ones(8)}, r"threshold \[8\]"),
        ({"scale": torch.ones(2, 1)}, r"scale \[2, 1\]"),
        ({"scale": torch.zeros(2)}, "not positive"),
        ({"scale": torch.ones(3)}, "3 of scale for 2"),
        ({"names": ["a"]}, "1 of names for 2"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, words):
    with pytest.raises(DataError, match=words):
        by_hand(**change)
    parts = by_hand()
    with pytest.raises(DataError, match=r"b_enc \[9, 1\]"):
        Crosscoder(parts.W_enc, torch.ones(9, 1), parts.W_dec, parts.b_dec, threshold=parts.threshold)
    one = torch.ones(3, 4)
    with pytest.raises(DataError, match=r"1 model\(s\).*W_dec \[3, 4\]"):
        Crosscoder([one], torch.ones(4), [one], [torch.ones(3)], threshold=torch.ones(4))
