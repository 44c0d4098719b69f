"""A pair's rewards and margins of two models split over the latents of their crosscoder.

See `crosscoder_latents` for what the rows mean. Of every text the latents are the same for both models: one activation,
two directions.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from reward_lens.errors import DataError
from reward_lens.methods.latents.latent_contributions import TAILS, Scale, active_latents, latent_table
from reward_lens.methods.latents.latent_splits import Part
from reward_lens.methods.latents.model_readings import Reading
from reward_lens.sae.crosscoder import Crosscoder

AT_ONCE = 2048  # positions encoded at once
Codes = list[tuple[np.ndarray, Tensor]]


def chunks(crosscoder: Crosscoder, read: Sequence[Reading]) -> Iterator[tuple[list[int], list[Tensor]]]:
    """A few texts at once: their lengths, and every model's states [pos of all of them, d_m]."""
    lengths, start = [len(x) for x in read[0].x], 0
    while start < len(lengths):
        stop = start + 1
        while stop < len(lengths) and sum(lengths[start : stop + 1]) <= AT_ONCE:
            stop += 1
        yield lengths[start:stop], [torch.cat(one.x[start:stop]).to(crosscoder.b_enc) for one in read]
        start = stop


def codes_of(crosscoder: Crosscoder, read: Sequence[Reading]) -> Codes:
    """Of every text the active latents and their activations [pos, active], float64."""
    out = []
    for lengths, xs in chunks(crosscoder, read):
        for z in crosscoder.encode(*xs).cpu().split(lengths):
            active = (z != 0).any(0).nonzero().flatten()
            out.append((active.numpy(), z[:, active].double()))
    return out


def parts_of(crosscoder: Crosscoder, m: int, one: Reading, codes: Codes, split: Scale, unit: float) -> list[Part]:
    """Every text's rows of one model, and what they put into its pair's margin, times `unit`."""
    rows, bias = crosscoder.W_dec[m].double().cpu(), crosscoder.b_dec[m].double().cpu()
    out: list[Part] = []
    for i in range(0, len(codes), 2):
        x, g = ([t.double() for t in some[i : i + 2]] for some in (one.x, one.g))
        found, sizes = [], []
        for k, sign in enumerate((1, -1)):
            active, z = codes[i + k]
            directions = rows[torch.from_numpy(active)]
            written = (z, directions, x[k] - z @ directions - bias, bias)
            own, tail = _along(g[k], *written)
            reward, constant = float(one.reward[i + k]), float(one.constant[i + k])
            left = reward - own.sum() - sum(tail)
            direct = one.estimator == "direct"
            tails = np.array([*tail, constant if direct else left])
            sizes.append(np.abs(own).sum() + np.abs(tails).sum() + abs(reward))
            gap = abs(left - constant) if direct else abs(own.sum() + sum(tail) - float((g[k] * x[k]).sum()))
            margin, tails_to_margin, norm = own, tails, 0.0
            if split == "shared":
                margin, tail = _along((g[0] + g[1]) / 2, *written)
                tails_to_margin = np.array([*tail, constant])
                norm = sign * float(((g[k] - g[1 - k]) * x[k]).sum()) / 2
            found.append(Part(active, own, sign * margin, tails, sign * tails_to_margin, norm, gap / sizes[k], 0.0))
        margin = sum(p.to_margin.sum() + p.tails_to_margin.sum() + p.norm for p in found)
        off = float(abs(margin - (one.reward[i] - one.reward[i + 1])) / sum(sizes))
        out += [_in_unit(part._replace(other_gap=off), unit) for part in found]
    return out


def _along(v: Tensor, z: Tensor, directions: Tensor, error: Tensor, bias: Tensor) -> tuple[np.ndarray, list[float]]:
    """What latents, and error and bias, are worth along v [pos, d_m]."""
    return (z * (v @ directions.T)).sum(0).numpy(), [float((v * error).sum()), float((v @ bias).sum())]


def _in_unit(part: Part, unit: float) -> Part:
    names = ("own", "to_margin", "tails", "tails_to_margin", "norm")
    return part._replace(**{name: getattr(part, name) * unit for name in names})


def values_of(
    parts: list[list[Part]], d_sae: int, split: Scale, top: int | None
) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Names of the last rows, values [pair, side, model, row], sums over all latents [pair, side, model], latents."""
    sparse, whole, tails = [], [], []
    for mine in parts:
        both = [latent_table(mine[k::2], d_sae, False) for k in range(2)]
        both.append(latent_table(mine[::2], d_sae, True) + latent_table(mine[1::2], d_sae, True))
        sparse.append(both)
        whole.append(np.stack([np.asarray(table.sum(1)).ravel() for table in both], 1))
        norm = np.array([p.norm for p in mine]).reshape(-1, 2)
        own, to_margin = (np.stack([getattr(p, name) for p in mine]).reshape(-1, 2, 3)
                          for name in ("tails", "tails_to_margin"))  # fmt: skip
        last = np.concatenate([own, to_margin.sum(1, keepdims=True)], 1)
        of_norm = np.zeros((len(last), 3, 1))
        of_norm[:, 2, 0] = norm.sum(1)
        tails.append(np.concatenate([last, of_norm], -1) if split == "shared" else last)
    total = np.stack([w[:, 2] + t[:, 2].sum(-1) for w, t in zip(whole, tails, strict=True)])
    active = active_latents([*parts[0], *parts[1]])
    if not len(active):
        raise DataError("No latent of the crosscoder is active in these texts", found="zeros only",
                        expected="texts like those it was trained on", do="look at its fvu in meta")  # fmt: skip
    carried = np.asarray((sparse[1][2] - sparse[0][2]).T @ (total[1] - total[0]))[active]
    kept = active[np.argsort(-np.abs(carried), kind="stable")[:top]]
    names, columns = list(TAILS) + ["norm"] * (split == "shared"), []
    for tables, sums, last in zip(sparse, whole, tails, strict=True):
        mine = np.stack([table[:, kept].toarray() for table in tables], 1)
        rest = [(sums - mine.sum(-1))[..., None]] if len(kept) < len(active) else []
        columns.append(np.concatenate([mine, *rest, last], -1))
    names = ["other latents"] * (len(kept) < len(active)) + names
    columns.append(columns[1] - columns[0])
    whole.append(whole[1] - whole[0])
    return names, np.stack(columns, 2), np.stack(whole, 2), kept
