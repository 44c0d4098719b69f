"""A causal language model as a source of log-probabilities: its tokens, its structure, and its float32 tail.

    log p(y_t | before) = z_t[y_t] - log sum_v exp z_t[v]        z_t = f(W N(h_{t-1}) + b)

h is the pre-norm residual, N the final norm, W the unembedding, and f what the model does to its logits: nothing, a
constant factor (Granite, Cohere), or a cap (Gemma-2). f is measured against the model's own logits. The trunk runs in
the model's precision; norm, unembedding and the softmax in float32.
"""

import functools
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reward_lens.arguments import checked_arguments
from reward_lens.engine import hooks
from reward_lens.errors import DataError, LoadError, StructureError
from reward_lens.model import structure as structures
from reward_lens.model.forward import Batch, OnTrunk, batches, padding_id, rotary_threshold, trunk_of
from reward_lens.model.linear_maps import linear_bias, linear_weight
from reward_lens.model.loading import causal_module, tokenizer_of
from reward_lens.model.norm import Norm, measure_norm
from reward_lens.model.own_output import own_output
from reward_lens.model.precision import require_precision
from reward_lens.model.reward_model import versions
from reward_lens.model.structure import Structure
from reward_lens.model.tokens import Tokenizer, Tokens, check_text
from reward_lens.model.usable_module import require_usable_weights

End = Literal["template", "first", "none"]
LOGITS_AT_ONCE = 2**25  # numbers; 128 MiB of float32


class Reply(NamedTuple):
    """A response in its conversation, with the token positions whose log-probabilities count."""

    text: str
    start: int
    stop: int
    """Characters of the response in `text`."""
    tokens: Tokens
    counted: range


class PolicyTokenizer(Tokenizer):
    """A language model's tokenizer: a prompt ends with the generation prompt, and what follows is the response."""

    def reply(self, messages: list[dict], response: str, end: End) -> Reply:
        """The response to a prompt as the chat template renders it. `end`: what of the template's text behind the
        response counts: all of it ("template"), its first token ("first") or nothing ("none")."""
        check_text(response, "response")
        place = f"response{uuid.uuid4().hex}"
        before, _, after = self.render([*messages, {"role": "assistant", "content": place}]).partition(place)
        rendered = self.render([*messages, {"role": "assistant", "content": response}])
        prompt = self.render(messages, answer=True)
        if not (rendered.startswith(prompt) and before.startswith(prompt) and rendered.endswith(after)):
            raise DataError(
                "The response does not follow the generation prompt in the rendered chat template",
                found=f"a conversation that goes on {rendered[len(before) - 20 : len(before)]!r} where the generation "
                f"prompt ends {prompt[-20:]!r}",
                expected="the conversation to begin with what the policy is prompted with",
                do="remove reasoning markup from the response, or set a plainer tokenizer.chat_template",
            )
        return self.placed(rendered, len(prompt), len(rendered) - len(after), end)

    def placed(self, text: str, start: int, stop: int, end: End) -> Reply:
        """The tokens of a rendered conversation whose response stands at these characters."""
        tokens = self._encode(text, start, stop, None)
        tail = {"template": len(tokens.tail), "first": min(1, len(tokens.tail)), "none": 0}[end]
        counted = range(tokens.response.start, tokens.response.stop + tail)
        if not len(counted) or not counted.start:
            raise DataError(
                "A response has no token whose probability could be asked for",
                found=f"{len(counted)} tokens from position {counted.start} of {text[:60]!r}",
                expected="at least one token, with a prompt before it",
                do="leave the pair out, or count the template's end with end='template'",
            )
        return Reply(text, start, stop, tokens, counted)


class LanguageModel(OnTrunk):
    """Wrap a loaded causal language model and its fast tokenizer.

    Parameters
    ----------
    module: as `AutoModelForCausalLM` returns it; put in eval mode, otherwise untouched.
    structure: paths of an unusual network's parts; put to the same proof as what the search finds.

    Raises `StructureError` where the blocks' writes do not add up, and where the logits are not a linear map of the
    final norm's output, a factor or a cap aside.
    """

    def __init__(
        self, module: Any, tokenizer: Any, *, name: str | None = None, revision: str | None = None,
        structure: Structure | None = None,
    ):  # fmt: skip
        self.module, self.config = module.eval(), module.config
        self.name = name or getattr(self.config, "name_or_path", "") or type(module).__name__
        self.revision = revision
        require_usable_weights(module, self.name)
        text_config = self.config.get_text_config()
        self.tokenizer = PolicyTokenizer(tokenizer, None, getattr(text_config, "max_position_embeddings", None))
        self.tokenizer.n_embedded = module.get_input_embeddings().weight.shape[0]
        ids = (padding_id(self.config), tokenizer.pad_token_id, tokenizer.eos_token_id)
        self.pad_id = next((i for i in ids if i is not None), 0)
        # Where the rotary factors depend on a batch's longest text, every text runs alone.
        self.batch_size = None if rotary_threshold(text_config) is None else 1
        with torch.no_grad():
            found = structure or structures.find_structure(
                module, self._probe, text_config.num_hidden_layers, text_config.num_attention_heads
            )
            self.structure = structures.prove(module, found, self._probe)
            self.head = module.get_submodule(self.structure.head)
            self.trunk = trunk_of(module, self.structure)
            like = linear_weight(self.head)
            self.norm: Norm = measure_norm(self.trunk.final_norm, like.shape[1], like)
            self.factor, self.cap = self._measure_logits()

    @functools.cached_property
    def unembedding(self) -> Float[Tensor, "vocabulary d_model"]:
        """Rows of the head in the tail's precision, the factor on the logits in them."""
        return linear_weight(self.head).detach().to(self.norm.gain) * self.factor

    @functools.cached_property
    def offsets(self) -> Float[Tensor, " vocabulary"]:
        """The head's bias, zero where it has none."""
        bias = linear_bias(self.head)
        like = self.norm.gain
        return like.new_zeros(len(self.unembedding)) if bias is None else bias.detach().to(like) * self.factor

    def batches(self, replies: Sequence[Reply]) -> Iterator[Batch]:
        """Length-bucketed batches of the replies' tokens."""
        return batches([r.tokens for r in replies], self.pad_id, self.device, self.batch_size)

    def read_logits(self, h: Float[Tensor, "n d_model"], targets: Int[Tensor, " n"]) -> tuple[Tensor, Tensor, Tensor]:
        """Of each pre-norm residual: the target's logit before any cap, its logit, and log sum exp of all logits."""
        parts, step = [], max(1, LOGITS_AT_ONCE // len(self.unembedding))
        for start in range(0, len(h), step):
            raw = self.norm(h[start : start + step]) @ self.unembedding.T + self.offsets
            here = targets[start : start + step, None]
            z = raw if self.cap is None else self.cap * torch.tanh(raw / self.cap)
            parts.append((raw.gather(1, here)[:, 0], z.gather(1, here)[:, 0], z.logsumexp(1)))
        raw, z, total = (torch.cat(part) for part in zip(*parts, strict=True))
        return raw, z, total

    def log_probabilities(self, h: Float[Tensor, "n d_model"], targets: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """log p(target) read off each pre-norm residual."""
        _, z, total = self.read_logits(h, targets)
        return z - total

    @torch.no_grad()
    def own_log_probabilities(self, reply: Reply) -> Float[Tensor, " n"]:
        """Those of the counted tokens from the module's own logits, the text alone, softmax in float32."""
        ids = torch.tensor([reply.tokens.ids], device=self.device)
        logits = own_output(self.module, input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        where = torch.tensor(reply.counted, device=logits.device)
        return logits[where - 1].float().log_softmax(-1).gather(1, ids[0][where].to(logits.device)[:, None])[:, 0]

    def surroundings(self) -> dict[str, Any]:
        """What the numbers depend on besides the inputs and the settings."""
        return {"revision": self.revision, "dtype": str(self.dtype).removeprefix("torch."), "device": self.device.type,
                "attention": self.config._attn_implementation, "versions": versions()}  # fmt: skip

    def __repr__(self) -> str:
        return f"LanguageModel({self.name!r}, {type(self.module).__name__}, {self.n_layers} layers)"

    def _probe_ids(self) -> Tensor:
        size = self.module.get_input_embeddings().weight.shape[0]
        generator = torch.Generator().manual_seed(0)
        return torch.randint(min(8, size // 2), size, (2, 7), generator=generator).to(self.device)

    def _run(self) -> tuple[Tensor, Tensor]:
        """What the head gives and what the model gives, [2, 7, vocabulary]."""
        seen: list[Tensor] = []
        head = self.module.get_output_embeddings()
        if head is None:
            raise StructureError(
                f"{type(self.module).__name__} has no output embedding",
                found="no unembedding",
                expected="a causal language model",
                do="load it with AutoModelForCausalLM",
            )
        ids = self._probe_ids()
        with hooks.attached([hooks.read_output(head, lambda x: seen.append(x.detach().clone()))]):
            logits = own_output(self.module, input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return seen[0], logits

    def _probe(self) -> Tensor:
        return self._run()[0][:, -1]

    def _measure_logits(self) -> tuple[float, float | None]:
        """The factor and the cap that turn what the head gives into the model's logits."""
        raw, own = (x.double() for x in self._run())
        factor = float((own * raw).sum() / (raw * raw).sum())
        cap = getattr(self.config.get_text_config(), "final_logit_softcapping", None)
        size = own.abs().max()
        gaps: dict[tuple[float, float | None], float] = {}
        for tried in ((1.0, None), (factor, None), *([] if cap is None else [(1.0, float(cap))])):
            given = raw * tried[0] if tried[1] is None else tried[1] * torch.tanh(raw / tried[1])
            gaps[tried] = float((given - own).abs().max() / size)
        best = min(gaps, key=lambda tried: gaps[tried])  # the first of equals: logits left alone leave no gap at all
        if gaps[best] <= (2e-2 if self.sixteen_bit else 1e-4):
            return best
        raise StructureError(
            f"What {type(self.module).__name__} does to its logits was not understood",
            found=f"the closest guess leaves {gaps[best]:.1%} of them",
            expected="the unembedding's output as it is, times a constant, or under final_logit_softcapping",
            do="please report the model's class",
        )


@checked_arguments
def load_language_model(
    path: str | Path, *, revision: str | None = None, device: Any = None, dtype: Any = None, device_map: Any = None,
    trust_remote_code: bool = False, attn_implementation: str | None = None,
) -> LanguageModel:  # fmt: skip
    """A causal language model from a hub id or a folder, with its tokenizer; arguments as for `load`. A PEFT adapter of
    one is merged into its base.

    Returns a `LanguageModel`. Raises `LoadError` where it cannot be loaded, is no language model, or lacks weights.
    """
    require_precision(dtype)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    settings = {"dtype": dtype or "auto", "device_map": device_map, "attn_implementation": attn_implementation}
    settings = {k: v for k, v in settings.items() if v is not None}
    try:
        module, _, base = causal_module(str(path), options, settings)
        tokenizer = tokenizer_of(str(path), base, options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise LoadError(
            f"{path} could not be loaded as a language model",
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            expected="a hub id or a folder with a causal language model and its tokenizer",
            do="check the name and the connection, or load it yourself and pass rl.LanguageModel(module, tokenizer)",
        ) from error
    name = str(path) if not Path(path).exists() else Path(path).resolve().name
    return LanguageModel(module if device is None else module.to(device), tokenizer, name=name, revision=revision)


Given = str | Path | LanguageModel | Callable[[], LanguageModel]


def opened(given: Given, role: str) -> LanguageModel:
    """The language model that a name, a loaded one or a function stands for."""
    if isinstance(given, LanguageModel):
        return given
    if isinstance(given, str | Path):
        return load_language_model(given)
    made = given() if callable(given) and not hasattr(given, "config") else None
    if isinstance(made, LanguageModel):
        return made
    raise DataError(
        f"The {role} was not understood",
        found=type(given if made is None else made).__name__,
        expected="a hub id, a folder, an rl.LanguageModel, or a function that returns one",
        do="wrap a loaded module with its tokenizer: rl.LanguageModel(module, tokenizer)",
    )


def require_end(end: str) -> None:
    """Raise `DataError` for an `end` that is none of `End`."""
    if end not in get_args(End):
        raise DataError("What counts of a response's end was not understood", found=repr(end),
                        expected="'template', 'first' or 'none'", do="pass one of these as end=")  # fmt: skip
