"""A reward read off a language model's vocabulary: the logit of a token, or the log-odds of two.

    logit z_t = k (w_t . N(h) + b_t)        reward = z_pos,  or  z_pos - z_neg = log p(pos) / p(neg)

with w_t rows of the unembedding and k the model's factor on its logits (Granite divides them, Cohere multiplies). The
log-softmax subtracts the same number from both logits, so their difference is the log-odds exactly. Either way the
reward is one linear readout, k (w_pos - w_neg) behind the final norm, and every method holds for it unchanged.

k is measured: a ramp is put in place of the unembedding's output, and what the model makes of it is its logits. A soft
cap, c tanh(k z / c), shows there too. Behind a cap no logit is linear, so a capped model is refused unless `before_cap`
asks for the logits before it. Those are exact; tanh increases, so one token's logits come in the same order and two
tokens' log-odds have the same sign as behind the cap. The order of log-odds between texts may differ.

What this cannot show: what the judge would say after thinking. The reward is of the first token of its answer.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reward_lens.engine import hooks
from reward_lens.errors import DataError, LoadError, StructureError
from reward_lens.model import usable_module
from reward_lens.model.adapters import saved_whole
from reward_lens.model.judge import JudgeTokenizer, check_template, digest
from reward_lens.model.linear_maps import is_linear, linear_bias, linear_weight
from reward_lens.model.norm import measure_norm
from reward_lens.model.own_output import own_output
from reward_lens.model.placement import input_device
from reward_lens.model.readout import LinearReadout
from reward_lens.model.tokens import Tokenizer

if TYPE_CHECKING:
    from reward_lens.model.reward_model import RewardModel

REACH = (-2, 4)  # decades of the ramp: a cap of any use lies between


@dataclasses.dataclass(frozen=True)
class VocabReadout:
    """Read a reward from a language model's logits: pass it as `readout=` to `rl.load` or `rl.RewardModel`.

    Parameters
    ----------
    positive: the token whose logit is the reward: its text, which has to be one token (" Yes" and "Yes" are two), or
        the index of a row of the unembedding (0 for Nemotron-70B-Reward).
    negative: the token whose logit is taken away; the reward is then the log-odds of positive against negative.
    template: None reads at the last token of the conversation as the chat template renders it, response included. A
        judge's question with {prompt} and {response}, or with {prompt}, {a} and {b} for a judge of pairs, is asked as a
        user message and read at the end of the generation prompt. A prompt of several messages stands as "role: text".
    chat: False takes the template for the whole text, without a chat template; special tokens are the tokenizer's own.
    before_cap: read the logits before a final soft cap (Gemma-2); no difference where a model has none.

    Returns, through the model built with it, rewards in logits or log-odds (shape as everywhere). With {a} and {b} a
    "response" is the ordered pair (a, b) and the reward what speaks for a; a preference pair is read in both orders, so
    the margin is twice the preference averaged over orders (`rl.pair_judge`).

    Raises `DataError` for texts that are not one token, equal tokens and templates without placeholders,
    `StructureError` for a soft cap and for logits that are no multiple of the unembedding's output. The load report
    holds the reward against the model's own logits. `edit_head` and `save_pretrained` refuse: a change of the row would
    change what the language model writes.

    Reference: Wang et al. 2024, arXiv 2410.01257 (a reward in row 0 of a language model); Zheng et al. 2023, arXiv
    2306.05685 (judges and their position bias).
    """

    positive: str | int
    negative: str | int | None = None
    template: str | None = None
    chat: bool = True
    before_cap: bool = False

    def __post_init__(self):
        if self.template is not None:
            check_template(self.template)
        elif not self.chat:
            raise DataError(
                "A text without a chat template needs a template of its own",
                found="chat=False and no template",
                expected="template= with {prompt} and {response}",
                do="pass template=, or leave chat=True",
            )

    @torch.no_grad()
    def resolved(self, module: Any, tokenizer: Any) -> "VocabRows":
        """The rows of this module's unembedding, with the factor and the cap of its logits measured."""
        head = unembedding(module)
        n_rows = linear_weight(head).shape[0]
        wanted = [self.positive] if self.negative is None else [self.positive, self.negative]
        rows, names = zip(*(_row(tokenizer, token, n_rows) for token in wanted), strict=True)
        if len(set(rows)) < len(rows):
            raise DataError("The two tokens are one", found=f"row {rows[0]} twice", expected="two different tokens",
                            do="correct positive= or negative=")  # fmt: skip
        logits = _measured(module, head)
        if logits.cap is not None and not self.before_cap:
            raise StructureError(
                f"The logits of {type(module).__name__} are soft-capped",
                found=f"logit = {logits.words()}, z the unembedding's output",
                expected="logits that are linear in what the unembedding reads",
                do="pass before_cap=True to read the logits before the cap: exact, of the same sign, and for one token "
                "in the same order as the model's own",
            )
        pieces = tuple(str(piece) for piece in tokenizer.convert_ids_to_tokens(list(rows)))
        return VocabRows(self, head, rows, pieces, " - ".join(names), logits)


@dataclasses.dataclass(frozen=True)
class Logits:
    """What a model makes of its unembedding's output z: factor z, or cap tanh(factor z / cap)."""

    factor: float
    cap: float | None
    gap: float
    """Largest relative departure from that form on the ramp."""
    tolerance: float

    def words(self) -> str:
        """The form as a formula in z."""
        multiple = f"{self.factor:.6g} z"
        return multiple if self.cap is None else f"{self.cap:.6g} tanh({multiple} / {self.cap:.6g})"


@dataclasses.dataclass(frozen=True)
class VocabRows:
    """A `VocabReadout` on one module."""

    spec: VocabReadout
    head: nn.Module
    rows: tuple[int, ...]
    """Positive, then negative if there is one."""
    pieces: tuple[str, ...]
    """What the tokenizer calls them; "None" for a row without a token."""
    name: str
    logits: Logits

    @property
    def objective(self) -> str:
        """Name of the reward: its tokens and, with a template, the template's digest."""
        return self.name if self.asked is None else f"{self.name} (template {self.asked})"

    @property
    def asked(self) -> str | None:
        """Digest of the judge's template; None where there is none."""
        return None if self.spec.template is None else digest(self.spec.template, self.spec.chat)

    def tokenizer(self, hf: Any, max_length: int | None) -> Tokenizer:
        """Conversations as the readout wants them rendered; read at their last token, a padding token included."""
        if self.spec.template is None:
            return Tokenizer(hf, None, max_length)
        return JudgeTokenizer(hf, max_length, self.spec.template, self.spec.chat)

    def probe(self, module: Any, device: torch.device) -> Tensor:
        """The load report's probe batch; returns what the unembedding itself gives at the last position."""
        kept: list[Tensor] = []
        with hooks.attached([hooks.read_output(self.head, lambda z: kept.append(z[:, -1]))]):
            usable_module.run_probe(module, device)
        return kept[0]

    def readout(self, norm: nn.Module | None) -> LinearReadout:
        """The linear readout that the rows come to."""
        weight, bias = linear_weight(self.head).detach(), linear_bias(self.head)
        measured = measure_norm(norm, weight.shape[1], weight)
        like = measured.gain
        row = self._signed([weight[i].to(like) for i in self.rows])
        constant = like.new_zeros(()) if bias is None else self._signed([bias[i].detach().to(like) for i in self.rows])
        factor = self.logits.factor
        return LinearReadout(measured, factor * row, factor * constant, self.objective, "vocabulary")

    @torch.no_grad()
    def own_terms(self, module: Any, ids: Tensor) -> list[float]:
        """The model's own logits of the rows at the last position of one unpadded text [1, pos], before any cap, with
        the signs that they have in the reward."""
        before: list[Tensor] = []
        with hooks.attached([hooks.read_output(self.head, lambda z: before.append(z[0, -1]))]):
            last = own_output(module, input_ids=ids).logits[0, -1]
        if self.logits.cap is not None:
            last = self.logits.factor * before[0].double()
        return [sign * float(last[i]) for sign, i in zip((1, -1), self.rows, strict=False)]

    def describe(self) -> dict[str, Any]:
        """What is read, for `meta`."""
        return {
            "rows": list(self.rows),
            "pieces": list(self.pieces),
            "template": self.spec.template,
            "chat": self.spec.chat,
            "logit": self.logits.words(),
            "before_cap": self.logits.cap is not None,
        }

    def _signed(self, values):
        return values[0] if len(values) == 1 else values[0] - values[1]


def vocabulary_of(readout: Any, module: Any, tokenizer: Any) -> VocabRows | None:
    """The rows that a `VocabReadout` names on a module; None for every other readout."""
    return readout.resolved(module, tokenizer) if isinstance(readout, VocabReadout) else None


def unembedding(module: Any) -> Any:
    """The module that gives a language model's logits; raises where there is none, or none that can be read."""
    find = getattr(module, "get_output_embeddings", None)
    head = saved_whole(find()) if find is not None else None
    if head is None:
        raise StructureError(
            f"{type(module).__name__} has no vocabulary to read a reward from",
            found="no output embeddings",
            expected="a causal language model (...ForCausalLM)",
            do="load it with AutoModelForCausalLM, or leave readout= out for a model with a reward head",
        )
    if not is_linear(head):
        raise LoadError(
            f"The unembedding of {type(module).__name__} is quantised",
            found=f"a {type(head).__name__}",
            expected="floating-point rows: quantising them changes the reward direction itself",
            do="keep it out of quantisation (llm_int8_skip_modules=['lm_head'] or your method's like option)",
        )
    return head


def refuse_change(rm: "RewardModel", what: str) -> None:
    """Raise `StructureError` for a change of, or a checkpoint for, a reward that is part of a vocabulary."""
    if rm.vocabulary is None:
        return
    raise StructureError(
        f"{what} is not for a reward read from a vocabulary",
        found=f"{rm.readout.objective}, rows of the unembedding of {type(rm.module).__name__}",
        expected="a reward head of its own: another row would change what the language model writes, and, tied, what "
        "it reads",
        do="take directions out of the residual at run time (rl.intervene with rl.project_out at the last resid_post), "
        "or give a sequence classifier rm.readout.weight and rm.readout.bias as its head and change that",
    )


def _row(tokenizer: Any, token: Any, n_rows: int) -> tuple[int, str]:
    """Index of a token's row, and its name."""
    if isinstance(token, str):
        ids = list(tokenizer(token, add_special_tokens=False)["input_ids"])
        if len(ids) != 1:
            pieces = ", ".join(repr(tokenizer.convert_ids_to_tokens(i)) for i in ids) or "nothing"
            raise DataError(
                f"{token!r} is not one token",
                found=f"{len(ids)} tokens: {pieces}",
                expected="a text that the tokenizer reads as a single token",
                do="drop or add the space in front, choose another word, or pass the row's index",
            )
        row, name = ids[0], repr(token)
    elif isinstance(token, int) and not isinstance(token, bool):
        row, name = token, f"row {token}"
    else:
        raise DataError("A token was not understood", found=repr(token), expected="a text or the index of a row",
                        do="correct positive= or negative=")  # fmt: skip
    if not 0 <= row < n_rows:
        raise DataError("The unembedding has no such row", found=name, expected=f"0 to {n_rows - 1}",
                        do="correct positive= or negative=")  # fmt: skip
    return row, name


def _measured(module: Any, head: nn.Module) -> Logits:
    """The form of a model's logits, from a ramp in place of the unembedding's output."""
    weight = linear_weight(head)
    sixteen_bit = weight.dtype in (torch.bfloat16, torch.float16)
    half = torch.logspace(*REACH, (weight.shape[0] + 1) // 2, dtype=torch.float64)
    fed = torch.cat([half, -half])[: weight.shape[0]].to(weight.dtype)
    put = functools.partial(_like, fed)
    with hooks.attached([hooks.edit_output(head, put)]):
        seen = usable_module.run_probe(module, input_device(module))[0, -1].double().cpu()
    z, tolerance = fed.double(), 2e-2 if sixteen_bit else 1e-5
    if seen.shape != z.shape or not bool(torch.isfinite(seen).all()):
        raise _not_understood(module, "logits that are not finite, or not one a row")
    factor = float((seen / z).mean())
    gap = float((seen / z / factor - 1).abs().max()) if factor else float("inf")
    if gap <= tolerance:
        return Logits(factor, None, gap, tolerance)
    cap = float(seen.abs().max())
    middle = (seen.abs() < cap / 2) & (seen != 0)
    if cap and bool(middle.any()):
        factor = float((torch.atanh(seen[middle] / cap) * cap / z[middle]).mean())
        capped = float((seen - cap * torch.tanh(factor * z / cap)).abs().max()) / cap
        if capped <= tolerance:
            return Logits(factor, cap, capped, tolerance)
    raise _not_understood(module, f"no multiple of the unembedding's output ({gap:.1%} off) and no soft cap of it")


def _like(fed: Tensor, z: Tensor) -> Tensor:
    return fed.to(z).expand_as(z)


def _not_understood(module: Any, found: str) -> StructureError:
    return StructureError(
        f"What {type(module).__name__} does to its logits was not understood",
        found=found,
        expected="logits that are a multiple of the unembedding's output, or a soft cap of it",
        do="please report the model's class",
    )
