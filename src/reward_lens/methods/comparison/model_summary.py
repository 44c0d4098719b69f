"""What a comparison keeps of one model, so that the next one can be loaded after it is gone.

Rewards, lens margins, what each block writes or causes, states at the reward position and shifts under edits: arrays on
the CPU whose size does not depend on the model's, but for its width. One pass serves lens, contributions and states.

    state of a prompt        mean over its different responses of the residual at the reward position
    difference of a prompt   mean over its pairs of the chosen response's residual minus the rejected one's
    scaled state of a text   s(h) h, what the head's row reads after the final norm's scale, as a deviation from the
                             mean over the prompt's different responses
"""

import dataclasses
import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reward_lens import data
from reward_lens.edits import edits_of
from reward_lens.engine.activations import captured, component_sites
from reward_lens.errors import DataError
from reward_lens.methods.behaviour.edited_texts import ScaledShifts, scaled_shifts, scored_edits, within_prompt_sd
from reward_lens.methods.causation.effects import effects
from reward_lens.methods.observation.contributions import contributions
from reward_lens.methods.observation.lens import reward_lens
from reward_lens.model.loading import load
from reward_lens.model.readout import LinearReadout
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.result import Check

PROFILES = ("lens", "contributions", "states", "effects")
KINDS = ("attn", "mlp")
DEPTHS = np.linspace(0, 1, 11)
T = TypeVar("T")
Source = RewardModel | str | Path | Callable[[], RewardModel]


@dataclasses.dataclass
class States:
    """States of one model at `DEPTHS` (the nearest depth there is), and what its head reads at the last."""

    prompts: np.ndarray
    """[depth, prompt, d_model], in the prompts' order of appearance"""
    differences: np.ndarray
    """[depth, prompt, d_model]"""
    scaled: np.ndarray
    """[text, d_model], deviations from the prompt's mean"""
    row: np.ndarray | None
    """[d_model]: a text's reward is scaled . row, but for a constant; None where no one row reads every text"""


@dataclasses.dataclass
class Summary:
    """What is kept of one model; None for what was not asked for."""

    name: str
    about: dict[str, Any]
    rewards: np.ndarray
    """[pair, response]"""
    noise_floor: float
    checks: list[Check]
    lens: np.ndarray | None = None
    """[pair, depth], margins"""
    contributions: np.ndarray | None = None
    """[pair, kind, layer], of margins"""
    effects: np.ndarray | None = None
    """[pair, kind, layer], of margins, the mean of noise and denoise"""
    states: States | None = None
    shifts: ScaledShifts | None = None

    @property
    def margins(self) -> np.ndarray:
        return self.rewards[:, 0] - self.rewards[:, 1]


class Texts:
    """The different responses of each prompt among some pairs."""

    def __init__(self, pairs: data.Pairs):
        keys = [(p.prompt_key, response) for p in pairs for response in p.responses]
        self.first = _firsts(keys)
        """Runs (chosen and rejected in turn) that are the first of their text."""
        self.prompts = [keys[i][0] for i in self.first]
        """Of each different text its prompt."""
        order = {key: i for i, key in enumerate(dict.fromkeys(p.prompt_key for p in pairs))}
        self.codes = [order[p.prompt_key] for p in pairs]
        """Of each pair the number of its prompt."""
        self.of_text = np.array([order[key] for key in self.prompts])
        """Of each different text the number of its prompt."""
        self.n_prompts = len(order)


def summaries(models: Mapping[str, Source], pairs: data.Pairs, profiles: Sequence[str], probes) -> list[Summary]:
    """Summaries of the models in order. What is loaded here is gone before the next one is."""
    return each_model(models, lambda name, rm: _summary(name, rm, pairs, profiles, probes))


def each_model(models: Mapping[str, Source], read: Callable[[str, RewardModel], T]) -> list[T]:
    """What is read of every model, in order. What is loaded here is gone before the next one is."""
    out = []
    for name, source in models.items():
        out.append(read(name, _loaded(name, source)))
        if not isinstance(source, RewardModel):
            gc.collect()  # modules hold themselves in circles
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return out


def named_models(models) -> dict[str, Source]:
    """Name to source, at least two; a sequence is named by its models and paths."""
    alone = isinstance(models, str | Path | RewardModel) or not isinstance(models, Iterable)
    found = f"one {type(models).__name__}" if alone else None
    given: Any = () if alone else models
    entries = list(given.items()) if isinstance(given, Mapping) else [(_name(m), m) for m in given]
    names = [str(name) for name, _ in entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    strange = [type(m).__name__ for _, m in entries if not isinstance(m, RewardModel | str | Path) and not callable(m)]
    found = found or (
        f"{len(entries)} model(s)" if len(entries) < 2
        else f"the name {twice[0]!r} more than once" if twice
        else "a model without a name" if not all(names)
        else f"a {strange[0]}" if strange
        else None
    )  # fmt: skip
    if found:
        raise DataError(
            "These models cannot be compared",
            found=found,
            expected="two or more under different names, each a RewardModel, a path or hub id, or a function without "
            "arguments that loads one",
            do="pass {'first': ..., 'second': ...}",
        )
    return dict(zip(names, (source for _, source in entries), strict=True))


def _name(source: Any) -> str:
    return source.name if isinstance(source, RewardModel) else str(source) if isinstance(source, str | Path) else ""


def _loaded(name: str, source: Source) -> RewardModel:
    if isinstance(source, RewardModel):
        return source
    rm = load(source) if isinstance(source, str | Path) else source()
    if not isinstance(rm, RewardModel):
        raise DataError(f"The function for {name!r} loaded no reward model", found=f"a {type(rm).__name__}",
                        expected="a RewardModel", do="return rl.load(path), or rl.RewardModel of a module")  # fmt: skip
    return rm


@torch.no_grad()
def _summary(name: str, rm: RewardModel, pairs: data.Pairs, profiles: Sequence[str], probes) -> Summary:
    scores = rm.score_pairs(pairs)
    rewards = scores.value.values[:, :2]
    texts = [list(p.responses) for p in pairs]
    sd = within_prompt_sd(rewards, [p.prompt_key for p in pairs], texts)
    about = rm.describe("summary") | {
        "n_layers": rm.n_layers, "d_model": rm.d_model, "noise_floor": rm.noise_floor, "edits": list(rm.edits),
        "within_prompt_sd": sd if np.isfinite(sd) else None,
        "tokens": {side: float(scores.value[f"{side}_tokens"].mean()) for side in ("chosen", "rejected")},
    }  # fmt: skip
    del about["method"]
    out = Summary(name, about, rewards, rm.noise_floor, [])
    if {"lens", "contributions", "states"} & set(profiles):
        _read_inside(rm, pairs, profiles, out)
    if "effects" in profiles:
        modes = [effects(rm, pairs, "components", mode).value for mode in ("noise", "denoise")]
        out.effects = np.mean([_by_block(rm, value) for value in modes], 0)
    if probes is not None:
        edits = edits_of(probes)
        (edited,) = scored_edits([rm], pairs, edits)
        about["probes"] = [edit.name for edit in edits]
        out.shifts = scaled_shifts(edited.shifts(), rewards, [p.prompt_key for p in pairs], texts)
    return out


def _read_inside(rm: RewardModel, pairs: data.Pairs, profiles: Sequence[str], out: Summary) -> None:
    """Lens, contributions and states of one pass, chunk by chunk."""
    depths = [int(np.floor(x * rm.n_layers + 0.5)) for x in DEPTHS]
    kept = _Kept(rm, Texts(pairs), depths) if "states" in profiles else None
    sites = component_sites(rm)
    if not {"lens", "contributions"} & set(profiles):
        sites = [site for site in sites if site in {_residual(d) for d in depths}]
    lens, writes, start = [], [], 0
    for acts in captured(rm, pairs, sites):
        if "lens" in profiles:
            read = reward_lens(rm, acts)
            lens.append(read.value.sel(side="margin").values)
            out.checks += read.checks
        if "contributions" in profiles:
            split = contributions(rm, acts)
            writes.append(_by_block(rm, split.value.sel(side="margin")))
            out.checks += split.checks
        if kept is not None:
            kept.add(acts, start)
        start += len(acts.tokens)
    out.lens = np.concatenate(lens) if lens else None
    out.contributions = np.concatenate(writes) if writes else None
    if kept is not None:
        out.states = kept.states()
        if kept.row is not None:
            out.checks.append(Check("read-out", kept.gap(out.rewards), 1e-2 if rm.sixteen_bit else 1e-4))


class _Kept:
    """States summed by prompt as chunks of runs come."""

    def __init__(self, rm: RewardModel, texts: Texts, depths: Sequence[int]):
        self.rm, self.texts, self.depths = rm, texts, depths
        self.linear = rm.readout if isinstance(rm.readout, LinearReadout) else None
        shape = (len(depths), texts.n_prompts, rm.d_model)
        self.sums, self.differences = torch.zeros(shape), torch.zeros(shape)
        self.is_first = set(texts.first)
        self.scaled: list[Tensor] = []
        self.row: Tensor | None = None
        if self.linear is not None:
            ones = torch.ones_like(self.linear.weight[:1])
            self.row = self.linear.norm.pull_back(self.linear.weight, ones).cpu().double()

    def add(self, acts, start: int) -> None:
        runs = range(start, start + len(acts.tokens))
        new = [i for i, run in enumerate(runs) if run in self.is_first]
        of_run = torch.tensor([self.texts.codes[run // 2] for run in runs])
        for k, depth in enumerate(self.depths):
            h = acts[_residual(depth)].float().cpu()
            self.sums[k].index_add_(0, of_run[new], h[new])
            self.differences[k].index_add_(0, of_run[::2], h[::2] - h[1::2])
        last = acts[_residual(self.rm.n_layers)]
        scaled = (self.rm.readout.norm.scale(last) * last).cpu().double()
        self.scaled.append(scaled[new])

    def states(self) -> States:
        texts = self.texts
        counts = (np.bincount(c, minlength=texts.n_prompts) for c in (texts.of_text, texts.codes))
        n_texts, n_pairs = (c[:, None].astype(np.float32) for c in counts)
        scaled = torch.cat(self.scaled).numpy()
        means = np.zeros((texts.n_prompts, scaled.shape[1]))
        np.add.at(means, texts.of_text, scaled)
        away = (scaled - (means / n_texts)[texts.of_text]).astype(np.float32)
        row = None if self.row is None else self.row.numpy()
        return States(self.sums.numpy() / n_texts, self.differences.numpy() / n_pairs, away, row)

    def gap(self, rewards: Float[np.ndarray, "pair 2"]) -> float:
        """How far scaled . row + constant is from the rewards scored, by the size of the products summed."""
        assert self.linear is not None and self.row is not None
        scaled = torch.cat(self.scaled)
        constant = float((self.linear.weight @ self.linear.norm.shift + self.linear.bias).double())
        size = (scaled * self.row).abs().sum(1) + abs(constant)
        scored = torch.from_numpy(rewards.reshape(-1)[self.texts.first])
        return float(((scaled @ self.row + constant - scored).abs() / size).max())


def _residual(depth: int) -> Site:
    return Site("resid_post", depth - 1) if depth else Site("embed")


def _by_block(rm: RewardModel, value) -> Float[np.ndarray, "pair kind layer"]:
    """Of values (pair, component) those of the blocks' writes."""
    columns = [[f"L{layer}.{kind}" for layer in range(rm.n_layers)] for kind in KINDS]
    return np.stack([value.sel(component=names).transpose("pair", "component").values for names in columns], 1)


def _firsts(keys: Sequence) -> list[int]:
    seen: dict = {}
    for i, key in enumerate(keys):
        seen.setdefault(key, i)
    return list(seen.values())
