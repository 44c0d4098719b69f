"""The implicit reward of DPO by depth and by component, in both models.

Lens. At depth d, log p_d(y_t) is read by the model's own norm and unembedding from what enters block d:

    r_d = beta * sum_t [ log pi_d(y_t) - log ref_d(y_t) ]            r_L = the implicit reward

Contributions. A token's log-probability is its logit less the log-normaliser, log sum_v exp z_v. The logit is linear in
the writes once the norm's scale is frozen; the normaliser is not, and no split of it over components is exact. So it is
a row of its own, as is what a cap on the logits takes, and the rows sum to the log-probability:

    log p(y_t) = sum_c u_t . c_t + bias + cap - log normaliser         u_t: row y_t of W pulled back through the norm

What this cannot show: what a component does to the probability. A write that raises all logits alike raises its row and
the normaliser's by the same amount, and nothing else. Subtracting the mean over the vocabulary would hide that, and is
not exact either. Depths before the last are read by a head that was trained on the last alone.

Reference: nostalgebraist 2020 (logit lens); Elhage et al. 2021 (direct logit attribution).
"""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from reward_lens import data
from reward_lens.arguments import checked_arguments
from reward_lens.engine import hooks
from reward_lens.errors import DataError, StructureError
from reward_lens.methods.observation.splits import component_coords
from reward_lens.methods.readouts.implicit_reading import (
    Reading,
    Where,
    by_text,
    by_token,
    final_states,
    implicit_result,
    masked_margin,
    read_both,
    token_coords,
    with_margin,
)
from reward_lens.model.forward import Batch
from reward_lens.model.language_model import End, Given, LanguageModel
from reward_lens.result import Check, Result

Per = Literal["response", "token"]
Joined = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""The values of both models as one."""
MODELS = ("policy", "reference", "reward")
CLOSING = ("rounding", "bias", "cap", "log normaliser")


@checked_arguments
def implicit_lens(
    policy: Given,
    reference: Given,
    pairs,
    beta: float = 0.1,
    end: End = "template",
    per: Per = "response",
    seed: int = 0,
) -> Result:
    """The implicit reward read off both models at every depth.

    Returns value (pair, side, depth) in reward units, with per="token" (pair, side, depth, position) as in
    `implicit_tokens`; depth 0 = what enters block 0, n_layers = the implicit reward, whose log-probabilities the checks
    "own log-probabilities" hold against the modules' own logits. Mean and interval over prompts for whole responses.
    Parameters and errors as for `implicit_reward`; `StructureError` where the models' numbers of layers differ.
    """
    _require_per(per)
    pairs, first, second = read_both(policy, reference, pairs, beta, end, _read_lens, lambda v: v[:, -1])
    _require_alike(first, second)
    coords: dict[str, Any] = {"depth": np.arange(first.n_layers + 1)}
    words: dict[str, Any] = {
        "title": "Lens of the implicit reward", "settings": {"per": per},
        "shows": "How far apart policy and reference are about the response at every depth; the last is the reward.",
        "cannot_show": "That the models differ where the curve moves: both heads were trained on the last residual.",
    }  # fmt: skip
    return _finished("implicit_lens", pairs, first, second, lambda a, b: beta * (a - b), ("depth",), coords, beta, end,
                     per, seed, [], words)  # fmt: skip


@checked_arguments
def implicit_contributions(
    policy: Given,
    reference: Given,
    pairs,
    beta: float = 0.1,
    end: End = "template",
    per: Per = "response",
    seed: int = 0,
) -> Result:
    """The log-probabilities of the responses' tokens split over each model's components and its normaliser.

    Returns value (pair, side, model, component) in reward units, with per="token" (pair, side, model, component,
    position); model "policy" and "reference" hold beta times the log-probability's rows, "reward" their difference.
    Rows: embed, L0.attn, L0.mlp, ... (beta times what each adds to the realised token's logit, exact at the frozen
    norm), "rounding" (16 bits only), "bias", "cap" (what a cap on the logits takes; 0 without one), "log normaliser".
    They sum to beta times the log-probability, and in "reward" to the implicit reward: check "completeness". Mean and
    interval over prompts for whole responses. Parameters and errors as for `implicit_reward`; `StructureError` where
    the models have other components.
    """
    _require_per(per)
    pairs, first, second = read_both(policy, reference, pairs, beta, end, _read_parts, lambda v: v[:, -1])
    _require_alike(first, second)
    sixteen = first.sixteen_bit or second.sixteen_bit
    gaps = [_completeness(r) for r in (first, second)]
    checks = [Check("completeness", max(gap for gap, _ in gaps), 1e-2 if sixteen else 1e-5)]
    if sixteen:
        checks.append(Check("rounding", max(lost for _, lost in gaps), 1e-2))
    names = [*_components(first.n_layers), *((name, first.n_layers, name) for name in CLOSING)]
    names = [row for row in names if sixteen or row[0] != "rounding"]
    lost = 2 * first.n_layers + 1
    drop = [-1] if sixteen else [lost, -1]
    first, second = (r._replace(values=tuple(np.delete(v, drop, 1) for v in r.values)) for r in (first, second))
    coords: dict[str, Any] = {
        "model": np.array(MODELS, dtype=object),
        **component_coords(*zip(*names, strict=True)),
    }
    words: dict[str, Any] = {
        "title": "Contributions to the implicit reward", "settings": {"per": per}, "frozen": "the final norm's scale",
        "shows": "What each component adds to the logits of the response's tokens; with the normaliser's row they sum "
        "to the log-probability.",
        "cannot_show": "What a component does to the probability: the normaliser answers to all of them and is not "
        "split.",
    }  # fmt: skip
    return _finished(
        "implicit_contributions", pairs, first, second, lambda a, b: beta * np.stack([a, b, a - b], 2),
        ("model", "component"), coords, beta, end, per, seed, checks, words,
    )  # fmt: skip


def _read_lens(lm: LanguageModel, batch: Batch, replies, where: Where) -> np.ndarray:
    """[token, depth]: log-probabilities at every depth."""
    depths: list[Tensor] = []

    def read(x: Tensor) -> None:
        depths.append(lm.log_probabilities(where.pick(x).to(lm.norm.gain), where.target))

    final = final_states(lm, batch, where, *(lm.trunk.read_residual(d, read) for d in range(lm.n_layers)))
    last = lm.log_probabilities(final, where.target)
    return torch.stack([*depths, last], 1).double().cpu().numpy()


def _read_parts(lm: LanguageModel, batch: Batch, replies, where: Where) -> np.ndarray:
    """[token, component, rounding, bias, cap, log normaliser and, at the end, the log-probability]."""
    like = lm.norm.gain
    unit = lm.norm.pull_back(lm.unembedding[where.target], torch.ones_like(like[:1]))
    rows: dict[str, Tensor] = {}

    def along(name: str) -> hooks.Read:
        return lambda x: rows.__setitem__(name, (where.pick(x).to(like) * unit).sum(-1).double())

    wanted = [lm.trunk.read_residual(0, along("embed"))]
    for layer in range(lm.n_layers):
        wanted += [lm.trunk.read_write(batch, layer, kind, along(f"L{layer}.{kind}")) for kind in ("attn", "mlp")]
    final = final_states(lm, batch, where, *wanted)
    scale = lm.norm.scale(final)[:, 0].double()
    parts = torch.stack([rows[name] for name, _, _ in _components(lm.n_layers)], 1) * scale[:, None]
    bias = (lm.unembedding[where.target] @ lm.norm.shift + lm.offsets[where.target]).double()
    raw, z, total = (x.double() for x in lm.read_logits(final, where.target))
    lost = (final * unit).sum(-1).double() * scale - parts.sum(1) if lm.sixteen_bit else torch.zeros_like(raw)
    closing = torch.stack([lost, bias, z - raw, -total, z - total], 1)
    return torch.cat([parts, closing], 1).cpu().numpy()


def _components(n_layers: int) -> list[tuple[str, int, str]]:
    """Label, layer and kind of what writes to the residual stream."""
    blocks = [(f"L{k}.{kind}", k, kind) for k in range(n_layers) for kind in ("attn", "mlp")]
    return [("embed", -1, "embed"), *blocks]


def _completeness(reading: Reading) -> tuple[float, float]:
    """Largest distance of the rows' sum from the log-probability, and largest rounding, over the rows' sizes."""
    values = np.concatenate(reading.values)
    parts, whole = values[:, :-1], values[:, -1]
    size = np.abs(parts).sum(1)
    lost = np.abs(parts[:, CLOSING.index("rounding") - len(CLOSING)]) / size
    return float((np.abs(parts.sum(1) - whole) / size).max()), float(lost.max())


def _finished(
    name: str, pairs: data.Pairs, first: Reading, second: Reading, joined: Joined,
    dims: tuple[str, ...], coords: dict[str, Any], beta: float, end: End, per: Per, seed: int, checks: list[Check],
    words: dict[str, Any],
) -> Result:  # fmt: skip
    """The result for whole responses or by token."""
    if per == "response":
        values, positions = with_margin(joined(by_text(first), by_text(second))), {}
    else:
        values = masked_margin(joined(by_token(first), by_token(second)), first)
        positions = token_coords(first)
    whole = per == "response"
    return implicit_result(
        name, pairs, first, second, values, ("pair", "side", *dims, *([] if whole else ["position"])),
        coords | positions, beta, end, seed, checks=checks, interval=whole,
        undefined=None if whole else "a margin exists only where both responses have had the same tokens", **words,
    )  # fmt: skip


def _require_per(per: str) -> None:
    if per not in ("response", "token"):
        raise DataError("per was not understood", found=repr(per), expected="'response' or 'token'",
                        do="pass one of these")  # fmt: skip


def _require_alike(first: Reading, second: Reading) -> None:
    if first.n_layers != second.n_layers:
        raise StructureError(
            "Policy and reference cannot be compared part by part",
            found=f"{first.n_layers} and {second.n_layers} layers",
            expected="two models of one architecture, as DPO trains them",
            do="use implicit_reward or implicit_tokens, which ask for equal tokens only",
        )
