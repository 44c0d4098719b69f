"""What the published heads share: a transformers trunk with a head that transformers has no class for.

To `RewardModel` such a model is a sequence classifier: token ids go in, `.logits` [batch, column] come out, a column an
objective. It also says which module reads the normed residual, and builds the readout that the methods ask.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from reward_lens.errors import DataError
from reward_lens.model.norm import Norm
from reward_lens.model.placement import require_all_there
from reward_lens.model.readout import Readout, objective_names
from reward_lens.model.tokens import Tokenizer


class OwnHead(nn.Module):
    """A trunk and its head; one subclass a head, put in front of a family's `PreTrainedModel` by `class_for`."""

    head_path: ClassVar[str]
    """Submodule that is called with the normed residual of every position."""
    first_is_reward: ClassVar[bool] = False
    """Whether the first of several columns is the model's reward, so that it is read where no objective is named."""
    backbone: ClassVar[type[nn.Module]]
    chat_template: ClassVar[str | None] = None
    """How the authors write a conversation, for a checkpoint whose tokenizer has no template."""
    published_type: ClassVar[str | None] = None
    """Model type of the checkpoint's config, where transformers has no such type."""
    tokenizer_name: ClassVar[str | None] = None
    """Hub id of the tokenizer that the authors name, for a checkpoint without one."""
    base_model_prefix: str
    base_model: Any
    config: Any

    def __init__(self, config: Any):
        super().__init__(config)
        setattr(self, self.base_model_prefix, self.backbone(config))
        self.build(config)
        self.post_init()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]

    def build(self, config: Any) -> None:
        """Add the head's modules under their published names."""
        raise NotImplementedError

    def columns(
        self, states: Float[Tensor, "batch pos d_model"], ids: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos column"]:
        """What the head gives at every position, in the published arithmetic."""
        raise NotImplementedError

    def head_parts(self) -> nn.Module:
        """Every module and parameter of the head; the map itself where that is all."""
        raise NotImplementedError

    def readout(self, norm: Norm, row: int) -> Readout:
        """The readout of one column behind the measured norm."""
        raise NotImplementedError

    def fill(self, missing: list[str]) -> list[str]:
        """Set those of the weights missing in a checkpoint that its config holds; returns the others."""
        return missing

    @property
    def n_columns(self) -> int:
        """How many rewards the head gives."""
        return self.config.num_labels

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the columns."""
        return objective_names(self.config, self.n_columns)

    @property
    def probe_ending(self) -> tuple[int, ...]:
        """Tokens that a text must hold for the head to be read; put behind a probe of random ones."""
        return ()

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return self.config.get_text_config().hidden_size

    def forward(
        self, input_ids: Int[Tensor, "batch pos"], attention_mask: Tensor | None = None, **kwargs: Any
    ) -> SequenceClassifierOutput:
        states = self.base_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)[0]
        columns = self.columns(states.to(next(self.head_parts().parameters()).dtype), input_ids)
        rows = torch.arange(len(columns), device=columns.device)
        at = self.read_positions(input_ids, attention_mask).to(columns.device)
        return SequenceClassifierOutput(logits=columns[rows, at])

    def read_positions(self, ids: Int[Tensor, "batch pos"], mask: Tensor | None) -> Int[Tensor, " batch"]:
        """The position before the first padding token; the last one where there is none."""
        pad = self.config.pad_token_id
        if pad is None:
            return torch.full(ids.shape[:1], ids.shape[1] - 1, device=ids.device)
        return (torch.eq(ids, pad).int().argmax(-1) - 1) % ids.shape[1]

    def tokenizer_for(self, tokenizer: Any, pooled_skips: int | None, max_length: int | None) -> Tokenizer:
        """How this head's texts are written and where they are read."""
        return BeforePadding(tokenizer, pooled_skips, max_length)


class BeforePadding(Tokenizer):
    """Texts of a head that reads the position before the first padding token."""

    def reward_position(self, ids: list[int]) -> int:
        position, pad = super().reward_position(ids), self.pooled_skips
        if pad is not None and pad in ids and (ids.index(pad) - 1) % len(ids) != position:
            raise DataError(
                "A padding token stands inside a text whose head reads before the first one",
                found=f"{self.hf.convert_ids_to_tokens(pad)!r} at position {ids.index(pad)} of {len(ids)}",
                expected="the padding token behind the whole text: the published code would read an earlier turn",
                do="take it out of the text (a template that ends every turn with it cannot write several turns), or "
                "set pad_token_id in config.json to a token of its own",
            )
        return position


def last_attended(ids: Int[Tensor, "batch pos"], mask: Tensor | None) -> Int[Tensor, " batch"]:
    """The last position where the mask is not 0; the last one of all where there is no mask."""
    places = torch.arange(ids.shape[1], device=ids.device)
    return torch.where(torch.ones_like(ids).bool() if mask is None else mask.bool(), places, 0).amax(-1)


def class_for(head: type[OwnHead], config: Any, name: str, settings: Mapping[str, Any]) -> type:
    """The model class of a head on the trunk that the config describes, under the published class name; `settings` are
    attributes of the head class that differ from its own."""
    backbone: Any = MODEL_MAPPING[type(config)]
    family = next(c for c in backbone.__mro__[1:] if issubclass(c, PreTrainedModel))
    return type(name, (head, family), {"backbone": backbone, "__module__": __name__, **settings})


def tokenizer_options(module: Any) -> dict[str, Any]:
    """What `AutoTokenizer` must be told of a checkpoint whose config it cannot read: the model's type."""
    published = getattr(module, "published_type", None)
    if published is None:
        return {}
    config: Any = PreTrainedConfig()
    config.model_type = published
    return {"config": config}


def complete(module: Any, tokenizer: Any) -> dict[str, str]:
    """Give a tokenizer without a chat template the one that the authors of a published head name; returns a word on it
    for the load report, and nothing where nothing was given."""
    template = getattr(module, "chat_template", None)
    if template is None or getattr(tokenizer, "chat_template", None) is not None:
        return {}
    tokenizer.chat_template = template
    return {"template": f"the checkpoint has no chat template: written as the authors of {type(module).__name__} do"}


def published_path(module: Any) -> str | None:
    """Path of the part of a published head that reads the normed residual; None for every other model."""
    return module.head_path if isinstance(module, OwnHead) else None


def head_of(module: Any, structure: Any) -> nn.Module:
    """The reward head of a model: all parts of a published head or of a step's, a pooler and what reads it, or the
    module at the structure's path."""
    if hasattr(module, "head_parts"):
        require_all_there(module.head_parts(), f"The head of {type(module).__name__}")
        return module.head_parts()
    head = module.get_submodule(structure.head)
    return head if structure.pooler is None else nn.ModuleList([module.get_submodule(structure.pooler), head])
