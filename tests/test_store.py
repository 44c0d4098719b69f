"""The activation store against plain `capture`, against itself after being killed, and its shuffling against counts."""

import functools
import json
import shutil
import types
import weakref

import numpy as np
import pytest
import torch

import reward_lens as rl
from families import STRUCTURES, TEXT_PAIRS, tiny_model
from reward_lens.engine import store as store_module
from reward_lens.engine import store_files, store_texts
from reward_lens.engine.activation_store import ActivationStore
from reward_lens.engine.store import estimate_store, store_activations
from reward_lens.engine.store_batches import Batches

PAIRS = [rl.Pair(*texts, id=f"p{i}") for i, texts in enumerate(TEXT_PAIRS)]
TEXTS = [(pair.prompt, response) for pair in PAIRS for response in pair.responses]
NO_SINKS = ("first",)
ROW = 32 * 4 + 16
some = pytest.mark.parametrize("family", STRUCTURES)


@functools.cache
def model(family: str = "llama") -> rl.RewardModel:
    return rl.RewardModel(*tiny_model(family, seed=1), name=family)


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(store_texts, "WINDOW_TOKENS", 90)


def shard_mb(rows: int) -> float:
    return rows * ROW / 2**20


def expected(rm, texts, site, positions, first=True, **kwargs):
    """Values, text numbers, positions and ids of all samples, by `capture` and a loop."""
    at = "final" if positions == "reward" else positions
    acts = rl.capture(rm, texts, [site], at, **kwargs)
    rows = []
    for number, tokens in enumerate(acts.tokens):
        span = {
            "reward": [tokens.reward_pos],
            "response": range(tokens.response.start, tokens.reward_pos + 1),
            "all": range(len(tokens)),
        }[positions]
        values = acts[site][number].reshape(len(span), -1)
        for position, value in zip(span, values, strict=True):
            if positions == "reward" or position > 0 or not first:
                rows.append((value, number, position, tokens.ids[position]))
    return torch.stack([row[0] for row in rows]), [row[1:] for row in rows]


def holds(store, rm, texts, site, positions, **kwargs):
    values, places = expected(rm, texts, site, positions, **kwargs)
    assert len(store) == len(values) and store.d_model == values.shape[1]
    torch.testing.assert_close(store.tensor(), values.float(), rtol=1e-4, atol=1e-4)
    chunks = list(store.chunks(5))
    sides = [torch.cat([getattr(c, name) for c in chunks]).tolist() for name in ("text", "position", "token")]
    assert list(zip(*sides, strict=True)) == places
    assert [tuple(store.at(i)) for i in (0, len(store) // 2, len(store) - 1)] == [
        places[i] for i in (0, len(store) // 2, len(store) - 1)
    ]
    torch.testing.assert_close(torch.cat([c.norm for c in chunks]), store.tensor().norm(dim=1))


@some
@pytest.mark.parametrize("positions", ["reward", "response", "all"])
def test_it_holds_what_capture_sees(family, positions, tmp_path, small_windows):
    rm, site = model(family), "L1.resid_post"
    kwargs = {"exclude": NO_SINKS, "shard_mb": shard_mb(20)}
    store = store_activations(rm, PAIRS, site, positions, **kwargs)
    assert store.folder is None and str(store.site) == site
    holds(store, rm, TEXTS, site, positions)
    written = store_activations(rm, PAIRS, site, positions, tmp_path / "s", **kwargs)
    opened = ActivationStore.open(tmp_path / "s", rm)
    for other in (written, opened):
        assert torch.equal(other.tensor(), store.tensor()) and other.meta == store.meta
    assert opened.meta["norm_rms"] == pytest.approx(float(store.tensor().square().sum(1).mean().sqrt()), rel=1e-5)
    assert opened.meta["left_out"]["first"] == (12 if positions == "all" else 0)


@pytest.mark.parametrize("site", ["embed", "L0.resid_pre", "L1.resid_mid", "L1.attn", "L2.mlp", "L1.head", "L1.H2",
                                  "L0.neuron", "L1.k"])  # fmt: skip
def test_any_site_is_one_vector_a_position(site):
    rm = model()
    holds(store_activations(rm, PAIRS, site, "response", exclude=()), rm, TEXTS, site, "response", first=False)


def test_one_text_a_pass_gives_the_very_bits_of_capture():
    rm = model("gemma2")
    store = store_activations(rm, PAIRS, "L2.mlp", "all", exclude=(), batch_size=1)
    values, _ = expected(rm, TEXTS, "L2.mlp", "all", first=False, batch_size=1)
    assert torch.equal(store.tensor(), values)


def test_pairs_groups_tuples_and_generators_are_the_same_texts():
    rm, site = model(), "L1.resid_post"
    groups = [rl.Group(p.prompt, p.responses) for p in PAIRS]
    stores = [store_activations(rm, x, site) for x in (PAIRS, groups, TEXTS, (t for t in TEXTS), iter(PAIRS))]
    assert all(torch.equal(s.tensor(), stores[0].tensor()) and s.meta == stores[0].meta for s in stores)
    raw = store_activations(rm, ["one text", "and another"], site, "all", exclude=())
    holds(raw, rm, ["one text", "and another"], site, "all", first=False)
    one = store_activations(rm, PAIRS[0], site, "reward")
    assert len(one) == 2


def test_a_generator_is_read_a_window_at_a_time(monkeypatch, small_windows):
    read, seen = [], []

    def stream():
        for text in TEXTS:
            read.append(text)
            yield text

    run = store_module.samples_of
    monkeypatch.setattr(store_module, "samples_of", lambda *a: (seen.append((len(read), a[1].stop)), run(*a))[1])
    store_activations(model(), stream(), "L1.mlp")
    assert len(seen) > 2 and all(n == stop for n, stop in seen)


def test_texts_seen_before_are_dropped_and_keep_their_numbers():
    rm, site = model(), "L1.resid_post"
    inputs = [TEXTS[0], TEXTS[1], TEXTS[0], TEXTS[2], TEXTS[1]]
    store = store_activations(rm, inputs, site, "reward")
    assert [store.at(i).text for i in range(3)] == [0, 1, 3] and len(store) == 3
    assert store.meta["left_out"]["duplicates"] == 2 and store.meta["n_texts"] == 5
    torch.testing.assert_close(store.tensor(), rl.capture(rm, TEXTS[:3], [site])[site], rtol=1e-4, atol=1e-4)


def sinking(scale: float) -> rl.RewardModel:
    """A model whose residual is massive wherever the token is a full stop: a planted sink."""
    module, tokenizer = tiny_model("llama", seed=1)
    stop = tokenizer.encode(".", add_special_tokens=False)[0]
    module.model.embed_tokens.weight.data[stop] *= scale
    return rl.RewardModel(module, tokenizer, name="sinking")


@pytest.mark.parametrize("site", ["L1.resid_post", "L1.attn", "L0.mlp", "L1.H1"])
def test_planted_sinks_are_left_out_and_counted(site):
    rm = sinking(2000.0)
    stop = rm.tokenizer.hf.encode(".", add_special_tokens=False)[0]
    everything = store_activations(rm, PAIRS, site, "all", exclude=NO_SINKS)
    store = store_activations(rm, PAIRS, site, "all")
    chunk = next(everything.chunks(10**6))
    there = (chunk.token == stop).numpy()
    assert there.any() and store.meta["left_out"]["sinks"] == there.sum()
    assert torch.equal(store.tensor(), everything.tensor()[torch.from_numpy(~there)])
    far = store_activations(rm, PAIRS, site, "all", sink_multiple=10**6)
    assert far.meta["left_out"]["sinks"] == 0 and torch.equal(far.tensor(), everything.tensor())


def test_the_threshold_is_the_multiple_of_the_median():
    rm, site = model(), "L2.resid_post"
    everything = store_activations(rm, PAIRS, site, "all", exclude=NO_SINKS)
    norms = everything.tensor().norm(dim=1).double()
    kept = norms <= 1.2 * float(np.median(norms.numpy()))
    store = store_activations(rm, PAIRS, site, "all", sink_multiple=1.2)
    assert 0 < len(store) < len(everything)
    assert torch.equal(store.tensor(), everything.tensor()[kept])
    assert store.meta["left_out"]["sinks"] == int((~kept).sum())


def test_at_most_so_many_of_a_text(small_windows):
    rm, site = model(), "L1.mlp"
    store = store_activations(rm, PAIRS, site, "all", per_text=3, exclude=NO_SINKS)
    whole = store_activations(rm, PAIRS, site, "all", exclude=NO_SINKS)
    chunk, full = next(store.chunks()), next(whole.chunks())
    assert set(np.unique(chunk.text, return_counts=True)[1]) == {3}
    places = {(t, p): v for t, p, v in zip(full.text.tolist(), full.position.tolist(), full.values, strict=True)}
    where = list(zip(chunk.text.tolist(), chunk.position.tolist(), strict=True))
    assert where == sorted(where) and all(torch.equal(places[w], v) for w, v in zip(where, chunk.values, strict=True))
    assert store.meta["left_out"]["per_text"] == len(whole) - len(store)
    again = next(store_activations(rm, PAIRS, site, "all", per_text=3, exclude=NO_SINKS, seed=1).chunks())
    assert not torch.equal(again.position, chunk.position)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_precisions(dtype, tmp_path):
    rm = model()
    exact = store_activations(rm, PAIRS[:2], "L1.mlp").tensor()
    store = store_activations(rm, PAIRS[:2], "L1.mlp", folder=tmp_path / "s", dtype=dtype)
    assert torch.equal(store.tensor(), exact.to(getattr(torch, dtype)).float())
    assert next(store.batches(4)).dtype == torch.float32


def test_a_sixteen_bit_trunk_is_stored_in_its_own_precision_without_loss():
    rm = rl.RewardModel(*tiny_model("llama", seed=1, dtype=torch.bfloat16), name="bf16")
    store = store_activations(rm, PAIRS, "L1.resid_post", "all", batch_size=1, exclude=())
    assert store.meta["dtype"] == "bfloat16"
    assert torch.equal(store.tensor(), expected(rm, TEXTS, "L1.resid_post", "all", first=False, batch_size=1)[0])


class Killed(RuntimeError):
    pass


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "positions, rows", [("response", 7), ("response", 40), ("reward", 2), ("all", 300), ("all", 1)]
)
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(positions, rows, tmp_path, monkeypatch, small_windows):
    rm = model()
    inputs = [*PAIRS, PAIRS[0], rl.Pair("A late prompt", "one", "two"), rl.Pair("A late prompt", "one", "three")]
    call = functools.partial(
        store_activations, rm, site="L1.resid_post", positions=positions, shard_mb=shard_mb(rows), keep_texts=True,
        per_text=30,
    )  # fmt: skip
    whole = call(inputs, folder=tmp_path / "whole")
    budget = 3

    def dying(function):
        def wrapped(*args):
            if budget_left[0] == 0:
                raise Killed
            budget_left[0] -= 1
            return function(*args)

        return wrapped

    monkeypatch.setattr(store_module, "samples_of", dying(store_module.samples_of))
    monkeypatch.setattr(store_files.FolderShelf, "write_index", dying(store_files.FolderShelf.write_index))
    deaths = 0
    for budget in range(1, 60):  # kills after 1, 2, 3 ... windows or indices: before and after the index, in windows
        budget_left = [budget]
        try:
            store = call(iter(inputs), folder=tmp_path / "killed")
            break
        except Killed:
            deaths += 1
    assert deaths >= 2
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert store.meta == whole.meta and torch.equal(store.tensor(), whole.tensor())
    sampled = {text for chunk in whole.chunks() for text in chunk.text.tolist()}
    pieces = {
        number: rm.tokenize(*source).pieces
        for number, source in enumerate([(p.prompt, r) for p in inputs for r in p.responses])
        if number in sampled
    }
    assert dict(ActivationStore.open(tmp_path / "killed").texts) == pieces


def test_a_finished_store_is_handed_back_without_a_run(tmp_path, monkeypatch):
    rm = model()
    first = store_activations(rm, PAIRS, "L1.mlp", folder=tmp_path)
    before = files(tmp_path)
    monkeypatch.setattr(store_module, "samples_of", None)
    again = store_activations(rm, PAIRS, "L1.mlp", folder=tmp_path)
    assert torch.equal(again.tensor(), first.tensor()) and files(tmp_path) == before
    with pytest.raises(rl.DataError, match="finished, and of fewer texts"):
        store_activations(rm, [*PAIRS, ("new", "text")], "L1.mlp", folder=tmp_path)
    for other in (PAIRS[:3], [*PAIRS[1:], PAIRS[0]]):
        with pytest.raises(rl.DataError, match="begun with other inputs"):
            store_activations(rm, other, "L1.mlp", folder=tmp_path)


def test_an_unfinished_store_opens_only_when_asked(tmp_path, monkeypatch, small_windows):
    rm = model()

    def stream():
        yield from TEXTS[:10]
        raise Killed

    with pytest.raises(Killed):
        store_activations(rm, stream(), "L1.mlp", "all", tmp_path, shard_mb=shard_mb(30))
    with pytest.raises(rl.DataError, match="is not finished"):
        ActivationStore.open(tmp_path)
    part = ActivationStore.open(tmp_path, partial=True)
    whole = store_activations(rm, TEXTS, "L1.mlp", "all", tmp_path, shard_mb=shard_mb(30))
    assert 0 < len(part) < len(whole) and torch.equal(part.tensor(), whole.tensor()[: len(part)])


# --- batches --------------------------------------------------------------------------------------------------------


def counted(counts, width=3):
    """Shards whose row r is (r, r, r), how often they are read and how many were ever in memory at once."""
    starts, reads, alive, most = np.cumsum([0, *counts]), [], [0], [0]

    def load(shard):
        rows = torch.arange(starts[shard], starts[shard + 1]).float()[:, None].repeat(1, width)
        reads.append(shard)
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        weakref.finalize(rows, lambda: alive.__setitem__(0, alive[0] - 1))
        return rows

    return load, reads, most


def over(counts, load, **kwargs):
    settings = {"size": 8, "seed": 0, "epochs": 1, "buffer": 20, "drop_last": False, "start": None} | kwargs
    return Batches(counts, load, "s", 3, torch.float32, **settings)


@pytest.mark.parametrize("size, buffer", [(8, 20), (1, 1), (64, 5), (7, 10**6), (8, 8), (500, 30)])
def test_every_sample_once_an_epoch_and_one_shard_in_memory(size, buffer):
    counts = [13, 40, 1, 25]
    load, reads, most = counted(counts)
    batches = list(over(counts, load, size=size, buffer=buffer))
    assert sorted(torch.cat(batches)[:, 0].tolist()) == list(range(79))
    assert all(b.shape == (min(size, 79), 3) for b in batches[:-1]) and len(batches) == -(-79 // size)
    assert sorted(reads) == [0, 1, 2, 3] and most[0] == 1
    dropped = list(over(counts, load, size=size, buffer=buffer, drop_last=True)) if size <= 79 else []
    assert [b.tolist() for b in dropped] == [b.tolist() for b in batches if len(b) == size]


def test_seeds_and_epochs_have_orders_of_their_own():
    counts = [30, 30, 19]
    load, _, _ = counted(counts)

    def order(**kwargs):
        return torch.cat(list(over(counts, load, **kwargs)))[:, 0].tolist()

    two = order(epochs=2)
    assert two[:79] == order() != order(seed=1) and sorted(two[79:]) == sorted(two[:79]) != two[79:] != two[:79]


@pytest.mark.parametrize("buffer", [1, 20, 1000])
@pytest.mark.parametrize("drop_last", [False, True])
def test_going_on_from_any_state_gives_the_rest(buffer, drop_last):
    counts = [13, 40, 1, 25]
    load, reads, most = counted(counts)
    kwargs = {"buffer": buffer, "drop_last": drop_last, "epochs": 2}
    run = over(counts, load, **kwargs)
    states, batches = [run.state()], []
    for batch in run:
        batches.append(batch.tolist())
        states.append(json.loads(json.dumps(run.state())))
    for done, state in enumerate(states):
        reads.clear()
        rest = over(counts, load, **kwargs, start=state)
        assert [b.tolist() for b in rest] == batches[done:]
    assert most[0] == 1
    # near the end of an epoch only shards with rows in the buffer are read again
    reads.clear()
    last = list(over(counts, load, **{**kwargs, "epochs": 1}, start=states[len(batches) // 2 - 1]))
    assert len(last) == 1 and len(reads) <= len(counts)


def test_a_large_buffer_shuffles_uniformly():
    """Every sample is equally likely to come first: counts over seeds against their binomial spread."""
    counts = [3, 5, 2]
    load, _, _ = counted(counts)
    first = [int(next(over(counts, load, size=1, buffer=10, seed=s))[0, 0]) for s in range(600)]
    assert np.abs(np.bincount(first, minlength=10) - 60).max() < 5 * np.sqrt(54)


def test_shuffling_mixes_shards_and_texts(tmp_path):
    store = store_activations(model(), PAIRS, "L1.mlp", "all", tmp_path, shard_mb=shard_mb(60))
    batches = list(store.batches(32, seed=3, buffer=50))
    values = store.tensor()
    joined = torch.cat(batches)
    assert torch.equal(torch.sort(joined[:, 0]).values, torch.sort(values[:, 0]).values)
    assert not torch.equal(joined, values)
    run = store.batches(32, seed=3, buffer=50)
    for _ in range(2):
        next(run)
    state = run.state()
    rest = list(ActivationStore.open(tmp_path).batches(32, seed=3, buffer=50, start=state))
    assert torch.equal(torch.cat(rest), torch.cat(batches[2:]))
    endless = store.batches(len(store), epochs=None)
    assert all(len(next(endless)) == len(store) for _ in range(3))


def test_bad_batches():
    store = store_activations(model(), PAIRS, "L1.mlp", "reward")
    for bad in ({"size": 0}, {"size": 4, "buffer": 0}, {"size": 4, "epochs": 0}, {"size": 4, "seed": -1}):
        with pytest.raises(rl.DataError, match="cannot be used"):
            store.batches(**bad)
    with pytest.raises(rl.DataError, match="no whole batch"):
        store.batches(13, drop_last=True)
    state = store.batches(4).state()
    for kwargs in ({"size": 5}, {"size": 4, "seed": 1}, {"size": 4, "buffer": 9}, {"size": 4, "drop_last": True}):
        with pytest.raises(rl.DataError, match="cannot go on"):
            store.batches(**kwargs, start=state)
    other = store_activations(model(), PAIRS[:5], "L1.mlp", "reward")
    with pytest.raises(rl.DataError, match="cannot go on"):
        other.batches(4, start=state)
    for settings in ({"shard_mb": shard_mb(4)}, {"dtype": "bfloat16"}):  # of the same texts, but not these batches
        with pytest.raises(rl.DataError, match="cannot go on"):
            store_activations(model(), PAIRS, "L1.mlp", "reward", **settings).batches(4, start=state)
    with pytest.raises(rl.DataError, match="cannot go on"):
        store.batches(4, start={})


# --- size, disk and errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["reward", "response", "all"])
def test_the_estimate_is_the_count_and_the_bytes(positions, tmp_path):
    rm, inputs = model(), [*PAIRS, PAIRS[1]]
    guess = estimate_store(rm, inputs, "L1.resid_post", positions)
    store = store_activations(rm, inputs, "L1.resid_post", positions, tmp_path, exclude=NO_SINKS)
    assert (guess.n_samples, guess.n_texts, guess.duplicates, guess.exact) == (len(store), 12, 2, True)
    size = sum(p.stat().st_size for p in tmp_path.glob("*.safetensors"))
    assert guess.bytes == len(store) * ROW and guess.bytes <= size < guess.bytes + 1000


def test_the_estimate_of_many_texts_scales_by_characters(monkeypatch):
    monkeypatch.setattr(store_module, "MEASURED_TEXTS", 6)
    guess = estimate_store(model(), PAIRS, "L1.H1", "response", dtype="bfloat16", per_text=1000)
    true = len(store_activations(model(), PAIRS, "L1.H1", exclude=()))
    assert not guess.exact and guess.bytes == guess.n_samples * (12 * 2 + 16)
    assert 0.5 < guess.n_samples / true < 2


def test_a_disk_with_too_little_room_is_refused_before_the_start_and_before_a_shard(tmp_path, monkeypatch):
    rm = model()
    need = estimate_store(rm, PAIRS, "L1.mlp", "all", exclude=()).bytes + store_files.SPARE_BYTES
    room = [need - 1]
    usage = types.SimpleNamespace
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(total=0, used=0, free=room[0]))
    ran = []
    run = store_module.samples_of
    monkeypatch.setattr(store_module, "samples_of", lambda *a: (ran.append(1), run(*a))[1])
    with pytest.raises(rl.DataError, match="too little room"):
        store_activations(rm, PAIRS, "L1.mlp", "all", tmp_path / "a" / "b", exclude=())
    assert not ran and not (tmp_path / "a").exists()
    with pytest.raises(rl.DataError, match="too little room"):  # a generator: noticed at its shard
        store_activations(rm, iter(PAIRS), "L1.mlp", "all", tmp_path / "c", exclude=(), shard_mb=1)
    assert ran and not list((tmp_path / "c").glob("*.safetensors"))
    room[0] = need
    assert len(store_activations(rm, PAIRS, "L1.mlp", "all", tmp_path / "c", exclude=(), shard_mb=1))


def test_folders_of_something_else(tmp_path):
    rm = model()
    with pytest.raises(rl.DataError, match="There is no activation store"):
        ActivationStore.open(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    for index in (None, "{", "[]", '{"format": "other"}'):
        if index is not None:
            (tmp_path / "index.json").write_text(index)
        with pytest.raises(rl.DataError, match="is not an activation store"):
            store_activations(rm, PAIRS, "L1.mlp", folder=tmp_path)
        with pytest.raises(rl.DataError, match="is not an activation store"):
            ActivationStore.open(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(rl.DataError, match="is not an activation store"):
        store_activations(rm, PAIRS, "L1.mlp", folder=tmp_path / "notes.txt")


def test_another_models_store_and_other_settings(tmp_path):
    rm = model()
    store = store_activations(rm, PAIRS, "L1.mlp", folder=tmp_path)
    other = rl.RewardModel(*tiny_model("llama", seed=2), name="llama")
    for refuse in (
        lambda: ActivationStore.open(tmp_path, other),
        lambda: store.require_model(other),
        lambda: store_activations(other, PAIRS, "L1.mlp", folder=tmp_path),
    ):
        with pytest.raises(rl.DataError, match="another model"):
            refuse()
    with pytest.raises(rl.DataError, match=r"other settings.*L1\.mlp.*L1\.attn"):
        store_activations(rm, PAIRS, "L1.attn", folder=tmp_path)
    with pytest.raises(rl.DataError, match="other settings"):
        store_activations(rm, PAIRS, "L1.mlp", "all", folder=tmp_path)
    edited, _ = tiny_model("llama", seed=1)
    edited.score.weight.data *= 2
    store.require_model(rl.RewardModel(edited, rm.tokenizer.hf, name="other head"))
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(index | {"version": 9}))
    with pytest.raises(rl.DataError, match="another version"):
        ActivationStore.open(tmp_path)


def test_damaged_shards(tmp_path):
    store = store_activations(model(), PAIRS, "L1.mlp", folder=tmp_path, keep_texts=True)
    shard = tmp_path / "shard-00000.safetensors"
    good = bytearray(shard.read_bytes())
    flipped = good.copy()
    flipped[-5] ^= 1
    shard.write_bytes(flipped)
    opened = ActivationStore.open(tmp_path)  # of the right size
    for read in (opened.tensor, lambda: next(opened.batches(4)), lambda: opened.at(0)):
        with pytest.raises(rl.DataError, match=r"shard-00000\.safetensors .* damaged"):
            read()
    shard.write_bytes(good[:-3])
    with pytest.raises(rl.DataError, match="damaged"):
        ActivationStore.open(tmp_path)
    shard.unlink()
    with pytest.raises(rl.DataError, match="no such file"):
        store_activations(model(), PAIRS, "L1.mlp", folder=tmp_path, keep_texts=True)
    shard.write_bytes(good)
    assert torch.equal(ActivationStore.open(tmp_path).tensor(), store.tensor())


def test_no_samples_and_bad_inputs(tmp_path):
    rm = model()
    for inputs in ([], iter(())):
        with pytest.raises(rl.DataError, match="no samples"):
            store_activations(rm, inputs, "L1.mlp", folder=tmp_path)
    for inputs, words in [
        (("prompt", "response"), "put the tuple in a list"),
        ([("a", "b", "c")], "Item 0"),
        ([PAIRS[0], 3], "Item 1"),
        (3, "not something that texts"),
    ]:
        with pytest.raises(rl.DataError, match=words):
            store_activations(rm, inputs, "L1.mlp")
    for kwargs in (
        {"site": "L1.pattern"}, {"site": "L1.N3"}, {"positions": "final"}, {"exclude": ("bos",)},
        {"sink_multiple": 1}, {"per_text": 0}, {"batch_size": 0}, {"dtype": "int8"}, {"seed": -1},
    ):  # fmt: skip
        with pytest.raises(rl.DataError):
            store_activations(rm, PAIRS, **({"site": "L1.mlp"} | kwargs))
    with pytest.raises(rl.StructureError):
        store_activations(rm, PAIRS, "L7.mlp")
    with pytest.raises(rl.DataError, match="float16"):
        store_activations(sinking(1e6), PAIRS, "embed", "all", exclude=(), dtype="float16")
    store = store_activations(rm, PAIRS, "L1.mlp", "reward")
    for sample in (-1, 12):
        with pytest.raises(rl.DataError, match="no such sample"):
            store.at(sample)
    with pytest.raises(rl.DataError, match="not kept"):
        _ = store.texts


def test_texts_stay_out_of_the_store_unless_kept(tmp_path):
    rm = model()
    store_activations(rm, PAIRS, "L1.mlp", folder=tmp_path / "a")
    assert all(b"France" not in content for content in files(tmp_path / "a").values())
    kept = store_activations(rm, PAIRS, "L1.mlp", keep_texts=True, shard_mb=shard_mb(9))
    place = kept.at(len(kept) - 1)
    tokens = rm.tokenize(*TEXTS[place.text])
    assert kept.texts[place.text] == tokens.pieces and tokens.ids[place.position] == place.token
    assert len(kept.texts) == 12 and 99 not in kept.texts


def test_the_model_is_left_as_it_was():
    rm = model("gpt_neox")
    state = {name: t.clone() for name, t in rm.module.state_dict().items()}
    config = rm.config.to_dict()
    store_activations(rm, PAIRS, "L1.H1", "all")
    assert rm.config.to_dict() == config and not rm.module.training
    assert all(torch.equal(t, state[name]) for name, t in rm.module.state_dict().items())
    hooked = [m for m in rm.module.modules() if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks]
    assert not hooked


def test_only_a_window_and_a_shard_are_held_while_storing(monkeypatch, tmp_path, small_windows):
    """The rows that wait never exceed a shard and a window's samples."""
    waiting = []
    add = store_module._Filling.add

    def watched(self, window, samples):
        add(self, window, samples)
        waiting.append((sum(len(p["text"]) for p in self._pending), len(samples.text)))

    monkeypatch.setattr(store_module._Filling, "add", watched)
    store = store_activations(model(), PAIRS, "L1.mlp", "all", tmp_path, shard_mb=shard_mb(25))
    assert all(rows < 25 for rows, _ in waiting) and len(waiting) > 3
    rows = [s["rows"] for s in store._index["shards"]]
    assert sum(rows) == len(store) and set(rows[:-1]) == {25} and 0 < rows[-1] <= 25
