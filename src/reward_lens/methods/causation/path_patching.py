"""Path patching: what one component tells another, and what of that reaches the reward.

    sender s     its write c_s in the source run less that in the changed run, dc_s
    receiver v   gives v(x + dc_s) instead of v(x), x being its input in the changed run and everything else frozen
    effect       the changed run with the receiver's output replaced by that, all that follows recomputed
                 noise: r(chosen) - r(patched);  denoise: r(patched) - r(rejected)

The receiver "reward" is the reward head itself: the sender's direct effect with the norm live. Receivers "L5.attn" and
"L5.mlp" are whole writes; "L5.Q3", "L5.K1", "L5.V1" a head's query, key or value alone, so that "who moves where this
head looks" and "what it carries" are two questions.

What this cannot show: paths through several receivers at once; effects of paths do not add up to a total effect.

Reference: Wang et al. 2022, arXiv 2211.00593; Goldowsky-Dill et al. 2023, arXiv 2304.05969.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from reward_lens import data
from reward_lens.arguments import checked_arguments
from reward_lens.engine.alignment import Alignment
from reward_lens.engine.alignment import align as aligned
from reward_lens.engine.editing import Edit
from reward_lens.engine.intervention import values
from reward_lens.engine.patching import patch_rows
from reward_lens.engine.places import require_behind_gate, require_site
from reward_lens.engine.receivers import received
from reward_lens.engine.runs import TextRun, run_pair
from reward_lens.errors import DataError
from reward_lens.methods.causation.effect_cells import contiguous, sites_of
from reward_lens.methods.observation.splits import HeadSplit
from reward_lens.methods.shared.paired import paired_result
from reward_lens.model.forward import record, suffix_batch
from reward_lens.model.prefix import PrefixCache
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.result import Check, Result

REWARD = "reward"
SENDERS, RECEIVERS = ("embed", "attn", "mlp", "head"), ("attn", "mlp", "q", "k", "v")
LATER = "the sender does not come before the receiver"


@checked_arguments
@torch.no_grad()
def path_effects(
    rm: RewardModel,
    pairs,
    senders: "str | Sequence[Site | str]",
    receivers: "str | Sequence[Site | str]",
    mode: Literal["noise", "denoise"] = "noise",
    at: Literal["final", "response", "all"] = "final",
    align: Literal["tail", "diff"] | None = None,
    seed: int = 0,
) -> Result:
    """Effect on the reward of what each sender writes, along the one edge to each receiver.

    Parameters
    ----------
    senders: "components", "heads", or a list of writes and heads.
    receivers: one or a list of "reward", attention and MLP writes, and single queries, keys and values.
    mode, at, align: as in `effects`.

    Returns value (pair, sender, receiver) in reward units, NaN where the sender does not come before the receiver; mean
    and interval over prompts. Check "clean row" as in `effects`. Raises `DataError` for sites that do not write or
    receive, and what `effects` raises.
    """
    pairs = data.as_pairs(pairs)
    sent = sites_of(rm, senders)
    names = [str(r) for r in ([receivers] if isinstance(receivers, str | Site) else receivers)]
    read = [Site.parse(r) for r in names if r != REWARD]
    for site in [*sent, *read]:
        require_site(rm, site)
    wrong = [str(s) for s in sent if s.kind not in SENDERS or (s.kind == "head" and s.index is None)]
    wrong += [str(s) for s in read if s.kind not in RECEIVERS or (s.kind in "qkv" and s.index is None)]
    wrong += [f"{name} twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    if wrong or not names or mode not in ("noise", "denoise") or align not in (None, "tail", "diff"):
        raise DataError(
            "A path needs a write at one end and something that reads the residual stream at the other",
            found=", ".join([f"mode={mode!r}", f"align={align!r}", *(wrong[:4] if names else ["no receivers"])]),
            expected="mode 'noise' or 'denoise'; align None, 'tail' or 'diff'; senders embed, attn, mlp and single "
            "heads; receivers 'reward', attn, mlp, and a single head's q, k or v, each once",
            do="name such sites, for example senders='components', receivers=['reward', 'L5.Q3']",
        )
    split = HeadSplit(rm) if any(s.kind == "head" for s in sent) else None
    found, gaps = [], []
    for pair, tokens in zip(pairs, rm.tokenize_pairs(pairs), strict=True):
        # In post-norm blocks a write reaches its readers behind the norms of the writes in between: these are held too.
        held = list(dict.fromkeys([*sent, *sites_of(rm, "components")])) if rm.trunk.norms else sent
        runs = run_pair(rm, tokens[0], tokens[1], held, only_final=at == "final")
        base, source = runs if mode == "noise" else runs[::-1]
        where = aligned(base.tokens, source.tokens, at, align, str(pair.id))
        effects, gap = _of_pair(rm, split, sent, names, base, source, where)
        found.append(effects if mode == "noise" else -effects)
        gaps.append(gap)
    coords = {"sender": np.array([str(s) for s in sent], dtype=object), "receiver": np.array(names, dtype=object)}
    values_ = np.stack(found)
    return paired_result(
        rm, "path_effects", pairs, values_, ("pair", "sender", "receiver"), coords, seed=seed,
        checks=[Check("clean row", max(gaps), 2e-2 if rm.sixteen_bit else 1e-4)],
        undefined=LATER if np.isnan(values_).any() else None, title=f"Path effects ({mode}, {at})",
        settings={"mode": mode, "at": at, "align": align}, noise_floor=rm.noise_floor,
        shows="What one component's write does to the reward along the single edge to one receiver, the rest frozen up "
        "to there.",
        cannot_show="Paths through several receivers together: edge effects do not add up to a total effect.",
    )  # fmt: skip


def _of_pair(
    rm: RewardModel, split: HeadSplit | None, senders, receivers: list[str], base: TextRun, source: TextRun,
    where: Alignment,
) -> tuple[np.ndarray, float]:  # fmt: skip
    """Loss of reward [sender, receiver] of the base run, and the clean row's gap."""
    heard = [[r == REWARD or _before(rm, s, Site.parse(r)) for r in receivers] for s in senders]
    out = np.where(heard, 0.0, np.nan)
    if not where.base:
        return out, 0.0
    positions = contiguous(where.base)
    moves = [_write_moved(rm, split, s, base, source, where) for s in senders]
    start = where.base[0] if rm.reuses_prefix(base.tokens) else 0
    past = PrefixCache(base.keys.first(start), rm.n_layers) if start else None
    stop = base.tokens.seen.stop
    recording = record(rm.trunk, suffix_batch(base.tokens, start, rm.device, stop), past=past)
    gate = rm.readout_inputs([base.tokens])
    clean = float(rm.readout.reward(recording.last[:, base.tokens.reward_pos - start].to(rm.like), gate)[0])
    gap = abs(clean - base.reward) / rm.effect_scale(base.reward, source.reward, base.reward - source.reward)
    rows, cells = [], []
    for r, name in enumerate(receivers):
        if name == REWARD:
            require_behind_gate(rm, base.tokens, where.base)
            h = recording.last[:, base.tokens.reward_pos - start].to(rm.like)
            read = [i for i, p in enumerate(where.base) if p == base.tokens.reward_pos]
            arrived = _arrived(rm, senders, moves, base, where, 2 * rm.n_layers)
            at_end = torch.stack([move[read].sum(0) for move in arrived])
            both = rm.readout.reward(torch.cat([h, h + at_end]), gate).double()
            out[:, r] = (both[0] - both[1:]).cpu().numpy()
            continue
        site = Site.parse(name)
        earlier = [s for s, one in enumerate(heard) if one[r]]
        if not earlier:
            continue
        before = 2 * site.block + (site.kind == "mlp")  # writes that the receiver's input holds
        arrived = _arrived(rm, [senders[s] for s in earlier], [moves[s] for s in earlier], base, where, before)
        given = received(rm, recording, start, site.block, [site.kind], [(positions, move) for move in arrived])
        # Attention passes a moved position on to all that see it; what reads one position alone moves there.
        first = 0 if base.tokens.reads_first else where.base[0]
        reach = range(first, stop) if site.kind == "attn" else positions
        at = [p - start for p in reach]
        for row, s in enumerate(earlier):
            new = given[site.kind][row, at]
            rows.append((Edit(site, reach, values(new if site.index is None else new[:, site.index])),))
            cells.append((s, r))
    if rows:
        swept = patch_rows(rm, base.tokens, rows, known=base.keys)
        out[tuple(np.array(cells).T)] = -swept.change.numpy()
    return out, gap


def _write_moved(rm, split: HeadSplit | None, site: Site, base: TextRun, source: TextRun, where: Alignment) -> Tensor:
    """[pos, d_model] what the sender's write gains at the aligned positions; a head's through the live post-norm."""
    if site.kind != "head":
        return source.at(site, where.source) - base.at(site, where.base)
    assert split is not None
    whole = Site("head", site.layer)
    own = base.at(whole, where.base)
    changed = own.clone()
    changed[:, site.index] = source.at(site, where.source)
    before, after = (split.write(z.flatten(1), site.block) for z in (own, changed))
    return after - before


def _arrived(
    rm: RewardModel, senders: Sequence[Site], moves: Sequence[Tensor], base: TextRun, where: Alignment, before: int
) -> list[Tensor]:
    """By how much each sender's move, [pos, d_model], moves the stream behind the first `before` writes: the move
    itself where writes are added, else what the norms in between, live, make of it with the other writes held."""
    if not rm.trunk.norms:
        return list(moves)
    order = sites_of(rm, "components")
    own = [base.at(site, where.base) for site in order[: before + 1]]
    clean, out = rm.trunk.carrier.final(own[0], own[1:]), []
    for sender, move in zip(senders, moves, strict=True):
        changed = list(own)
        at = order.index(Site("attn", sender.layer) if sender.kind == "head" else sender)
        changed[at] = own[at] + move
        out.append(rm.trunk.carrier.final(changed[0], changed[1:]) - clean)
    return out


def _before(rm: RewardModel, sender: Site, receiver: Site) -> bool:
    """Whether the receiver reads the sender's write."""
    if sender.kind == "embed":
        return True
    same = sender.block == receiver.block and sender.kind in ("attn", "head") and receiver.kind == "mlp"
    return sender.block < receiver.block or (same and not rm.structure.parallel)
