"""Which words earned the points: the reward of a response shared out over its tokens, words or sentences.

    prefix          r_t - r_(t-1), with r_t the head (own norm) at position t of one pass    sums to r - start
    truncate        r(prompt, response[:t], tail) - r(prompt, response[:t-1], tail)          sums to r - start
    gradient        (x_t - x'_t) . dr/dx_t, x what enters block 0, x' its baseline           no sum is claimed
    integrated      the same gradient averaged over the line from x' to x                    sums to r - start
    leave_one_out   r - r without the unit, its tokens deleted or attention to them blocked  no sum is claimed

`start` is the reward of the reference: read before the response (prefix), of the empty response (truncate,
leave_one_out), at the baseline (gradient, integrated). The prompt and the template's tail stay as they are.

What this cannot show: which words *would* have earned points elsewhere. Prefix reads the head at positions it
was not trained at; the others score texts (or residuals) that nobody wrote. Where the methods disagree, the
answer depends on the question. References: Sundararajan et al. 2017, arXiv 1703.01365; Li, Monroe, Jurafsky
2016, arXiv 1612.08220.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from reward_lens import data
from reward_lens.arguments import checked_arguments
from reward_lens.engine.places import require_readings_along
from reward_lens.errors import CheckFailed, DataError
from reward_lens.methods.observation.embedding_paths import Baseline, gradient_path, integrated_path
from reward_lens.methods.shared.paired import paired_result
from reward_lens.methods.shared.removals import deleted, masked, rewards, truncated
from reward_lens.methods.shared.units import By, Unit, common_units, units_of
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.tokens import Tokens, common_prefix
from reward_lens.result import Check, Result

Method = Literal["prefix", "truncate", "gradient", "integrated", "leave_one_out"]
Removal = Literal["delete", "mask"]

CHOICES = {"method": Method, "by": By, "baseline": Baseline, "removal": Removal}


@dataclasses.dataclass(frozen=True)
class Shares:
    """What a method gives every text."""

    values: list[np.ndarray]
    """One a text: [unit]."""
    start: np.ndarray
    """[text] reward of the reference."""
    reward: np.ndarray
    """[text] reward of the whole text."""
    forward_rows: int
    backward_rows: int = 0
    steps: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, dtype=int))
    gaps: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    """[text] of the integrated gradients, token by token; empty for the other methods."""
    token_gaps: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    """[text] how far half the nodes put a token's value elsewhere, over the largest value; empty likewise."""


@checked_arguments
def token_attribution(
    rm: RewardModel,
    pairs,
    method: Method = "prefix",
    by: By = "token",
    steps: int = 32,
    baseline: Baseline = "mean",
    removal: Removal = "delete",
    seed: int = 0,
) -> Result:
    """Share the reward of each response out over its tokens, words or sentences. For one response by itself:
    `token_attribution(rm, [Pair(prompt, response, "")]).sel(side="chosen")`.

    Parameters
    ----------
    method: "prefix" (one pass; off-distribution), "truncate" (a row a unit), "gradient" (one pass and one
        backward), "integrated" (`steps` of each, and up to 512 for a text whose line turns fast) or
        "leave_one_out" (a row a unit). `meta` states the rows that ran; a row of truncate or leave_one_out is run
        from where it differs from the whole text, with the whole text's keys and values before.
    by: leave_one_out removes a unit whole; for the other methods a unit's value is the sum over its tokens.
        Byte tokens of one character are separate tokens and never separate words.
    steps: Gauss-Legendre nodes of the integrated gradient; more are put where the reward turns fast, until the sum
        closes and half the nodes give every token its value to a tenth of the largest (errors of single tokens may
        cancel in the sum; that of all nodes is mostly far smaller than that of half). At most 512 a text.
    baseline: of gradient and integrated, put at the response's positions of the residual entering block 0:
        "mean" of the vocabulary, "zero", or the "pad" token's.
    removal: "delete" closes the gap; "mask" blocks attention to the unit and keeps every position id (a model
        that counts positions off the attention mask, as ALiBi in Bloom does, closes the gap in both). A unit
        at which the reward itself is read, or a prompt gate, cannot be masked: undefined.
    seed: recorded; nothing here is random.

    Returns value (pair, side, position) in reward units, `position` counting units of the response (prefix:
    and of the template's tail), padded past `n_positions`. The margin exists on the leading units that both
    responses share (for prefix and truncate it is zero there: they have read the same text). Coordinates:
    `piece`, `role`, `token_position` (first token), `n_tokens`, `token` (id, by="token"), and per side
    `start` and `reward`. Checks: "telescoping" (prefix, truncate; 1e-5 S, S = the largest of |reward|,
    |start|, sum of |values|), "completeness" (integrated; 1e-2 of the larger of |reward - start| and sum of
    |token values|; in 16 bits 5e-2 of the largest of these, |reward| and |start|), "single tokens" (integrated: what
    leaving out half the nodes changes, over .1 only where 512 rows were spent); gradient and leave_one_out
    record how far they are from adding up. Raises `DataError` for an unknown option, `CheckFailed` if a sum
    does not close: a reward that jumps along the line, as routing to experts makes it (Mixtral), has no
    integrated gradients.
    """
    _require(steps, method=method, by=by, baseline=baseline, removal=removal)
    pairs = data.as_pairs(pairs)
    tokens = [t for both in rm.tokenize_pairs(pairs) for t in both]
    if method == "prefix":
        require_readings_along(rm, tokens)
    units = [units_of(t, by, tail=method == "prefix") for t in tokens]
    tolerance = (5e-2 if rm.sixteen_bit else 1e-2) if method == "integrated" else None
    if method == "prefix":
        shares = _prefix(rm, tokens, units)
    elif method == "truncate":
        shares = _in_pairs(rm, tokens, units, truncated)
    elif method == "leave_one_out":
        shares = _in_pairs(rm, tokens, units, deleted if removal == "delete" else masked)
    else:
        shares = _along_embeddings(rm, tokens, units, baseline, steps, tolerance)
    settings: dict = {"method": method, "by": by}
    if method in ("gradient", "integrated"):
        settings |= {"baseline": baseline}
    if shares.steps.size:
        settings |= {"steps": steps, "quadrature": "Gauss-Legendre", "most_steps": int(shares.steps.max())}
    if method == "leave_one_out":
        settings |= {"removal": removal}
    values, coords = _table(tokens, units, shares, by)
    return paired_result(
        rm, "token_attribution", pairs, values, ("pair", "side", "position"), coords, seed=seed,
        interval=False,
        checks=_checks(rm, method, shares, baseline, tolerance),
        undefined="the head reads at this unit's own position, so attention to it cannot be blocked",
        forward_rows=shares.forward_rows, backward_rows=shares.backward_rows, settings=settings,
        **_words(method, by, baseline, removal),
    )  # fmt: skip


@torch.no_grad()
def _prefix(rm: RewardModel, tokens: Sequence[Tokens], units: Sequence[list[Unit]]) -> Shares:
    values: list[np.ndarray] = [np.empty(0)] * len(tokens)
    start = np.zeros(len(tokens))
    gates = rm.readout_inputs(tokens)
    for batch in rm.batches(tokens):
        kept: list[Tensor] = []
        inputs = None if gates is None else gates[list(batch.rows), None]

        def read(x: Tensor, kept=kept, inputs=inputs) -> None:
            kept.append(rm.readout.reward(x.to(rm.like), inputs).double().cpu())

        rm.trunk.run(batch, rm.trunk.read_residual(rm.n_layers, read))
        for row, run in enumerate(batch.rows):
            text, first = tokens[run], int(batch.offset[row])
            # What stands after the reward position is not read; before the first token nothing has been.
            curve = [0.0, *kept[0][row, first : first + text.reward_pos + 1].tolist()]
            ends = [text.response.start, *(unit.positions.stop for unit in units[run])]
            reads = np.array([curve[min(end, text.reward_pos + 1)] for end in ends])
            values[run], start[run] = np.diff(reads), reads[0]
    reward = rm.rewards(tokens).double().numpy()
    return Shares(values, start, reward, 2 * len(tokens))


def _in_pairs(rm: RewardModel, tokens: Sequence[Tokens], units: Sequence[list[Unit]], variants) -> Shares:
    """Score each text's variants, those of a pair together, so that what its responses share is scored
    once."""
    values, start, reward, rows = [], [], [], 0
    for i in range(0, len(tokens), 2):
        read, n_rows = rewards(rm, [variants(rm, tokens[j], units[j]) for j in (i, i + 1)])
        rows += n_rows
        for some in read:
            values.append(np.diff(some) if variants is truncated else some[-1] - some[1:-1])
            start.append(some[0])
            reward.append(some[-1])
    return Shares(values, np.array(start), np.array(reward), rows)


def _along_embeddings(
    rm: RewardModel, tokens: list[Tokens], units: list[list[Unit]], baseline: Baseline, steps: int, tolerance
) -> Shares:
    reward = rm.rewards(tokens).double().numpy()
    if tolerance is None:
        path = gradient_path(rm, tokens, baseline)
    else:
        path = integrated_path(rm, tokens, baseline, reward, steps, tolerance)
    values = []
    for one, text, some in zip(path.values, tokens, units, strict=True):
        first = text.response.start
        sums = [one[u.positions.start - first : u.positions.stop - first].sum() for u in some]
        values.append(np.array(sums, dtype=float))
    rows = path.forward_rows + len(tokens)
    if tolerance is None:
        return Shares(values, path.start, reward, rows, path.backward_rows)
    return Shares(values, path.start, reward, rows, path.backward_rows, path.steps, path.gaps, path.token_gaps)


def _checks(rm: RewardModel, method: str, shares: Shares, baseline: str, tolerance: float | None) -> list[Check]:
    if tolerance is not None:  # integrated
        note = f"baseline {baseline}, at most {shares.steps.max()} steps"
        if not shares.gaps.max() <= tolerance:
            raise CheckFailed(
                "The integrated gradients do not add up to the reward less that of the baseline",
                found=f"a gap of {shares.gaps.max():.3g} ({note})",
                expected=f"at most {tolerance:g} of the larger of the difference and the sum of sizes",
                do="load the model in float32 if it is in 16 bits, or take another baseline; if it routes "
                "tokens to experts, its reward jumps along the line and no number of steps is enough: use "
                "method='truncate' or 'leave_one_out'",
            )
        halved = "the largest change of a token's value by leaving out half the nodes, over the largest value: a fact"
        return [
            Check("completeness", shares.gaps.max(), tolerance, note),
            Check("single tokens", shares.token_gaps.max(), np.inf, halved),
        ]
    gaps = []
    for values, start, reward in zip(shares.values, shares.start, shares.reward, strict=True):
        size = max(abs(start), abs(reward), float(np.abs(values).sum()))
        gaps.append(abs(values.sum() - (reward - start)) / size if size else 0.0)
    if method in ("prefix", "truncate"):
        return [Check("telescoping", max(gaps), 2e-2 if rm.sixteen_bit else 1e-5)]
    known = [gap for gap in gaps if np.isfinite(gap)]
    note = "a fact: no sum is claimed"
    return [Check("distance from adding up", max(known), np.inf, note)] if known else []


def _table(
    tokens: list[Tokens], units: list[list[Unit]], shares: Shares, by: str
) -> tuple[np.ndarray, dict[str, object]]:
    """Values [pair, side, position] and the coordinates of their units; the margin's are the pair's common
    units."""
    n_pairs, longest = len(tokens) // 2, max(1, max(len(some) for some in units))
    shape = (n_pairs, 3, longest)
    values = np.full(shape, np.nan)
    first, count, ids = (np.full(shape, fill) for fill in (-1, 0, -1))
    pieces, roles = np.full(shape, "", dtype=object), np.full(shape, "", dtype=object)
    lengths = np.zeros(shape[:2], dtype=int)
    for i in range(n_pairs):
        a, b = 2 * i, 2 * i + 1
        shared = common_units(units[a], units[b], common_prefix(tokens[a], tokens[b]))
        margin = shares.values[a][:shared] - shares.values[b][:shared]
        sides = ((a, shares.values[a]), (b, shares.values[b]), (a, margin))
        for side, (run, own) in enumerate(sides):
            n = lengths[i, side] = len(own)
            values[i, side, :n] = own
            for j, unit in enumerate(units[run][:n]):
                first[i, side, j], count[i, side, j] = unit.positions.start, len(unit.positions)
                pieces[i, side, j], roles[i, side, j] = unit.text, unit.role
                ids[i, side, j] = tokens[run].ids[unit.positions.start]
    where = ("pair", "side", "position")
    coords: dict[str, object] = {
        "position": np.arange(longest),
        "n_positions": (("pair", "side"), lengths),
        "piece": (where, pieces),
        "role": (where, roles),
        "token_position": (where, first),
        "n_tokens": (where, count),
        "start": (("pair", "side"), _sides(shares.start)),
        "reward": (("pair", "side"), _sides(shares.reward)),
    }
    return values, coords | ({"token": (where, ids)} if by == "token" else {})


def _sides(values: np.ndarray) -> np.ndarray:
    chosen, rejected = values[::2], values[1::2]
    return np.stack([chosen, rejected, chosen - rejected], 1)


def _require(steps: int, **given: str) -> None:
    for name, value in given.items():
        choices = get_args(CHOICES[name])
        if value not in choices:
            raise DataError(
                f"Token attribution has no {name} of this name", found=repr(value),
                expected=", ".join(repr(choice) for choice in choices), do="pass one of these",
            )  # fmt: skip
    if steps < 1:
        raise DataError("Integrated gradients need nodes on their line", found=f"steps={steps}",
                        expected="at least 1", do="leave steps= out, or pass 32")  # fmt: skip


def _words(method: str, by: str, baseline: str, removal: str) -> dict[str, Any]:
    line = f"when each {by} comes in from the baseline ({baseline}) in the residual entering block 0"
    gone = {"delete": "deleted", "mask": "hidden from attention"}[removal]
    shows, cannot = {
        "prefix": (
            f"How the head's reading changes over each {by} of one pass; the values add up to the "
            "reward less the reading before the response.",
            "What the reward is after each prefix: the head was trained at the last position only, so the "
            "readings before it are off its distribution.",
        ),
        "truncate": (
            f"How the reward changes when the response is cut one {by} later; the values add up to the "
            "reward less that of the empty response.",
            "What a word is worth beside what follows it: each step scores an unfinished response, which the "
            "model may mark down for being unfinished.",
        ),
        "gradient": (
            f"How the reward changes, to first order at the text, {line}.",
            "The effect of a change as large as a word: the reward is curved between the baseline and the "
            "text, and the values do not add up.",
        ),
        "integrated": (
            f"How the reward changes {line}, averaged over the way; the values add up to the difference.",
            "A difference between texts that exist: the points between are no words, and another baseline "
            "gives other values.",
        ),
        "leave_one_out": (
            f"How much reward the response loses when one {by} is {gone}.",
            "What words earn together: two that say the same each look worthless alone. The values do not "
            "add up, and a gap in a text may itself be marked down.",
        ),
    }[method]
    return {"title": f"Token attribution ({method.replace('_', ' ')}, by {by})", "shows": shows, "cannot_show": cannot}
