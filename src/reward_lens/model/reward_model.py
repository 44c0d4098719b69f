"""A reward model with its structure proven, its readout exact and its load report attached."""

import functools
import importlib.metadata
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reward_lens import data
from reward_lens.errors import LoadError, StructureError, named
from reward_lens.model import checks, scored, usable_module, usable_rewards
from reward_lens.model import structure as structures
from reward_lens.model.forward import Batch, OnTrunk, batches, padding_id, rotary_threshold, trunk_of
from reward_lens.model.heads.own import OwnHead, head_of, published_path
from reward_lens.model.linear_maps import linear_weight
from reward_lens.model.own_output import own_output
from reward_lens.model.own_readout import own_readout
from reward_lens.model.pair_tokens import FirstTokenTokenizer, set_inputs
from reward_lens.model.prefix import keys_and_values
from reward_lens.model.readout import LOCAL, PromptGated, Rows, chosen_rows, objective_names
from reward_lens.model.scored import Progress
from reward_lens.model.structure import Structure
from reward_lens.model.tokens import Tokenizer, Tokens
from reward_lens.model.vocab_readout import refuse_change, vocabulary_of
from reward_lens.result import Result


class RewardModel(OnTrunk):
    """Wrap a Hugging Face sequence classifier with one scalar head (or one named row of several).

    Parameters
    ----------
    module: the model, as `AutoModelForSequenceClassification` returns it; put in eval mode, otherwise untouched.
    tokenizer: its fast tokenizer, with the chat template the model was trained with.
    objective: name or index of the head's row, for heads with several; "A - B" reads one row less another, the log-odds
        of two labels of a classifier. The mean of all is never called a reward.
    structure: paths of an unusual network's parts; put to the same proof as what the search finds.
    readout: a `Readout` for a reward that is not a linear head; a `VocabReadout` for one in a language model's logits.
    truncation: what to do with a conversation longer than the model reads: None raises, "left" cuts the prompt's
        beginning, "right" the response's end.
    edits: records of what was done to the head (`edit_head` and `erase_concept` write them).

    Building one runs the load report's tests and raises `LoadError` if one fails. Source of the exactness
    contract: the reward is a linear read-out of the final residual stream, r = w . N(h) + b.
    """

    def __init__(
        self,
        module: Any,
        tokenizer: Any,
        *,
        objective: str | int | None = None,
        structure: Structure | None = None,
        readout: Any = None,
        truncation: str | None = None,
        name: str | None = None,
        revision: str | None = None,
        loading: Mapping[str, Any] | None = None,
        edits: Iterable[Mapping[str, Any]] = (),
    ):
        if readout is not None and objective is not None:
            raise LoadError("It was said twice what the reward is", found=f"readout= and objective={objective!r}",
                            expected="one of the two", do="leave one out; a readout= names its own rows")  # fmt: skip
        self.module = usable_module.require_model(module).eval()
        self.config: Any = module.config
        self.name = name or getattr(self.config, "name_or_path", "") or type(module).__name__
        self.revision = revision
        self.truncation = truncation
        self.loading = dict(loading or {})
        self.edits: tuple[dict[str, Any], ...] = tuple(dict(edit) for edit in edits)
        usable_module.require_usable_weights(module, self.name)
        text_config = self.config.get_text_config()
        pad_id = padding_id(self.config)
        limit = getattr(text_config, "max_position_embeddings", None)
        self.vocabulary = vocabulary_of(readout, module, tokenizer)
        # A network that reads a text's steps (model.step_readout) brings its own way of writing texts.
        written = self.vocabulary.tokenizer if self.vocabulary else None
        self._rotary_threshold = rotary_threshold(text_config)
        own = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
        self.pad_id = next((i for i in (pad_id, *own) if i is not None), 0)

        run = self.vocabulary.probe if self.vocabulary else functools.partial(usable_module.run_probe, of_text=True)
        probe = functools.partial(run, module, self.device)
        kept = checks.kept_report(self)
        with torch.no_grad():
            if kept is None:  # nothing could be found in such a network: no sum of NaN closes
                usable_rewards.require_finite(self.name, self.dtype, ~probe().isnan().flatten(1).any(1))
            if kept is not None:
                found = self.structure = Structure.of(kept.meta["structure"])
            else:
                found = structure or structures.find_structure(
                    module, probe, text_config.num_hidden_layers, text_config.num_attention_heads,
                    published_path(module),
                )  # fmt: skip
                self.structure = structures.prove(module, found, probe)
            own_texts = getattr(module, "tokenizer_for", FirstTokenTokenizer if found.reads_first else Tokenizer)
            self.tokenizer: Tokenizer = written(tokenizer, limit) if written else own_texts(tokenizer, pad_id, limit)
            self.tokenizer.n_embedded = module.get_input_embeddings().weight.shape[0]
            self.head = head_of(module, found)
            self.trunk = trunk_of(module, found)
            set_inputs(self.trunk, self.tokenizer, self.config)
            own = self.vocabulary.readout(self.trunk.final_norm) if self.vocabulary else None
            self._given = self.vocabulary.spec if self.vocabulary else readout
            self.readout = own or readout or own_readout(self, objective)
            self.load_report: Result = checks.confirmed(self, kept) or checks.load_report(self)

    @property
    def n_heads(self) -> int:
        """Attention heads of a block."""
        return self.structure.n_heads

    @functools.cached_property
    def n_kv_heads(self) -> int:
        """Heads whose keys and values a block caches (fewer than `n_heads` in grouped-query attention): measured,
        or the config's word where nothing is cached."""
        if not self.reuses_prefix():
            return getattr(self.config.get_text_config(), "num_key_value_heads", None) or self.n_heads
        tokens = self.tokenizer.text("a")
        with torch.no_grad():
            return keys_and_values(self.trunk, tokens, 1).layers[0][0].shape[1]

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.like.shape[0]

    @property
    def like(self) -> Tensor:
        """A vector of the residual stream's width in the precision and on the device of the readout."""
        return self.readout.norm.gain

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the head's rows; of a published head with a gate the gated reward, then its objectives; of a reward
        read from a vocabulary the one that is read."""
        if self.vocabulary:
            return (self.vocabulary.objective,)
        if isinstance(self.module, OwnHead):
            return self.module.objectives
        scores = self.module.get_submodule(self.structure.head)
        return objective_names(self.config, linear_weight(scores).shape[0])

    @property
    def noise_floor(self) -> float:
        """Reward differences under this are numerical: the largest of the load report's reward gaps, and never less
        than half of the tolerance of E1 at the size of the rewards seen there."""
        gaps = self.load_report.value.sel(check=["own reward", "batching", "padding"])
        return max(float(gaps.max()), float(self.load_report.value.sel(check="own reward").tolerance) / 2)

    def effect_scale(self, *rewards: float) -> float:
        """S of the tolerances of effects: the largest of the |rewards| and margins given, and of the rewards or their
        SD that the load report saw (the rounding of a reward that happens to be near zero is no smaller)."""
        own = float(self.load_report.value.sel(check="own reward").tolerance) / (2e-2 if self.sixteen_bit else 1e-5)
        return max(own, *map(abs, rewards))

    def tokenize(self, prompt: "str | Sequence[Mapping]", response: "str | Sequence[str]") -> Tokens:
        """Tokens of a conversation: ids, pieces, spans of prompt, response and template tail, reward position. For a
        judge of pairs `response` is the ordered pair (a, b)."""
        return self.tokenizer.conversation(data.as_messages(prompt), response, self.truncation)

    def score(self, prompt: "str | Sequence[Mapping]", response: "str | Sequence[str]") -> float:
        """Reward of one response (trunk in the model's precision; norm and head in float32)."""
        return float(self.rewards([self.tokenize(prompt, response)])[0])

    def hf_score(self, prompt: "str | Sequence[Mapping]", response: "str | Sequence[str]") -> float:
        """The wrapped model's own output on the same tokens, unpadded (without a trainer's autocast)."""
        return sum(self.own_terms(self.tokenize(prompt, response)))

    @torch.no_grad()
    def own_terms(self, tokens: Tokens) -> list[float]:
        """What the wrapped model's own output is the sum of: one number, or two logits with their signs."""
        ids = torch.tensor([tokens.ids], device=self.device)
        if self.vocabulary:
            return self.vocabulary.own_terms(self.module, ids)
        logits = own_output(self.module, input_ids=ids, **self.trunk.segments(ids)).logits[0]
        rows = self._rows
        return [float(logits[rows.row]), *([] if rows.less is None else [-float(logits[rows.less])])]

    @property
    def _rows(self) -> Rows:
        return chosen_rows(self.objectives, self.readout.objective, self.name)

    @property
    def row(self) -> int:
        """Index of the head's row that is read; `StructureError` where no one row is."""
        refuse_change(self, "A row of a reward head")
        rows = self._rows
        if rows.less is None:
            return rows.row
        raise StructureError("The reward is no row of the head", found=f"the difference {rows.name}",
                             expected="one row", do=f"load one: objective={self.objectives[rows.row]!r}")  # fmt: skip

    @property
    def read_as(self) -> dict[str, Any]:
        """The argument under which a `RewardModel` of another module is read as this one is."""
        return {"objective": self.readout.objective} if self._given is None else {"readout": self._given}

    @torch.no_grad()
    def rewards(
        self, tokens: Sequence[Tokens], batch_size: int | None = None, progress: Progress | None = None
    ) -> Float[Tensor, " n"]:
        """Rewards of tokenised texts, batched by length, on the CPU in the order given; equal texts are run once.
        `progress` is told (texts done, texts that differ) after every batch."""
        different = {t.ids: t for t in tokens}
        place = {ids: i for i, ids in enumerate(different)}
        out = torch.empty(len(place), dtype=self.like.dtype)
        inputs, done = self.readout_inputs(list(different.values())), 0
        for batch in self.batches(list(different.values()), batch_size):
            rows = list(batch.rows)
            gate = None if inputs is None else inputs[rows]
            out[rows] = self.readout.reward(self.trunk.pooled(batch), gate).cpu()
            if progress is not None:
                done += len(rows)
                progress(done, len(place))
        return out[[place[t.ids] for t in tokens]]

    @torch.no_grad()
    def readout_inputs(self, tokens: Sequence[Tokens]) -> Float[Tensor, "n d_model"] | None:
        """What the readout's `inputs` is for these texts: for a prompt-gated head the pre-norm residual at the gate's
        position, None for every other. Run from the beginning of the text to there, once for texts that share it."""
        if not isinstance(self.readout, PromptGated):
            return None
        beginnings = [t.first(self.readout.gate_position(t) + 1) for t in tokens]
        different = {t.ids: t for t in beginnings}
        place = {ids: i for i, ids in enumerate(different)}
        out = self.like.new_empty(len(place), self.d_model)
        for batch in self.batches(list(different.values())):
            out[list(batch.rows)] = self.trunk.pooled(batch).to(out)
        return out[[place[t.ids] for t in beginnings]]

    def batches(self, tokens: Sequence[Tokens], batch_size: int | None = None) -> Iterable[Batch]:
        """Length-bucketed batches on the model's device. Texts on either side of a length at which the rotary
        factors change (longrope, dynamic) never share one."""
        for long in (False, True):
            rows = [i for i, t in enumerate(tokens) if self.has_long_factors(t) == long]
            for batch in batches([tokens[i] for i in rows], self.pad_id, self.device, batch_size):
                yield Batch(batch.ids, batch.mask, batch.positions, batch.offset, batch.reward_pos,
                            tuple(rows[i] for i in batch.rows))  # fmt: skip

    def reuses_prefix(self, *texts: Tokens) -> bool:
        """Whether runs of these texts may share the keys and values of common first positions: measured at load, and
        never for texts past a length at which the rotary factors change."""
        tolerance = float(self.load_report.value.sel(check=checks.PREFIX_REUSE).tolerance)
        return math.isfinite(tolerance) and not any(self.has_long_factors(t) for t in texts)

    def has_long_factors(self, tokens: Tokens) -> bool:
        """Whether a text is past the length at which the model's rotary factors change (longrope, dynamic)."""
        return self._rotary_threshold is not None and len(tokens) > self._rotary_threshold

    def tokenize_pairs(self, pairs: Iterable["data.Pair"]) -> list[tuple[Tokens, Tokens]]:
        """(chosen, rejected) tokens of every pair."""
        pairs = data.as_pairs(pairs)
        both, cut = self.tokenizer.both, self.truncation
        return [named(f"Pair {p.id}", both, p.messages, p.chosen, p.rejected, cut) for p in pairs]

    def score_pairs(
        self, pairs: Iterable["data.Pair"], batch_size: int | None = None, progress: Progress | None = None
    ) -> Result:
        """Rewards of both responses and their margin.

        `batch_size`: texts run at once; None: as many as a fixed number of tokens holds. `progress`: called with
        (texts done, texts), equal ones counted once.

        Returns value (pair, side) in reward units; side = chosen, rejected, margin = r(chosen) - r(rejected).
        """
        return scored.pairs(self, pairs, batch_size, progress)

    def score_many(self, groups: Iterable, batch_size: int | None = None, progress: Progress | None = None) -> Result:
        """Rewards of k responses a prompt; `batch_size` and `progress` as in `score_pairs`.

        Returns value (group, response) in reward units, padded with NaN past `n_responses`; the coordinate `label`
        carries the labels (the higher the better; the first response is the best where a group has none).
        """
        return scored.groups(self, groups, batch_size, progress)

    def for_objective(self, objective: str | int) -> "RewardModel":
        """The same model read by another row of its head; weights are shared."""
        refuse_change(self, "Another objective")
        other = object.__new__(RewardModel)
        other.__dict__.update(self.__dict__)
        with torch.no_grad():
            other.readout = own_readout(other, objective)
            other.load_report = checks.load_report(other)
        return other

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write a checkpoint that `AutoModelForSequenceClassification.from_pretrained` loads with the same scores, the
        tokenizer, and a README.md of what was changed in the head. Returns the folder; one that is not empty raises
        `DataError`."""
        from reward_lens.model.saving import save_pretrained

        return save_pretrained(self, folder)

    def surroundings(self) -> dict[str, Any]:
        """What the numbers depend on besides the inputs and the settings."""
        return {
            "revision": self.revision,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "attention": self.config._attn_implementation,
            "versions": versions(),
        }

    def describe(self, method: str, inputs: Sequence | None = None, **meta: Any) -> dict[str, Any]:
        """Provenance that every result carries; `meta` adds settings, title, shows and cannot_show."""
        out: dict[str, Any] = {"method": method, "model": self.name, **self.surroundings()}
        out |= {"objective": self.readout.objective, "readout": self.readout.kind}
        out |= {"reads": self.vocabulary.describe()} if self.vocabulary else {}
        out |= {"exactness": self.readout.exactness}
        out |= {"truncation": self.truncation} if self.truncation else {}
        if self.readout.exactness == "local" and "cannot_show" in meta:
            meta["cannot_show"] += " " + LOCAL
        if inputs is not None:
            out[{"Pair": "n_pairs", "Group": "n_groups"}.get(type(inputs[0]).__name__, "n_items")] = len(inputs)
            out["n_prompts"] = len({item.prompt_key for item in inputs})
            out["inputs_hash"] = data.inputs_hash(inputs)
        return out | meta

    def __repr__(self) -> str:
        return (
            f"RewardModel({self.name!r}, {type(self.module).__name__}, {self.n_layers} layers x {self.n_heads} heads, "
            f"d_model {self.d_model}, {str(self.dtype).removeprefix('torch.')} on {self.device.type})"
        )


@functools.cache
def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("reward-lens", "torch", "transformers", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
