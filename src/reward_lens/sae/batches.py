"""Batches of one size from a tensor, a store or a stream, in an order that a seed and a position determine.

A pass over a tensor is a permutation drawn from (seed, pass). A store shuffles for itself, by the same seed, and says
where it stands. Another container is iterated again for every pass and comes in its own order. An iterator is one pass.
Batches run on across the end of a pass, so all have the same size (a store's leave out the rest of a pass), and a
training that stopped after n samples goes on with sample n + 1.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from reward_lens.errors import DataError

FEWEST_SAMPLES = 200
Chunk = tuple[Tensor, Tensor | None]


class Samples:
    """A source of samples x, or of pairs (x, y) for a transcoder, as batches.

    `n`: how many different samples there are; None for an iterator, and for a container that says no more than how many
    batches it has until a pass has ended. `d_in`, `d_out`: their widths.
    """

    expected = "a tensor [n, d_model], an activation store, or an iterator of tensors [b, d_model]"
    do = "for a transcoder pass (x, y), or an iterator of such pairs"

    def __init__(self, source: Any, seed: int, paired: bool, device: torch.device):
        self.seed, self.paired, self.device = seed, paired, device
        self.tensors = self._read(source)
        self.store = source if self.tensors is None and hasattr(source, "batches") and not paired else None
        self.one_pass = self.tensors is None and isinstance(source, Iterator)
        if self.tensors is None and self.store is None and not isinstance(source, Iterable):
            raise DataError(
                "The samples were not understood",
                found=f"a {type(source).__name__}",
                expected=self.expected,
                do=self.do,
            )
        self.source = source
        counted = self.tensors[0] if self.tensors else self.store
        self.n = _length(source) if counted is None else len(counted)
        if self.n is not None and self.n < FEWEST_SAMPLES:
            raise too_few(self.n)
        self._head: list[Chunk] = []
        self._stands: Any = None  # the store's batches in use
        x, y = self.first(1)
        self.d_in, self.d_out = x.shape[1], x.shape[1] if y is None else y.shape[1]

    def first(self, n: int) -> Chunk:
        """The first n samples of the first pass, or all of it if it has fewer; an iterator keeps them for training."""
        if not self.one_pass:
            return _joined(self._take(self._pass(0), n), n)
        have = sum(len(x) for x, _ in self._head)
        self._head += self._take(self._checked(self.source), n - have) if n > have else []
        return _joined(self._head, n)

    def batches(self, size: int, skip: int = 0, state: dict[str, Any] | None = None) -> Iterator[Chunk]:
        """Batches of `size` without end (an iterator's: until it ends), from sample `skip` or a store's `state` on."""
        if self.store is not None:
            self._stands = self.store.batches(size, seed=self.seed, epochs=None, drop_last=True, start=state)
            yield from self._checked(self._stands)
            return
        left: list[Chunk] = []
        have = 0
        for x, y in self._stream(skip):
            left.append((x, y))
            have += len(x)
            if have < size:
                continue
            x, y = _joined(left, have)
            for at in range(0, have - size + 1, size):
                yield x[at : at + size], None if y is None else y[at : at + size]
            have %= size
            rest = len(x) - have
            left = [(x[rest:], None if y is None else y[rest:])]

    def state(self) -> dict[str, Any] | None:
        """Where a store's batches stand; None for other sources, whose position is a number of samples."""
        return None if self._stands is None else self._stands.state()

    def fingerprint(self) -> str:
        """Tells one source from another: a hash over 64 samples of a tensor, what a store says of itself, and of others
        the number of samples."""
        digest = hashlib.sha256()
        if self.store is not None:
            digest.update(json.dumps(self.store.meta, sort_keys=True, default=str).encode())
            return digest.hexdigest()[:16]
        if self.tensors is None:
            return f"{type(self.source).__name__} of {_length(self.source)}"
        for tensor in self.tensors:
            digest.update(repr(tuple(tensor.shape)).encode())
            some = tensor[:: max(1, len(tensor) // 64)].detach().float().cpu().contiguous()
            digest.update(some.numpy().tobytes())
        return digest.hexdigest()[:16]

    def _stream(self, skip: int) -> Iterator[Chunk]:
        if self.one_pass:
            yield from _after(itertools.chain(self._head, self._checked(self.source)), skip)
            return
        first, start = divmod(skip, self.n) if self.tensors and self.n else (0, skip)
        passes = (self._pass(number) for number in itertools.count(first))
        yield from _after(itertools.chain.from_iterable(passes), start)

    def _pass(self, number: int) -> Iterator[Chunk]:
        """The samples of one pass."""
        if self.store is not None:
            yield from self._checked(self.store.batches(min(1024, len(self.store)), seed=self.seed))
            return
        if self.tensors is None:
            n = 0
            for chunk in self._checked(self.source):
                n += len(chunk[0])
                yield chunk
            if not n and number:
                raise DataError(
                    "The container gave no samples",
                    found=f"none in pass {number + 1}",
                    expected="the same samples in every pass",
                    do="pass an iterator with n_train=, which is gone through once, or a list of batches",
                )
            self.n = n
            return
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        order = torch.randperm(len(self.tensors[0]), generator=generator)
        for some in order.split(4096):
            index = some.to(self.tensors[0].device)
            yield self._chunk(*(t[index] for t in self.tensors))

    def _checked(self, chunks: Iterable) -> Iterator[Chunk]:
        for chunk in chunks:
            tensors = self._read(chunk)
            if tensors is None:
                raise DataError(
                    "The stream gave something that is not a batch of samples",
                    found=f"a {type(chunk).__name__}",
                    expected="pairs of tensors ([b, d_in], [b, d_out])" if self.paired else self.expected,
                    do="yield these",
                )
            yield self._chunk(*tensors)

    def _read(self, value: Any) -> tuple[Tensor, ...] | None:
        """The tensors that hold samples; None for anything else."""
        return sample_tensors(value, 1 + self.paired)

    def _chunk(self, *tensors: Tensor) -> Chunk:
        x, *y = (t.detach().to(self.device, torch.float32) for t in tensors)
        return self._finite(x, y[0] if y else None)

    def _take(self, chunks: Iterator[Chunk], n: int) -> list[Chunk]:
        taken, have = [], 0
        for chunk in chunks:
            taken.append(chunk)
            have += len(chunk[0])
            if have >= n:
                break
        return taken

    def _finite(self, x: Tensor, y: Tensor | None) -> Chunk:
        for tensor in (x,) if y is None else (x, y):
            if not bool(tensor.isfinite().all()):
                rows = int((~tensor.isfinite()).any(1).sum())
                raise DataError("Some samples hold NaN or infinity", found=f"{rows} of {len(tensor)} in one batch",
                                expected="finite activations", do="drop them, or run the model in float32")  # fmt: skip
        return x, y


def too_few(n: int) -> DataError:
    return DataError(
        "There are too few samples to train on",
        found=f"{n} samples",
        expected=f"at least {FEWEST_SAMPLES}",
        do=f"take {FEWEST_SAMPLES - n} more: more texts, or all positions of a text instead of one",
    )


def sample_tensors(value: Any, n: int) -> tuple[Tensor, ...] | None:
    """The `n` tensors of samples that belong together; None for anything else."""
    given = tuple(value) if n > 1 and isinstance(value, tuple | list) else (value,)
    tensors = tuple(t for t in given if isinstance(t, Tensor))
    if len(given) != n or len(tensors) != n:
        return None
    shapes = [list(t.shape) for t in tensors]
    floats = all(t.is_floating_point() for t in tensors)
    if not floats or any(len(shape) != 2 or 0 in shape[1:] for shape in shapes) or len({s[0] for s in shapes}) != 1:
        raise DataError(
            "The samples do not have the shape of samples",
            found=" and ".join(f"{t.dtype} {shape}" for t, shape in zip(tensors, shapes, strict=True)),
            expected="floating-point [n, d_model], for a transcoder or a crosscoder several with the same n",
            do="flatten texts and positions into one dimension",
        )
    return tensors


def _length(source: Any) -> int | None:
    """Samples in a list of batches; None for anything else, whose length may be a number of batches (a DataLoader)."""
    if not isinstance(source, list | tuple):
        return None
    chunks = [one[0] if isinstance(one, list | tuple) else one for one in source]
    return sum(map(len, chunks)) if all(isinstance(chunk, Tensor) for chunk in chunks) else None


def _after(chunks: Iterable[Chunk], skip: int) -> Iterator[Chunk]:
    for x, y in chunks:
        if skip < len(x):
            yield x[skip:], None if y is None else y[skip:]
        skip = max(0, skip - len(x))


def _joined(chunks: list[Chunk], n: int) -> Chunk:
    if not chunks:
        raise too_few(0)
    widths = {(x.shape[1], None if y is None else y.shape[1]) for x, y in chunks}
    if len(widths) != 1:
        raise DataError("The samples have different widths", found=", ".join(map(str, sorted(widths, key=str))),
                        expected="one width", do="train on one site of one model")  # fmt: skip
    x = torch.cat([x for x, _ in chunks])[:n]
    y = [y for _, y in chunks if y is not None]
    return x, torch.cat(y)[:n] if y else None
