"""Training of dictionaries: a known one found again, sparse against dense arithmetic, runs that stop and go on."""

import math

import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from reward_lens.errors import DataError
from reward_lens.sae.batches import Samples
from reward_lens.sae.dictionary import SAE
from reward_lens.sae.recipe import Recipe, completed, geometric_median, usual_rate
from reward_lens.sae.training import Run, train_sae
from reward_lens.sae.transcoder import train_transcoder
from reward_lens.sae.variants import VARIANTS, Net, batchtopk_entries, forward

CPU = torch.device("cpu")
ATOMS, WIDTH, ON = 64, 32, 3


def sparse_data(n: int, seed: int = 0):
    """Samples that are sums of about three of 64 known directions of norm 1, and these."""
    generator = torch.Generator().manual_seed(seed)
    atoms = F.normalize(torch.randn(ATOMS, WIDTH, generator=generator), dim=1)
    on = torch.rand(n, ATOMS, generator=generator) < ON / ATOMS
    return (on * (0.5 + torch.rand(n, ATOMS, generator=generator))) @ atoms, atoms


DATA, KNOWN = sparse_data(5000)
SMALL = DATA[:600, :12].contiguous()
SHORT = {"n_train": 40 * 32, "batch_size": 32}


def same(one: SAE, other: SAE) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# a known dictionary


@pytest.mark.parametrize(
    ("variant", "offset", "size"), [("batchtopk", 0.0, 1.0), ("topk", 0.0, 1.0), ("batchtopk", 20.0, 50.0)]
)
def test_a_known_dictionary_is_found(variant, offset, size):
    """In any unit, and beside an offset shared by all samples that is a hundred times as long as a sample."""
    data = size * (DATA + offset)
    sae = train_sae(data[:4500], ATOMS, ON, variant, n_train=1000 * 64, batch_size=64)
    closest = (KNOWN @ sae.W_dec.T).amax(1)
    assert closest.mean() >= 0.95
    held_out = data[4500:]
    z = sae.encode(held_out)
    assert (z > 0).any(0).logical_not().double().mean() <= 0.02
    assert (z > 0).sum(1).double().mean() == pytest.approx(ON, abs=0.3)
    assert (sae(held_out) - held_out).square().sum() < 0.25 * (held_out - held_out.mean(0)).square().sum()


# arithmetic


def random_net(**options) -> tuple[Net, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    enc, dec = (torch.randn(24, 7, generator=generator, dtype=torch.float32) for _ in range(2))
    net = Net(enc, dec, torch.randn(7, generator=generator), jumps=False, **{"skip": False, "centred": True, **options})
    with torch.no_grad():
        net.b_enc.copy_(0.1 * torch.randn(24, generator=generator))
        if net.skip is not None:
            net.skip.copy_(torch.randn(7, 7, generator=generator))
    return net, torch.randn(10, 7, generator=generator)


def dense_parts(net: Net, x, variant: str, k: int, prefixes) -> list[torch.Tensor]:
    """The same by masks over the whole table."""
    pre = (x - net.b_dec if net.centred else x) @ net.enc.T + net.b_enc
    if variant == "topk":
        mask = torch.zeros_like(pre).scatter(1, pre.topk(k, dim=1).indices, 1.0)
    else:
        mask = (pre >= pre.flatten().topk(k * len(x)).values[-1]).float()
    z = F.relu(pre) * mask
    base = net.b_dec if net.skip is None else net.b_dec + x @ net.skip.T
    return [z[:, :p] @ net.dec[:p] + base for p in (prefixes if variant == "matryoshka" else [24])]


@pytest.mark.parametrize("options", [{}, {"skip": True, "centred": False}])
@pytest.mark.parametrize("variant", ["topk", "batchtopk", "matryoshka"])
def test_sparse_arithmetic_is_the_dense_one(variant, options):
    net, x = random_net(**options)
    prefixes, target = (3, 9, 24), torch.randn(10, 7, generator=torch.Generator().manual_seed(4))
    done = forward(net, x, variant, 4, prefixes, 0.3, 0.1, torch.float32)
    expected = dense_parts(net, x, variant, 4, prefixes)
    grads = []
    for parts in (done.parts, expected):
        for part, other in zip(parts, expected, strict=True):
            torch.testing.assert_close(part, other)
        net.zero_grad()
        sum((part - target).square().sum() for part in parts).backward()
        grads.append({name: p.grad.clone() for name, p in net.named_parameters()})
    assert grads[0].keys() >= {"enc", "dec", "b_enc", "b_dec"}
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("level", [0.0, 0.1, 1.0, 50.0])
def test_the_shortcut_of_batchtopk_keeps_the_same_cells(level):
    pre = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    entries = batchtopk_entries(pre, 5, level)
    kept = torch.zeros(30, 20, dtype=torch.bool)
    kept[entries.rows, entries.cols] = True
    assert torch.equal(kept, pre >= pre.flatten().topk(150).values[-1])
    assert len(batchtopk_entries(pre, 20, level).rows) == int((pre > 0).sum())
    assert len(batchtopk_entries(-pre.abs(), 5, level).rows) == 0


def test_jumprelu_thresholds_learn_from_their_window():
    """One latent, samples at -1, 0.9, 1.04 and 3, threshold 1, window from 0.95 to 1.05: one sample is in it."""
    net = Net(torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1), jumps=True, skip=False, centred=True)
    net.threshold.data.fill_(1.0)
    x = torch.tensor([[-1.0], [0.9], [1.04], [3.0]])
    done = forward(net, x, "jumprelu", 1, (), 0.0, 0.1, torch.float32)
    assert done.parts[0].flatten().tolist() == pytest.approx([0, 0, 1.04, 3])
    assert done.active.item() == 0.5 and done.fired.tolist() == [True]
    (by_sum,) = torch.autograd.grad(done.parts[0].sum(), net.threshold, retain_graph=True)
    assert by_sum.item() == pytest.approx(-1.0 / 0.1)
    (by_count,) = torch.autograd.grad(done.active, net.threshold)
    assert by_count.item() == pytest.approx(-0.25 / 0.1)


def test_geometric_median_has_the_least_sum_of_distances():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    x[:5] += 1000
    best = scipy.optimize.minimize(lambda m: (x - torch.tensor(m)).norm(dim=1).sum().item(), [0.0] * 3, tol=1e-10)
    torch.testing.assert_close(geometric_median(x), torch.tensor(best.x).float(), atol=2e-3, rtol=0)


def test_dead_latents_reconstruct_what_is_left():
    run = new_run("topk", d_sae=40)
    centred = SMALL[:20] * run.scale_in
    left = torch.randn(20, 12, generator=torch.Generator().manual_seed(1))
    for n_dead in (3, 30):
        dead = torch.arange(40) < n_dead
        pre = F.relu(centred @ run.net.enc.T + run.net.b_enc).masked_fill(~dead, 0.0)
        z = torch.zeros_like(pre)
        for row in range(20):
            best = pre[row].argsort(descending=True)[:6]  # half of the width
            z[row, best] = pre[row, best]
        error = (z @ run.net.dec - left).square().sum() / (left - left.mean(0)).square().sum()
        torch.testing.assert_close(run._aux(centred, left, dead), error * min(1, n_dead / 6))
    nothing = run._aux(centred, torch.zeros(20, 12), dead)
    assert nothing == 0


def new_run(variant: str = "batchtopk", d_sae: int = 24, **settings) -> Run:
    samples = Samples(SMALL, 0, False, CPU)
    return Run(samples, completed(Recipe(d_sae, 3, variant, **{**SHORT, **settings}), samples))


def test_the_start_and_the_rate_are_the_recipe():
    run = new_run(d_sae=2**6, n_train=3200, batch_size=32)
    assert torch.equal(run.net.enc, run.net.dec)
    torch.testing.assert_close(run.net.dec.norm(dim=1), torch.ones(64))
    middle = geometric_median(SMALL)
    torch.testing.assert_close(run.net.b_dec.detach(), middle * run.scale_in)
    assert ((SMALL - middle) * run.scale_in).square().sum(1).mean() == pytest.approx(1, rel=1e-5)
    recipe = run.recipe
    # 2e-4 * 16 in 2,000 steps or more; a short run goes as far
    assert recipe.lr == pytest.approx(8e-3) and usual_rate(2**6, 2000) == pytest.approx(2e-4 * 16)
    assert usual_rate(2**14, 500) == pytest.approx(8e-4) and usual_rate(2**2, 10) == pytest.approx(2e-4 * 64)
    assert recipe.warmup == 10 and recipe.dead_after == 320
    rates = [recipe.rate(step) / recipe.lr for step in (0, 4, 9, 50, 80, 90, 99)]
    assert rates == pytest.approx([0.1, 0.5, 1, 1, 1, 0.5, 0.05])
    assert completed(Recipe(64, 3, n_train=10**9), run.samples).dead_after == 10**7
    assert [completed(Recipe(64, 3), run.samples).steps, completed(Recipe(64, 3), run.samples).warmup] == [2000, 200]


# what comes out


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_returned_dictionary_is_the_trained_one(variant, tmp_path):
    """The checkpoint's weights, applied to scaled samples by hand."""
    sae = train_sae(7 * SMALL + 2, 24, 3, variant, checkpoint=tmp_path, **SHORT)
    w = load_file(tmp_path / "training.safetensors")
    x = 7 * SMALL + 2
    scale = 1 / (x - geometric_median(x)).square().sum(1).mean().sqrt()
    pre = (x * scale - w["b_dec"]) @ w["enc"].T + w["b_enc"]
    if variant == "topk":
        keep = torch.zeros_like(pre).scatter(1, pre.topk(3, dim=1).indices, 1.0)
    else:
        threshold = w["threshold"] if variant == "jumprelu" else sae.threshold * scale
        keep = (pre > threshold).float()
    expected = ((F.relu(pre) * keep) @ w["dec"] + w["b_dec"]) / scale
    torch.testing.assert_close(sae.decode(sae.encode(x)), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(sae(x), sae.decode(sae.encode(x)))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(24))
    assert sae.activation == ("topk" if variant == "topk" else "jumprelu")
    assert (sae.encode(x) >= 0).all() and not any(p.requires_grad for p in sae.parameters())
    assert sae.meta["settings"]["prefixes"] == ([1, 3, 6, 12, 24] if variant == "matryoshka" else [])
    if variant in ("batchtopk", "matryoshka"):
        assert sae.threshold.unique().numel() == 1 and sae.threshold[0] > 0
    assert sae.encode(x[:6].reshape(2, 3, 12)).shape == (2, 3, 24)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_seed_repeats_and_two_differ(variant):
    before = torch.random.get_rng_state()
    one, again, other = (train_sae(SMALL, 24, 3, variant, seed, **SHORT) for seed in (1, 1, 2))
    assert same(one, again) and not same(one, other)
    assert torch.equal(before, torch.random.get_rng_state())


class Stop(RuntimeError):
    pass


class FakeStore:
    """The part of an activation store that training uses: shuffled batches that say where they stand."""

    site, d_model = "L1.resid_post", 12
    meta = {"site": "L1.resid_post", "model": {"name": "org/rm", "revision": "abc"}, "n_samples": 600}

    def __len__(self):
        return 600

    def batches(self, size, seed=0, epochs=1, drop_last=False, start=None):
        return FakeBatches(size, epochs, (start or {"batch": 0})["batch"])


class FakeBatches:
    def __init__(self, size, epochs, batch):
        self.size, self.epochs, self.batch = size, epochs, batch

    def __iter__(self):
        return self

    def state(self):
        return {"batch": self.batch}

    def __next__(self):
        a_pass = 600 // self.size
        if self.epochs is not None and self.batch >= self.epochs * a_pass:
            raise StopIteration
        at = self.batch % a_pass * self.size
        self.batch += 1
        return SMALL[at : at + self.size]


def chunks():
    return iter((torch.cat([SMALL] * 3)).split(70))


SOURCES = {"tensor": lambda: SMALL, "list": lambda: list(SMALL.split(70)), "iterator": chunks, "store": FakeStore}


@pytest.mark.parametrize(
    ("variant", "source"), [*((v, "tensor") for v in VARIANTS), *(("batchtopk", s) for s in SOURCES if s != "tensor")]
)
def test_a_stopped_run_goes_on_to_the_same_weights(variant, source, tmp_path):
    """Stopped between two checkpoints and between two reports: the steps since the checkpoint are taken again."""
    settings = {**SHORT, "report_every": 3}
    whole = train_sae(SOURCES[source](), 24, 3, variant, **settings)

    def stop(entry):
        if entry["step"] == 27:
            raise Stop

    with pytest.raises(Stop):
        train_sae(
            SOURCES[source](), 24, 3, variant, checkpoint=tmp_path, checkpoint_every=10, progress=stop, **settings
        )
    seen = []
    resumed = train_sae(SOURCES[source](), 24, 3, variant, checkpoint=tmp_path, progress=seen.append, **settings)
    assert same(whole, resumed)
    assert seen[0]["step"] == 21 and resumed.meta["progress"] == whole.meta["progress"]
    finished = train_sae(SOURCES[source](), 24, 3, variant, checkpoint=tmp_path, **settings)
    assert same(finished, whole)


def test_a_checkpoint_of_other_settings_or_samples_is_refused(tmp_path):
    train_sae(SMALL, 24, 3, checkpoint=tmp_path, **SHORT)
    with pytest.raises(DataError, match="k 3, now 4"):
        train_sae(SMALL, 24, 4, checkpoint=tmp_path, **SHORT)
    with pytest.raises(DataError, match="source"):
        train_sae(SMALL + 1, 24, 3, checkpoint=tmp_path, **SHORT)


def test_a_store_gives_its_site_and_model():
    sae = train_sae(FakeStore(), 24, 3, **SHORT)
    assert sae.site == "L1.resid_post"
    assert (sae.meta["model"], sae.meta["revision"], sae.meta["n_samples"]) == ("org/rm", "abc", 600)
    assert train_sae(FakeStore(), 24, 3, site="L0.resid_post", **SHORT).site == "L0.resid_post"


def test_one_step_and_a_rest_of_samples_under_no_grad():
    """Samples that do not fill a batch are left; a run of one step takes the threshold of its batch."""
    with torch.no_grad():
        short = train_sae(iter(SMALL.split(70)), 24, 3, n_train=599, batch_size=300)
    assert [e["samples"] for e in short.meta["progress"]] == [300]
    run = new_run(n_train=64, batch_size=64)
    x = next(run.samples.batches(64))[0]
    lowest = run._forward(x * run.scale_in).lowest
    run._step(x, None)
    assert run.level == pytest.approx(float(lowest))


def test_progress_and_an_evaluation_of_the_dictionary_as_it_is():
    seen = []

    def fvu(sae):
        return {"other": float((sae(SMALL) - SMALL).square().sum() / (SMALL - SMALL.mean(0)).square().sum())}

    sae = train_sae(SMALL, 24, 3, "topk", progress=seen.append, evaluate=fvu, report_every=10, **SHORT)
    assert [e["step"] for e in seen] == [10, 20, 30, 40] and seen == sae.meta["progress"]
    assert all({"samples", "loss", "fvu", "l0", "dead", "lr", "other"} <= e.keys() for e in seen)
    assert fvu(sae)["other"] == seen[-1]["other"] < seen[0]["other"]
    assert seen[-1]["other"] == pytest.approx(seen[-1]["fvu"], abs=0.1) and seen[-1]["l0"] <= 3
    assert sae.meta["fvu"] == seen[-1]["fvu"]


def test_bfloat16_products_train_the_same_dictionary_roughly():
    one, half = (train_sae(SMALL, 24, 3, dtype=dtype, **SHORT) for dtype in (torch.float32, torch.bfloat16))
    assert half.W_dec.dtype == torch.float32 and not same(one, half)
    assert half.meta["fvu"] == pytest.approx(one.meta["fvu"], abs=0.05)


# few samples


def test_two_hundred_samples_are_trained_on_and_said_to_be_few():
    sae = train_sae(SMALL[:200], 48, 2, n_train=3200, batch_size=64)
    assert not sae.meta["enough"]["passed"] and sae.meta["enough"]["gap"] == pytest.approx(48 * 100 / 2 / 200)
    assert "200 different samples, in which a latent is active 8 times" in sae.meta["trust"]
    assert "2,400" in sae.meta["trust"] and "another seed" in sae.meta["trust"]
    assert sae.meta["passes"] == 16
    enough = train_sae(SMALL, 12, 3, **SHORT).meta
    assert enough["enough"]["passed"] and "training samples" in enough["trust"]


def test_a_loader_is_counted_in_samples_not_in_batches():
    loader = torch.utils.data.DataLoader(DATA, batch_size=32)  # 157 batches of 5,000 samples
    meta = train_sae(loader, 24, 3, n_train=100 * 64, batch_size=64).meta
    assert meta["n_samples"] == 5000 and meta["passes"] == 1.28 and "5,000 different samples" in meta["trust"]


@pytest.mark.parametrize("source", [SMALL[:150], list(SMALL[:150].split(50)), iter(SMALL[:150].split(50))])
def test_fewer_say_how_many_more(source):
    with pytest.raises(DataError, match="150 samples.*at least 200.*take 50 more"):
        train_sae(source, 24, 3, n_train=1000)


# bad input


@pytest.mark.parametrize(
    ("source", "settings", "words"),
    [
        (SMALL.masked_fill(torch.arange(600)[:, None] == 7, math.nan), {}, "NaN or infinity.*1 of"),
        (torch.ones(300, 4), {}, "all equal"),
        (torch.zeros(300, 4, dtype=torch.int64), {}, "int64"),
        (torch.zeros(3, 100, 4), {}, r"\[3, 100, 4\]"),
        (17, {}, "a int"),
        (SMALL, {"k": 25}, "k=25"),
        (SMALL, {"k": 0}, "k=0"),
        (SMALL, {"lr": -1.0}, "lr=-1"),
        (SMALL, {"prefixes": (8, 4, 24), "variant": "matryoshka"}, "prefixes"),
        (SMALL, {"prefixes": (4, 8), "variant": "matryoshka"}, "prefixes"),
        (SMALL, {"prefixes": (4, 24)}, "prefixes.*matryoshka alone"),
        (SMALL, {"dtype": torch.float16}, "float16"),
        (SMALL, {"batch_size": 5000}, "n_train"),
        (chunks(), {"n_train": None}, "n_train=None"),
        (chunks(), {"n_train": 9000}, "ended before.*fewer than 9,000"),
        ([SMALL, SMALL[:, :5]], {}, "different widths"),
        (["text"], {}, "a str"),
        (SMALL, {"checkpoint_every": 0}, "checkpoint_every=0"),
        (SMALL, {"report_every": 0}, "report_every=0"),
    ],
)
def test_what_cannot_be_trained_on_is_named(source, settings, words):
    arguments = {"d_sae": 24, "k": 3, **SHORT, **settings}
    with pytest.raises(DataError, match=words):
        train_sae(source, **arguments)


def test_a_container_that_is_empty_when_gone_through_again_is_named():
    """It was asked for one pass after another without end."""

    class Spent:
        left = 2  # passes that give samples: for the width, and for the scales

        def __iter__(self):
            self.left -= 1
            return iter(SMALL.split(100) if self.left >= 0 else ())

    with pytest.raises(DataError, match="gave no samples.*none in pass 2"):
        train_sae(Spent(), 24, 3, n_train=6400, batch_size=64)


def test_an_unknown_variant_is_named():
    with pytest.raises(DataError, match="variant='gated'.*batchtopk, topk, jumprelu, matryoshka"):
        new_run("gated")


def test_a_dictionary_of_weights_that_do_not_fit_is_refused():
    parts = [torch.zeros(4, 6), torch.zeros(6), torch.zeros(6, 4), torch.zeros(4)]
    SAE(*parts, activation="relu")
    for change, words in (
        ({"activation": "topk"}, "k=None"), ({"activation": "topk", "k": 7}, "k=7"),
        ({"activation": "jumprelu"}, "without a threshold"), ({"activation": "gated"}, "'gated'"),
        ({"activation": "jumprelu", "threshold": -torch.ones(6)}, "negative"),
        ({"activation": "relu", "threshold": torch.ones(6)}, "with a threshold"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=words):
            SAE(*parts, **change)
    with pytest.raises(DataError, match=r"W_dec \[4, 6\]"):
        SAE(parts[0], parts[1], parts[0], parts[3], activation="relu")
    with pytest.raises(DataError, match="last dimension of 5.*4, the width at L0.mlp"):
        SAE(*parts, activation="relu", site="L0.mlp").encode(torch.zeros(2, 5))


# transcoders


def test_a_transcoder_learns_a_sparse_map():
    generator = torch.Generator().manual_seed(5)
    out = torch.randn(ATOMS, 10, generator=generator)
    y = (DATA @ KNOWN.T - 0.7).relu() @ out + 3
    found = train_transcoder((DATA, y), ATOMS, ON, n_train=600 * 64, batch_size=64)
    assert found.d_model == WIDTH and found.d_out == 10 and not found.apply_b_dec_to_input and found.W_skip is None
    error = (found(DATA) - y).square().sum() / (y - y.mean(0)).square().sum()
    assert error < 0.3 and found.meta["fvu"] == pytest.approx(float(error), abs=0.1)


def test_a_skip_carries_what_is_linear():
    generator = torch.Generator().manual_seed(6)
    y = SMALL @ torch.randn(12, 5, generator=generator) + 1
    settings = {"n_train": 600 * 32, "batch_size": 32, "lr": 0.01, "site": "L0.resid_mid", "target": "L0.mlp"}
    plain, skip = (train_transcoder((SMALL, y), 8, 1, skip=s, **settings) for s in (False, True))
    assert skip.meta["fvu"] < 0.02 < plain.meta["fvu"]
    assert (skip.site, skip.meta["target"]) == ("L0.resid_mid", "L0.mlp")
    x = SMALL[:9].reshape(3, 3, 12)
    torch.testing.assert_close(skip(x), skip.encode(x) @ skip.W_dec + skip.b_dec + x @ skip.W_skip.T)
    assert plain.skip(x).abs().max() == 0


def test_a_transcoder_begins_at_the_median_and_goes_on_bit_for_bit(tmp_path):
    y = SMALL[:, :5] ** 2
    samples = Samples((SMALL, y), 0, True, CPU)
    run = Run(samples, completed(Recipe(24, 3, centred=False, skip=True, **SHORT), samples))
    start = run._forward(SMALL * run.scale_in).parts[-1] / run.scale_out
    torch.testing.assert_close(start, geometric_median(y).expand(600, 5))
    whole = train_transcoder((SMALL, y), 24, 3, skip=True, **SHORT)

    def stop(entry):
        if entry["step"] == 20:
            raise Stop

    pairs = {"checkpoint": tmp_path, "checkpoint_every": 15, "report_every": 5}
    with pytest.raises(Stop):
        train_transcoder((SMALL, y), 24, 3, skip=True, progress=stop, **pairs, **SHORT)
    assert same(train_transcoder((SMALL, y), 24, 3, skip=True, **pairs, **SHORT), whole)
    stream = zip(SMALL.split(50), y.split(50), strict=True)
    assert train_transcoder(stream, 24, 3, n_train=576, batch_size=32).d_out == 5
    with pytest.raises(DataError, match="the same n"):
        train_transcoder((SMALL, y[:-1]), 24, 3)
