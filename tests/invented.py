"""An architecture that no library knows: its own classes, and none of the usual names for its parts.

Blocks are `slabs`, attention is `gather`, the MLP `grind`, norms are `Leveller`s whose gain is stored as a logarithm,
the final norm is `skim` and the head `gauge`; the config has its own words too. Three forms: "plain" (pre-norm),
"sandwich" (a norm before and after each write) and "parallel" (both writes read one norm of the block's input).
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from families import randomise, tiny_tokenizer

FORMS = ("plain", "sandwich", "parallel")
WIDTH, SLABS, LOBES, LOBE_WIDTH, BULK = 24, 3, 3, 10, 44


class SlabConfig(PreTrainedConfig):
    model_type = "slabs_of_no_library"
    attribute_map = {"hidden_size": "width", "num_hidden_layers": "slab_count", "num_attention_heads": "lobes"}

    def __init__(self, form: str = "plain", symbols: int = 320, width: int = WIDTH, slab_count: int = SLABS,
                 lobes: int = LOBES, **keys):  # fmt: skip
        self.form, self.symbols, self.width, self.slab_count, self.lobes = form, symbols, width, slab_count, lobes
        super().__init__(**keys)


class Leveller(nn.Module):
    """x / rms(x) * exp(log_gain)."""

    def __init__(self, width: int):
        super().__init__()
        self.log_gain = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.log_gain.exp()


class Gather(nn.Module):
    """Causal attention with a decay by distance; queries, keys and values in one matrix, output in a tuple."""

    def __init__(self, width: int, lobes: int, hidden_product: bool):
        super().__init__()
        self.lobes, self.hidden_product = lobes, hidden_product
        self.triple = nn.Linear(width, 3 * lobes * LOBE_WIDTH)
        self.together = nn.Linear(lobes * LOBE_WIDTH, width)

    def forward(self, x: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        asked, offered, carried = self.triple(x).unflatten(-1, (3, self.lobes, LOBE_WIDTH)).unbind(2)
        match = torch.einsum("bqhd,bkhd->bhqk", asked, offered) * LOBE_WIDTH**-0.5
        place = torch.arange(x.shape[1], device=x.device)
        match = match - 0.1 * (place[:, None] - place).abs()
        weights = match.masked_fill(~visible[:, None], torch.finfo(match.dtype).min).softmax(-1)
        if self.hidden_product:  # a product that cannot be observed from outside
            mixed = torch.einsum("bhqk,bkhd->bqhd", weights, carried)
        else:
            mixed = (weights @ carried.transpose(1, 2)).transpose(1, 2)
        return self.together(mixed.flatten(2)), weights


class Grind(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.spread = nn.Linear(width, BULK)
        self.press = nn.Linear(BULK, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.press(torch.tanh(self.spread(x)) ** 2)


class Slab(nn.Module):
    def __init__(self, config: SlabConfig):
        super().__init__()
        self.form = config.form
        self.entry = Leveller(config.width)
        self.gather = Gather(config.width, config.lobes, config.form == "parallel")
        self.grind = Grind(config.width)
        if self.form != "parallel":
            self.second_entry = Leveller(config.width)
        if self.form == "sandwich":
            self.exit, self.second_exit = Leveller(config.width), Leveller(config.width)

    def forward(self, stream: Tensor, visible: Tensor) -> Tensor:
        level = self.entry(stream)
        gathered, _ = self.gather(level, visible)
        if self.form == "parallel":
            return stream + gathered + self.grind(level)
        if self.form == "sandwich":
            stream = stream + self.exit(gathered)
            return stream + self.second_exit(self.grind(self.second_entry(stream)))
        stream = stream + gathered
        return stream + self.grind(self.second_entry(stream))


class Quarry(PreTrainedModel):
    config_class = SlabConfig
    base_model_prefix = "quarry"

    def __init__(self, config: SlabConfig):
        super().__init__(config)
        self.symbols = nn.Embedding(config.symbols, config.width)
        self.slabs = nn.ModuleList(Slab(config) for _ in range(config.slab_count))
        self.skim = Leveller(config.width)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.symbols

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_) -> tuple[Tensor]:
        length = input_ids.shape[1]
        visible = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()[None]
        if attention_mask is not None:
            visible = visible & attention_mask[:, None, :].bool()
        stream = self.symbols(input_ids)
        for slab in self.slabs:
            stream = slab(stream, visible)
        return (self.skim(stream),)


class QuarryForRewards(PreTrainedModel):
    config_class = SlabConfig
    base_model_prefix = "quarry"

    def __init__(self, config: SlabConfig):
        super().__init__(config)
        self.quarry = Quarry(config)
        self.gauge = nn.Linear(config.width, config.num_labels)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.quarry.symbols

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_) -> SequenceClassifierOutputWithPast:
        (state,) = self.quarry(input_ids, attention_mask)
        there = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        last = (there * torch.arange(there.shape[1], device=there.device)).argmax(1)
        return SequenceClassifierOutputWithPast(logits=self.gauge(state)[torch.arange(len(last)), last])


def invented_model(form: str, dtype: torch.dtype = torch.float32):
    """A randomised reward model of the unknown architecture in eval mode, and its tokenizer."""
    tokenizer = tiny_tokenizer()
    config = SlabConfig(form, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    with torch.random.fork_rng(devices=[]):
        module = QuarryForRewards(config)
    randomise(module)
    return module.to(dtype).eval(), tokenizer
