"""The load report: what must hold before a reward model's numbers mean anything. `rl.load` refuses if a test fails.

Each row is a measured gap with its tolerance. Scale S of the reward tests: the larger of |r| and the standard
deviation of the reward over the probe texts.
"""

import dataclasses
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from reward_lens.engine import hooks
from reward_lens.errors import LoadError
from reward_lens.model import rounding, usable_rewards
from reward_lens.model.forward import at_rows, make_batch, record, replay, suffix_batch
from reward_lens.model.prefix import pooled_with_prefix
from reward_lens.model.readout import RunsANetwork
from reward_lens.model.tokens import Tokens
from reward_lens.result import Check, Result, load_result

if TYPE_CHECKING:
    from reward_lens.model.reward_model import RewardModel

PROBES = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Name a prime number.", "Seven"),
    ("Is it safe to mix bleach and vinegar?", "No. It releases chlorine gas."),
    ("Write a haiku about rain.", "Soft rain on the roof,"),
    ("How do I boil an egg?", "I don't know."),
    ("2 + 2?", "2 + 2 = 5"),
)
COMPARED = 2  # texts whose rewards are compared; the others only give the reward's spread
PREFIX_REUSE = "prefix reuse"
ATTENTION = "attention"
BOS_PRESENT = "BOS present"
CHECKS_HELP = {
    "head in checkpoint": "load a checkpoint that holds its reward head; a random head scores noise",
    "own reward": "the model does more than trunk, norm and head: pass readout= or structure=",
    "template tokens": "set tokenizer.chat_template to the template the model was trained with, and pass tokenizer=",
    "no doubled BOS": "remove the BOS from the chat template or set tokenizer.add_bos_token=False, whichever the "
    "model's authors trained without",
    BOS_PRESENT: "put {{ bos_token }} in front of tokenizer.chat_template if the model was trained with it, set "
    "tokenizer.add_bos_token=False if without, and pass it: rl.load(path, tokenizer=tokenizer)",
    ATTENTION: "load with attn_implementation='eager'; what is in use leaves out a part of the model's attention",
    "padding": "run without padding (batch_size=1); please report the model's class",
    "batching": "run with batch_size=1; please report the model's class. LLM.int8 looks for outliers in the whole "
    "batch: with llm_int8_threshold=0.0 it does not",
    "writes close": "pass structure= naming the submodules that write to the residual stream",
    "decomposition": "pass structure= naming final_norm, attn and mlp",
    "replay": "the blocks depend on more than their arguments; please report the model's class",
}


def load_report(rm: "RewardModel") -> Result:
    """Run the tests; returns value (check,) = gaps, with tolerances and findings as coordinates, or raises."""
    texts = rm.tokenizer.probes(PROBES)
    tokens = [rm.tokenize(prompt, response) for prompt, response in texts]
    rows: list[tuple[str, float, float, str]] = list(_from_checkpoint(rm))
    rows += _tokenisation(rm, tokens)
    alone = torch.stack([rm.rewards([t])[0] for t in tokens]).double()
    terms = [rm.own_terms(t) for t in tokens[:COMPARED]]
    usable_rewards.require_rewards(rm, alone, terms)
    # A difference of logits is no more exact than the logits are.
    floor = max((max(map(abs, some)) for some in terms if len(some) > 1), default=0.0)
    scale = torch.maximum(alone.abs(), alone.std()).clamp_min(floor)
    rows += _own_reward(rm, tokens, alone[:COMPARED], scale, terms)
    rows.append(_attention(rm, tokens[:COMPARED], alone[:COMPARED], scale[:COMPARED]))
    rows += _padding(rm, tokens, alone, scale)
    rows += _residuals(rm, tokens[0])
    rows.append(_prefix(rm, tokens[0], float(alone[0]), float(scale[0])))
    for name, gap, tolerance, found in rows:
        if not gap <= tolerance:
            raise LoadError(
                f"{rm.name} failed the test '{name}' of its load report",
                found=f"{found} (gap {gap:.3g})",
                expected=f"a gap of at most {tolerance:.3g}",
                do=CHECKS_HELP.get(name.split(":")[0], "please report the model's class"),
            )
    value = xr.DataArray(
        np.array([r[1] for r in rows]),
        dims="check",
        coords={
            "check": np.array([r[0] for r in rows], dtype=object),
            "tolerance": ("check", np.array([r[2] for r in rows])),
            "found": ("check", np.array([r[3] for r in rows], dtype=object)),
        },
    )
    meta = rm.describe(
        "load_report", title="Load report", parameters=sum(p.numel() for p in rm.module.parameters()),
        architecture=type(rm.module).__name__, layers=rm.n_layers, heads=rm.n_heads,
        structure=dataclasses.asdict(rm.structure), probe_reward=float(alone[1]),
        shows="Whether the numbers below are the model's own: its head, its tokens, its padding, and that its parts "
        "add up to its reward.",
        cannot_show="Whether the chat template is the one the model was trained with: that stands on the model's card.",
    )  # fmt: skip
    checks = [Check(name, gap, tolerance, found) for name, gap, tolerance, found in rows]
    report = Result("load_report", value, unit="gap", checks=checks, meta=meta)
    path = rm.loading.get("kept_report")
    if path is not None and os.access(path.parent, os.W_OK):
        report.save(path)
    return report


def kept_report(rm: "RewardModel") -> Result | None:
    """The report that an earlier load of exactly these weights kept, if the loader named one and nothing it depends on
    (revision, precision, device, versions) has changed. Only loaders that know the weights by their hash name one."""
    path = rm.loading.get("kept_report")
    if path is None or not path.exists():
        return None
    report = load_result(path)
    now = rm.surroundings()
    # Written by a version that measured all that is measured now.
    whole = {PREFIX_REUSE, ATTENTION, BOS_PRESENT} <= set(report.value["check"].values)
    return report if whole and all(report.meta.get(key) == value for key, value in now.items()) else None


def confirmed(rm: "RewardModel", kept: Result | None) -> Result | None:
    """The kept report, if the model still gives the reward that was written into it; None otherwise."""
    if kept is None:
        return None
    reward = float(rm.rewards([rm.tokenize(*PROBES[1])])[0])
    expected = float(kept.meta["probe_reward"])
    near = abs(reward - expected) <= reward_tolerance(rm, expected, max(abs(expected), 1e-2))
    return kept if near else None


def reward_tolerance(rm: "RewardModel", reward: float, scale: float) -> float:
    """E1 in reward units: 1e-5 S in float32; the larger of 2 steps of the format and 2e-2 S in 16 bits, and of
    bfloat16's steps on quantised weights."""
    if not rm.sixteen_bit:
        return 1e-5 * scale
    bits = 10 if rm.dtype == torch.float16 and not rm.quantised else 7
    step = 2.0 ** (math.floor(math.log2(max(abs(reward), 1e-6))) - bits)
    return max(2 * step, 2e-2 * scale)


def _from_checkpoint(rm):
    if "missing_keys" in rm.loading:
        missing = rm.loading["missing_keys"]
        yield "head in checkpoint", float(len(missing)), 0.0, f"missing keys: {', '.join(missing) or 'none'}"
    else:
        yield "head in checkpoint", 0.0, math.inf, "not tested: the module was built by the caller"
    if rm.vocabulary:
        logits = rm.vocabulary.logits
        read = "what is read is z" if logits.cap is not None else "measured on a ramp in place of z"
        yield "logits", logits.gap, logits.tolerance, f"logit = {logits.words()}, z the unembedding's output; {read}"
    weights = [m.weight for m in rm.head.modules() if isinstance(getattr(m, "weight", None), Tensor)]
    quantised = sum(not w.is_floating_point() for w in weights)
    yield "head not quantised", float(quantised), 0.0, f"{type(rm.head).__name__} in {weights[0].dtype}"


def _tokenisation(rm, tokens: list[Tokens]):
    hf = rm.tokenizer.hf
    prompt, response = rm.tokenizer.probes(PROBES)[0]
    official = rm.tokenizer.official_ids([{"role": "user", "content": prompt}], response)
    differing = sum(a != b for a, b in zip(official, tokens[0].ids, strict=False)) + abs(len(official) - len(tokens[0]))
    found = f"{len(official)} tokens of Hugging Face's own rendering"
    if "template" in rm.loading:
        found += f"; {rm.loading['template']}"
    yield "template tokens", float(differing), 0.0, found
    bos = hf.bos_token_id
    doubled = bos is not None and len(tokens[0]) > 1 and tokens[0].ids[0] == tokens[0].ids[1] == bos
    opening = hf.decode(list(tokens[0].ids[:3]))
    yield "no doubled BOS", float(doubled), 0.0, f"the text begins {opening!r}"
    begins = bos is not None and list(hf("a", verbose=False)["input_ids"])[:1] == [bos]
    found = f"the text begins {opening!r}, a text by the tokenizer's own rule {hf.bos_token if begins else 'without'!r}"
    yield BOS_PRESENT, float(begins and tokens[0].ids[0] != bos), 0.0, found
    at = tokens[0].reward_pos
    around = "".join(tokens[0].pieces[max(0, at - 3) : at]), tokens[0].pieces[at], "".join(tokens[0].pieces[at + 1 :])
    pad = "pad == eos" if hf.pad_token_id is not None and hf.pad_token_id == hf.eos_token_id else "pad is its own token"
    found = f"reads {around[1]!r} after {around[0]!r}, before {around[2]!r}; {pad}, masks come from lengths"
    if rm.structure.reads_first:
        found += "; measured: no other token's final state moves the scores"
    yield "reward position", 0.0, math.inf, found


def _own_reward(rm, tokens: list[Tokens], alone: Tensor, scale: Tensor, terms: list[list[float]]):
    """In 16 bits a head of several maps rounds between them, by more than a step of its reward where they cancel. Where
    a gap is over the tolerance, three times what such rounding moves is allowed, if that is more: this library's head
    against itself in the model's precision, so a head that is not the model's own is still refused."""
    own = torch.tensor([sum(some) for some in terms], dtype=torch.float64)
    gap = (alone - own).abs()
    limits = [reward_tolerance(rm, max(map(abs, some)), float(s)) for some, s in zip(terms, scale, strict=False)]
    allowed = torch.tensor(limits, dtype=torch.float64)
    if rm.sixteen_bit and isinstance(rm.readout, RunsANetwork) and bool((gap > allowed).any()):
        allowed = allowed.clamp_min(3 * rounding.of_head(rm, tokens))
    worst = int(torch.argmax(gap / allowed))
    found = f"{alone[worst]:.6g} here, {own[worst]:.6g} from the model"
    yield "own reward", float(gap[worst]), float(allowed[worst]), found


def _attention(rm, tokens: list[Tokens], alone: Tensor, scale: Tensor):
    """Fused attention is handed the model's soft cap, sinks and biases, and one that does not know them may drop them
    without a word. What is written out in the model's own file ("eager") has them; in 16 bits it rounds otherwise too,
    so that the kernels' rounding is allowed there, as it is for padding."""
    own = getattr(rm.config, "_attn_implementation", None)
    with eager_attention(rm.module) as changed:
        if not changed:
            return ATTENTION, 0.0, math.inf, f"{own}: nothing to hold it against"
        gap = (torch.cat([rm.rewards([t]) for t in tokens]).double() - alone).abs()
    if not rm.sixteen_bit:
        worst = int(torch.argmax(gap / scale))
        measured, allowed = float(gap[worst]), float(1e-4 * scale[worst])
    else:
        measured = float(gap.square().mean().sqrt())
        allowed = 2 * reward_tolerance(rm, float(alone.abs().max()), float(scale.square().mean().sqrt()))
        if measured > allowed:
            allowed = max(allowed, rounding.of_kernels(rm, tokens, alone))
    return ATTENTION, measured, allowed, f"{own} against eager on {len(tokens)} texts"


@contextmanager
def eager_attention(module: Any) -> Iterator[bool]:
    """Inside, attention is what the model's own file writes out; False where it was already, or cannot be set."""
    config: Any = getattr(module, "config", None)
    own = getattr(config, "_attn_implementation", None)
    settable = getattr(module, "_can_set_attn_implementation", lambda: True)  # asking in vain is logged
    if own in (None, "eager") or not hasattr(module, "set_attn_implementation") or not settable():
        yield False
        return
    parts = {name: getattr(getattr(config, name, None), "_attn_implementation", None) for name in config.sub_configs}
    before = {"": own, **{name: one for name, one in parts.items() if one is not None}}
    try:
        module.set_attn_implementation(dict.fromkeys(before, "eager"))
        yield config._attn_implementation == "eager"
    finally:
        module.set_attn_implementation(before)


def _padding(rm, tokens: list[Tokens], alone: Tensor, scale: Tensor):
    """In 16 bits padding changes the order of sums, so one text may move by several roundings: the root mean square
    over the probe texts is held against the tolerance, which a wrong mask or position exceeds on every text. Where it
    is over, the kernels' own rounding is allowed, if that is more (`rounding.of_kernels`)."""
    # Texts on either side of a change of rotary factors are never batched together, here no more than elsewhere.
    same = [i for i, t in enumerate(tokens) if rm.has_long_factors(t) == rm.has_long_factors(tokens[0])]
    tokens, alone, scale = [tokens[i] for i in same], alone[same], scale[same]
    for name, padding, text in (("batching", "right", "right-padded"), ("padding", "left", "left-padded")):
        batch = make_batch(tokens, range(len(tokens)), rm.pad_id, rm.device, padding)
        inputs = rm.readout_inputs(tokens)
        gap = (rm.readout.reward(rm.trunk.pooled(batch), inputs).double().cpu() - alone).abs()
        if rm.sixteen_bit:
            measured = float(gap.square().mean().sqrt())
            allowed = reward_tolerance(rm, float(alone.abs().max()), float(scale.square().mean().sqrt()))
            if measured > allowed:
                allowed = max(allowed, rounding.of_kernels(rm, tokens, alone))
        else:
            worst = int(torch.argmax(gap / scale))
            measured, allowed = float(gap[worst]), float(1e-4 * scale[worst])
        yield name, measured, allowed, f"{text} in a batch of {len(tokens)} against alone"


def _residuals(rm, tokens: Tokens):
    worst = max(rm.structure.gaps)
    attn, mlp = (" or ".join(rm.structure.paths(part)) for part in ("attn", "mlp"))
    found = f"({attn}, {mlp}) in each of {rm.n_layers} blocks"
    yield "writes close", worst, 0.02, found
    batch = make_batch([tokens], [0], rm.pad_id, rm.device)
    writes: list[Tensor] = []
    pick = at_rows(batch.reward_pos)
    wanted = [rm.trunk.read_residual(0, lambda x: writes.append(pick(x).to(rm.like)))]
    for layer in range(rm.n_layers):
        for kind in ("attn", "mlp"):
            wanted.append(rm.trunk.read_write(batch, layer, kind, lambda x: writes.append(pick(x).to(rm.like))))
    with hooks.attached(wanted):
        recording = record(rm.trunk, batch)
    final = pick(recording.last)
    inputs = rm.readout_inputs([tokens])
    reward = rm.readout.reward(final, inputs)
    direction = rm.readout.direction(final, inputs)
    along, shifts = rm.trunk.carrier.pulled(writes[0], writes[1:], direction.u)
    parts = torch.stack([*((u * w).sum(-1) for u, w in zip(along, writes, strict=True)), shifts])
    total = parts.sum(0) + direction.constant
    scale = float((parts.abs().sum(0) + direction.constant.abs())[0])
    found = f"{len(writes)} writes and the bias sum to {float(total[0]):.6g}, the reward is {float(reward[0]):.6g}"
    yield "decomposition", float((total - reward).abs()[0]) / scale, 1e-2 if rm.sixteen_bit else 1e-5, found
    middle = rm.n_layers // 2
    again = rm.readout.reward(pick(replay(rm.trunk, recording, middle, recording.resid(middle))), inputs)
    allowed = reward_tolerance(rm, float(reward[0]), max(abs(float(reward[0])), 1e-3))
    found = f"blocks {middle} to {rm.n_layers - 1} run again from the recorded residual"
    yield "replay", float((again - reward).abs()[0]), allowed, found


def _prefix(rm, tokens: Tokens, reward: float, scale: float):
    """A shortcut is measured, not demanded: where a model's reward changes with it, whole texts are run. Then the
    row's tolerance is infinite, which is what `RewardModel.reuses_prefix` reads."""
    allowed = max(reward_tolerance(rm, reward, scale), 1e-4 * scale)
    gap = 0.0
    if tokens.reads_first:
        return _beginning_alone(rm, tokens)
    try:
        for split in (len(tokens) // 2, tokens.reward_pos):
            if split:
                pooled = pooled_with_prefix(rm.trunk, tokens, split)
                again = float(rm.readout.reward(pooled, rm.readout_inputs([tokens]))[0])
                gap = max(gap, abs(again - reward))
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        return PREFIX_REUSE, 0.0, math.inf, f"no such cache in this class ({type(error).__name__}: {error})"
    if gap > allowed:
        return PREFIX_REUSE, gap, math.inf, f"over {allowed:.1e}: whole texts are run"
    return PREFIX_REUSE, gap, allowed, "keys and values of a common prefix are computed once"


def _beginning_alone(rm, tokens: Tokens):
    """Whether the first positions' states are the same without what follows, where the first position is read."""
    split = len(tokens) // 2
    last = []
    for stop in (split, len(tokens)):
        batch = suffix_batch(tokens, 0, rm.device, stop)
        read = rm.trunk.read_residual(rm.n_layers, lambda x: last.append(x[:, :split].clone()))
        rm.trunk.run(batch, read)
    gap = float((last[0] - last[1]).norm() / last[1].norm())
    found = f"the states of the first {split} tokens differ by this share without the others: whole texts are run"
    return PREFIX_REUSE, gap, math.inf, found
