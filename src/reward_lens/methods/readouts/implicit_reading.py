"""Both models of a DPO reward, read one after the other: tokens once, per-token numbers of each, then it is let go.

What is read is any array of per-token rows whose columns a caller names; the reward is always
beta * (sum over the policy's tokens - sum over the reference's).
"""

import gc
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from reward_lens import data
from reward_lens.engine import hooks
from reward_lens.errors import DataError, named
from reward_lens.methods.shared.paired import labelled, over_prompts
from reward_lens.model.forward import Batch
from reward_lens.model.language_model import End, Given, LanguageModel, Reply, opened, require_end
from reward_lens.model.scored import SIDES
from reward_lens.result import Check, Result

ROLES = ("policy", "reference")
Texts = Sequence[Reply]
Read = Callable[[LanguageModel, Batch, list[Reply], "Where"], np.ndarray]
"""Of one batch: [token, ...], the counted tokens of its texts in order."""
Total = Callable[[np.ndarray], np.ndarray]


class Where(NamedTuple):
    """The counted tokens of a batch: the row and the place before each, where its probability is read, and its id."""

    row: Tensor
    before: Tensor
    target: Tensor

    def pick(self, x: Tensor) -> Tensor:
        """[token, ...] of what stands at [batch, pos, ...]."""
        return x[self.row.to(x.device), self.before.to(x.device)]


class Reading(NamedTuple):
    """What is kept of one model."""

    name: str
    surroundings: dict[str, Any]
    texts: tuple[Reply, ...]
    """Chosen and rejected of each pair in turn."""
    values: tuple[np.ndarray, ...]
    """[token, ...] a text, float64."""
    n_layers: int
    sixteen_bit: bool
    own: Check
    """Distance of the log-probabilities of the first pair from the module's own logits."""


def read_both(
    policy: Given, reference: Given, pairs, beta: float, end: End, read: Read, total: Total
) -> tuple[data.Pairs, Reading, Reading]:
    """The pairs, and both models' readings; a model that was named or is made by a function is dropped before the next
    one is loaded. `total` gives of a text's values the tokens' log-probabilities, for the check of them."""
    pairs = data.as_pairs(pairs)
    require_end(end)
    if not beta > 0:
        raise DataError("beta was not understood", found=repr(beta), expected="a positive number, the policy's own in "
                        "training", do="pass the beta of the DPO run")  # fmt: skip
    first = _read(policy, "policy", pairs, end, read, total, None)
    gc.collect()
    return pairs, first, _read(reference, "reference", pairs, end, read, total, first)


@torch.no_grad()
def _read(
    given: Given, role: str, pairs: data.Pairs, end: End, read: Read, total: Total, before: Reading | None
) -> Reading:
    lm = opened(given, role)
    if before is None:
        texts = [named(f"Pair {p.id}", lm.tokenizer.reply, p.messages, response, end)
                 for p in pairs for response in p.responses]  # fmt: skip
    else:
        texts = [_same_tokens(lm, text, end, before.name) for text in before.texts]
    values: list[np.ndarray] = [np.empty(0)] * len(texts)
    gap, size = 0.0, 1e-12
    for batch in lm.batches(texts):
        replies = [texts[run] for run in batch.rows]
        found = read(lm, batch, replies, _where(batch, replies))
        start = 0
        for run, reply in zip(batch.rows, replies, strict=True):
            values[run] = found[start : start + len(reply.counted)]
            start += len(reply.counted)
    for text, found in zip(texts[:2], values, strict=False):
        own = lm.own_log_probabilities(text).double().cpu().numpy()
        gap, size = max(gap, float(np.abs(own - total(found)).max())), max(size, float(np.abs(own).max()))
    check = Check(f"own log-probabilities ({role})", gap / size, 2e-2 if lm.sixteen_bit else 1e-5)
    return Reading(lm.name, lm.surroundings(), tuple(texts), tuple(values), lm.n_layers, lm.sixteen_bit, check)


def final_states(lm: LanguageModel, batch: Batch, where: Where, *wanted: hooks.Hook) -> Tensor:
    """Pre-norm residuals before each counted token, of one pass with further hooks, in the tail's precision."""
    kept: list[Tensor] = []
    end = lm.trunk.read_residual(lm.n_layers, lambda x: kept.append(where.pick(x).to(lm.norm.gain)))
    lm.trunk.run(batch, *wanted, end)
    return kept[0]


def _where(batch: Batch, replies: list[Reply]) -> Where:
    row, place, target = [], [], []
    for k, reply in enumerate(replies):
        for position in reply.counted:
            row.append(k)
            place.append(position - 1)
            target.append(reply.tokens.ids[position])
    row, place, target = (torch.tensor(x, device=batch.ids.device) for x in (row, place, target))
    return Where(row, place + batch.offset[row], target)


def _same_tokens(lm: LanguageModel, text: Reply, end: End, policy: str) -> Reply:
    """The same conversation's tokens under the reference's tokenizer, which must be the policy's."""
    own = lm.tokenizer.placed(text.text, text.start, text.stop, end)
    if own.tokens.ids != text.tokens.ids:
        at = next((i for i, (a, b) in enumerate(zip(own.tokens.ids, text.tokens.ids, strict=False)) if a != b), 0)
        raise DataError(
            "Policy and reference have different tokenizers",
            found=f"token {own.tokens.ids[at]} of {lm.name} where {policy} has {text.tokens.ids[at]} in "
            f"{text.text[:60]!r}",
            expected="the same tokens: a ratio of probabilities is of one event",
            do="pass the reference that the policy was trained against",
        )
    if max(own.tokens.ids) >= len(lm.unembedding):
        raise DataError("The reference lacks tokens of the policy", found=f"{len(lm.unembedding)} rows",
                        expected="a row for every token", do="resize the reference's vocabulary")  # fmt: skip
    return own


def by_text(reading: Reading) -> np.ndarray:
    """[pair, side, ...] sums over the counted tokens, chosen and rejected."""
    sums = np.stack([v.sum(0) for v in reading.values])
    return sums.reshape(-1, 2, *sums.shape[1:])


def by_token(reading: Reading) -> np.ndarray:
    """[pair, side, ..., position] of the counted tokens, NaN past a text's last."""
    longest = max(len(v) for v in reading.values)
    out = np.full((len(reading.values), *reading.values[0].shape[1:], longest), np.nan)
    for i, v in enumerate(reading.values):
        out[i, ..., : len(v)] = np.moveaxis(v, 0, -1)
    return out.reshape(-1, 2, *out.shape[1:])


def with_margin(values: np.ndarray) -> np.ndarray:
    """[pair, 3, ...] from the two sides' [pair, 2, ...]."""
    return np.concatenate([values, values[:, :1] - values[:, 1:]], 1)


def common_tokens(policy: Reading) -> np.ndarray:
    """[pair] leading counted tokens that the two responses share."""
    out = []
    for a, b in zip(policy.texts[::2], policy.texts[1::2], strict=True):
        ids = [[r.tokens.ids[i] for i in r.counted] for r in (a, b)]
        differing = (i for i, (x, y) in enumerate(zip(*ids, strict=False)) if x != y)
        out.append(next(differing, min(map(len, ids))))
    return np.array(out)


def masked_margin(values: np.ndarray, policy: Reading) -> np.ndarray:
    """[pair, 3, ..., position]: a margin exists only where both responses have the same tokens so far."""
    out = with_margin(values)
    for i, n in enumerate(common_tokens(policy)):
        out[i, 2, ..., n:] = np.nan
    return out


def token_coords(policy: Reading) -> dict[str, Any]:
    """Coordinates of a padded `position` dim that counts from the first token of the response."""
    lengths = np.array([len(r.counted) for r in policy.texts]).reshape(-1, 2)
    shape = (len(lengths), 3, int(lengths.max()))
    ids, pieces, roles = np.full(shape, -1), np.full(shape, "", dtype=object), np.full(shape, "", dtype=object)
    counts = np.column_stack([lengths, common_tokens(policy)])
    for i in range(shape[0]):
        for side, reply in zip(range(3), (*policy.texts[2 * i : 2 * i + 2], policy.texts[2 * i]), strict=True):
            for k, position in enumerate(reply.counted[: counts[i, side]]):
                ids[i, side, k] = reply.tokens.ids[position]
                pieces[i, side, k] = reply.tokens.pieces[position]
                roles[i, side, k] = reply.tokens.role(position)
    where = ("pair", "side", "position")
    return {"position": np.arange(shape[2]), "n_positions": (("pair", "side"), counts), "token": (where, ids),
            "piece": (where, pieces), "role": (where, roles)}  # fmt: skip


def implicit_result(
    name: str, pairs: data.Pairs, policy: Reading, reference: Reading, values: np.ndarray, dims: Sequence[str],
    coords: dict[str, Any], beta: float, end: End, seed: int, *, checks: Sequence[Check] = (), interval: bool = True,
    undefined: str | None = None, **meta: Any,
) -> Result:  # fmt: skip
    """The `Result` of both readings, its provenance that of the two models."""
    lengths = np.array([len(r.counted) for r in policy.texts]).reshape(-1, 2)
    columns = {"chosen_tokens": ("pair", lengths[:, 0]), "rejected_tokens": ("pair", lengths[:, 1])}
    value: xr.DataArray = labelled(pairs, values, dims, columns | coords)
    summary = {}
    if interval:
        summary, meta["interval"] = over_prompts(pairs, value, seed)
    models = {role: {"model": r.name, **r.surroundings} for role, r in zip(ROLES, (policy, reference), strict=True)}
    settings = {"beta": beta, "end": end} | meta.pop("settings", {})
    provenance = {
        "method": name, "model": policy.name, **policy.surroundings, "readout": "log_ratio", "models": models,
        "n_pairs": len(pairs), "n_prompts": pairs.n_prompts, "inputs_hash": data.inputs_hash(pairs), "seed": seed,
        "settings": settings, "sides": list(SIDES),
    }  # fmt: skip
    checks = [policy.own, reference.own, *checks, *_one_network(policy, reference)]
    return Result(name, value, unit="reward", checks=checks, meta=provenance | meta, undefined=undefined,
                  **summary)  # fmt: skip


def _one_network(policy: Reading, reference: Reading) -> list[Check]:
    """A recorded fact where no token tells the two models apart."""
    if not all(np.array_equal(a, b) for a, b in zip(policy.values, reference.values, strict=True)):
        return []
    note = (
        "both models read every token alike, so every reward is 0; the module inside a PeftModel still runs its adapter"
    )
    return [Check("policy and reference are the same", 1.0, np.inf, note)]
