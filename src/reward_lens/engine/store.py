"""Activations of one site over many texts, kept in shards: what a sparse autoencoder is trained on.

The texts are streamed: tokenised and run in windows of about `store_texts.WINDOW_TOKENS` tokens, their samples put into
shards of equal size. The index is written after every shard, with the window to go on from and the number of its
samples that are in shards already; a run that was killed is taken up by the same call, and its files are then those of
a run that was not, bit for bit on a machine whose arithmetic repeats.

In memory at once: one shard that is being filled, the activations of one window, and 16 bytes a text.

What this cannot show: anything yet. Samples of one text depend on each other; `per_text` thins them.
"""

import dataclasses
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reward_lens.arguments import checked_arguments
from reward_lens.engine.activation_store import ActivationStore, require_samples
from reward_lens.engine.activations import positions_of
from reward_lens.engine.run import passes
from reward_lens.engine.store_files import FORMAT, VERSION, FolderShelf, MemoryShelf, Shelf, dtype_of
from reward_lens.engine.store_identity import identity, require_same_model
from reward_lens.engine.store_samples import Recipe, Samples, require_recipe, samples_of
from reward_lens.engine.store_texts import Known, Window, measured, windows
from reward_lens.errors import DataError
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site

SIDE_BYTES = 16  # text, position, token and norm of a sample
DTYPES = ("float32", "bfloat16", "float16", "float64")
MEASURED_TEXTS = 2000


@dataclasses.dataclass(frozen=True)
class StoreEstimate:
    """What a store would hold."""

    n_samples: int
    """Sinks are counted here, as they are only known when the texts are run."""
    bytes: int
    """On disk, without kept texts."""
    n_texts: int
    """Different texts."""
    duplicates: int
    exact: bool
    """Whether all texts were tokenised; otherwise samples are scaled up by characters."""


@checked_arguments
def store_activations(
    rm: RewardModel,
    inputs: Any,
    site: str | Site,
    positions: str = "response",
    folder: str | Path | None = None,
    shard_mb: int | float = 256,
    dtype: str | torch.dtype | None = None,
    exclude: Sequence[str] = ("first", "sinks"),
    sink_multiple: int | float = 10,
    per_text: int | None = None,
    batch_size: int | None = None,
    keep_texts: bool = False,
    seed: int = 0,
) -> ActivationStore:
    """Run texts and keep what stands at a site; a run that was killed goes on where the folder's index says.

    Parameters
    ----------
    inputs: pairs (both responses), groups, (prompt, response) tuples or raw texts, in a sequence or a generator, which
        is read once and never held. Texts seen before are dropped. To go on, pass the same inputs from the beginning.
    site: a residual (``"L20.resid_post"``), a write (``"L3.mlp"``), heads (``"L3.H5"``, or ``"L3.head"`` for all heads
        of a block side by side) or the MLP's neurons. A sample is everything at the site as one vector.
    positions: "reward" (the position that the head reads), "response" (its first token through the reward position) or
        "all".
    folder: where the shards go; empty, not there yet, or begun by the same call. None: they are held in memory.
    shard_mb: size of a shard in MiB.
    dtype: "float32", "bfloat16", "float16" or "float64"; None: that of the model's trunk.
    exclude: of "response" and "all", "first" leaves out a text's first token (BOS) and "sinks" positions whose
        residual norm exceeds `sink_multiple` times the median over the window's candidate positions.
    per_text: at most that many samples of a text, drawn by `seed`. None: all.
    batch_size: texts a pass; None: by a token budget.
    keep_texts: keep the token pieces too (`store.texts`).

    Returns an `ActivationStore` of samples [n, d_model] in the order of texts and positions. `meta["left_out"]` counts
    what was left out.
    Raises `DataError` for inputs that are no texts, no samples, a disk with too little room (by `estimate_store` before
    the start where the inputs have a length, and before every shard), a folder of something else or of other
    settings, another model's store, and numbers that the precision cannot hold; `StructureError` for a site the model
    does not have. The model is left as it was.
    """
    recipe = _recipe(rm, site, positions, exclude, sink_multiple, per_text, batch_size, seed)
    width, stored_as = _width(rm, recipe.site), _dtype_name(rm, dtype)
    row_bytes = width * dtype_of(stored_as).itemsize + SIDE_BYTES
    settings = {
        **dataclasses.asdict(recipe), "site": str(recipe.site), "exclude": sorted(recipe.exclude), "dtype": stored_as,
        "shard_rows": max(1, int(shard_mb * 2**20) // row_bytes), "keep_texts": keep_texts,
    }  # fmt: skip
    shelf: Shelf = MemoryShelf() if folder is None else FolderShelf(folder)
    index = shelf.read_index() if isinstance(shelf, FolderShelf) else None
    if index is None:
        index = _new_index(settings, identity(rm), width)
    else:
        _require_same_settings(index, settings, str(folder))
        require_same_model(rm, index["model"], f"The store in {folder}")
    if not index["complete"] and folder is not None and isinstance(inputs, Sized):
        estimate = _estimate(rm, inputs, recipe, row_bytes)
        shelf.require_room(estimate.bytes - index["n_samples"] * row_bytes)
    if not index["shards"]:
        shelf.write_index(index)
    progress = index["progress"]
    known = Known(progress["window_start"], index["n_texts"], index["inputs_hash"])
    filling = _Filling(shelf, index)
    for window in windows(rm, inputs, batch_size, known):
        if index["complete"]:
            raise DataError(
                f"The store in {folder} is finished, and of fewer texts",
                found=f"inputs of {window.stop} texts or more",
                expected=f"the {index['n_texts']} texts it was made of",
                do="pass the same inputs, or choose another folder",
            )
        filling.add(window, samples_of(rm, window, recipe))
    filling.finish()
    return ActivationStore(shelf, index)


@checked_arguments
def estimate_store(
    rm: RewardModel,
    inputs: Any,
    site: str | Site,
    positions: str = "response",
    dtype: str | torch.dtype | None = None,
    exclude: Sequence[str] = ("first", "sinks"),
    per_text: int | None = None,
) -> StoreEstimate:
    """How many samples and bytes `store_activations` would write, without running the texts.

    Returns a `StoreEstimate`. Texts are tokenised up to `MEASURED_TEXTS`; the samples of more texts are scaled up by
    their characters. A generator is used up.
    Raises as `store_activations` does.
    """
    recipe = _recipe(rm, site, positions, exclude, 10, per_text, None, 0)
    row_bytes = _width(rm, recipe.site) * dtype_of(_dtype_name(rm, dtype)).itemsize + SIDE_BYTES
    return _estimate(rm, inputs, recipe, row_bytes)


def _estimate(rm: RewardModel, inputs: Any, recipe: Recipe, row_bytes: int) -> StoreEstimate:
    tokens, n_texts, duplicates, scale = measured(rm, inputs, MEASURED_TEXTS)
    final = recipe.positions == "reward"
    spans = [positions_of(t, "final" if final else recipe.positions) for t in tokens]
    drop_first = "first" in recipe.exclude and not final
    sizes = [len(span) - (drop_first and 0 in span) for span in spans]
    if recipe.per_text is not None:
        sizes = [min(size, recipe.per_text) for size in sizes]
    n = n_texts if final else round(sum(sizes) * scale)
    return StoreEstimate(n, n * row_bytes, n_texts, duplicates, len(tokens) == n_texts)


class _Filling:
    """The shard that is being filled, and the index that speaks of those before it."""

    def __init__(self, shelf: Shelf, index: dict[str, Any]):
        self._shelf, self._index = shelf, index
        self._pending: list[dict[str, Tensor]] = []
        self._rows = 0
        self._pieces: dict[int, tuple[str, ...]] = {}
        self._left_out = dict(index["progress"]["left_out"])  # before the window at hand

    def add(self, window: Window, samples: Samples) -> None:
        """Put a window's samples behind those that wait, and write what fills a shard."""
        index, n = self._index, len(samples.text)
        done = index["progress"]["rows_done"] if index["progress"]["window_start"] == window.start else 0
        total = {r: self._left_out[r] + v for r, v in {**samples.left_out, "duplicates": window.duplicates}.items()}
        index |= {"n_texts": window.stop, "inputs_hash": window.inputs_hash, "left_out": total}
        if n > done:
            self._pending.append({name: t[done:] for name, t in _tensors(samples, index["settings"]["dtype"]).items()})
            self._rows += n - done
        if index["settings"]["keep_texts"]:
            self._pieces |= {number: t.pieces for number, t in zip(window.numbers, window.tokens, strict=True)}
        while self._rows >= index["settings"]["shard_rows"]:
            left = self._rows - index["settings"]["shard_rows"]
            whole = left == 0
            index["progress"] = {
                "window_start": window.stop if whole else window.start,
                "rows_done": 0 if whole else n - left,
                "left_out": dict(total if whole else self._left_out),
            }
            self._write(index["settings"]["shard_rows"])
        self._left_out = total

    def finish(self) -> None:
        """Write what is left, and that the store is finished."""
        index = self._index
        if index["complete"]:
            return
        index["progress"] = {"window_start": index["n_texts"], "rows_done": 0, "left_out": dict(self._left_out)}
        index["complete"] = True
        if self._rows:
            self._write(self._rows)
        else:
            require_samples(index)
            self._shelf.write_index(index)

    def _write(self, rows: int) -> None:
        index = self._index
        shard = self._taken(rows)
        before = index["shards"][-1]["last_text"] if index["shards"] else -1
        numbers = [number for number in shard["text"].unique_consecutive().tolist() if number > before]
        texts = {n: self._pieces[n] for n in numbers} if index["settings"]["keep_texts"] else None
        last = int(shard["text"][-1])
        self._pieces = {number: pieces for number, pieces in self._pieces.items() if number > last}
        norm = shard["norm"].double()
        entry = {
            **self._shelf.put(len(index["shards"]), shard, texts), "rows": rows, "n_texts": len(numbers),
            "first_text": int(shard["text"][0]), "last_text": last,
            "norm_mean": float(norm.mean()), "norm_rms": float(norm.square().mean().sqrt()),
        }  # fmt: skip
        index["shards"].append(entry)
        index["n_samples"] += rows
        self._shelf.write_index(index)

    def _taken(self, rows: int) -> dict[str, Tensor]:
        """The first rows that wait, as tensors of their own."""
        parts: list[dict[str, Tensor]] = []
        wanted = rows
        while wanted:
            first = self._pending.pop(0)
            have = len(first["text"])
            if have > wanted:
                self._pending.insert(0, {name: t[wanted:] for name, t in first.items()})
                first = {name: t[:wanted] for name, t in first.items()}
            parts.append(first)
            wanted -= min(have, wanted)
        self._rows -= rows
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _tensors(samples: Samples, dtype: str) -> dict[str, Tensor]:
    values = samples.values.to(dtype_of(dtype))
    if not bool(values.isfinite().all()):
        raise DataError(
            f"A sample cannot be held in {dtype}",
            found=f"a number of size {float(samples.values.abs().max()):.3g}",
            expected=f"at most {torch.finfo(dtype_of(dtype)).max:.3g}",
            do="store in bfloat16 or float32 (dtype=)",
        )
    return {"activations": values, "text": samples.text, "position": samples.position, "token": samples.token,
            "norm": samples.norm}  # fmt: skip


def _new_index(settings: dict[str, Any], model: dict[str, Any], width: int) -> dict[str, Any]:
    nothing = {"first": 0, "sinks": 0, "per_text": 0, "duplicates": 0}
    return {
        "format": FORMAT, "version": VERSION, "complete": False, "settings": settings, "model": model, "width": width,
        "n_samples": 0, "n_texts": 0, "inputs_hash": "", "left_out": dict(nothing),
        "progress": {"window_start": 0, "rows_done": 0, "left_out": nothing}, "shards": [],
    }  # fmt: skip


def _recipe(rm, site, positions, exclude, sink_multiple, per_text, batch_size, seed) -> Recipe:
    recipe = Recipe(
        Site.parse(site), positions, tuple(exclude), float(sink_multiple), per_text, batch_size, seed
    )  # fmt: skip
    require_recipe(rm, recipe)
    return recipe


def _width(rm: RewardModel, site: Site) -> int:
    """Numbers of a sample at a site, measured on a short text."""
    with torch.no_grad():
        _, tensors = next(iter(passes(rm, [rm.tokenizer.text("a")], [site])))
    return tensors[site][0].numel()


def _dtype_name(rm: RewardModel, dtype: str | torch.dtype | None) -> str:
    name = str(rm.dtype if dtype is None else dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise DataError(
            "The precision cannot be stored in", found=name, expected=", ".join(DTYPES), do="correct dtype="
        )
    return name


def _require_same_settings(index: dict[str, Any], settings: dict[str, Any], folder: str) -> None:
    differing = [name for name, value in settings.items() if index["settings"].get(name) != value]
    if differing:
        raise DataError(
            f"The store in {folder} was begun with other settings",
            found=", ".join(f"{name}={index['settings'].get(name)!r}" for name in differing),
            expected=", ".join(f"{name}={settings[name]!r}" for name in differing),
            do="pass the settings it was begun with, or choose another folder",
        )
