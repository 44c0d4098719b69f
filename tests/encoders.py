"""Tiny random encoders of the real Hugging Face classes, and the byte-level pair tokenizer they share.

Every parameter is redrawn as in `families`: gains, shifts and biases of the norms all matter.
"""

import functools
import importlib

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

from families import D_MLP, D_MODEL, N_HEADS, randomise

MAX_POSITIONS = 640
_COMMON = {
    "hidden_size": D_MODEL, "num_hidden_layers": 3, "num_attention_heads": N_HEADS, "intermediate_size": D_MLP,
    "max_position_embeddings": MAX_POSITIONS, "pad_token_id": 1, "num_labels": 1,
}  # fmt: skip
_DISENTANGLED = {
    "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"], "share_att_key": True,
    "norm_rel_ebd": "layer_norm", "position_biased_input": False, "max_relative_positions": -1, "type_vocab_size": 0,
    "pooler_hidden_size": D_MODEL, "pooler_hidden_act": "gelu",
}  # fmt: skip
_SPECS = {
    "bert": ("bert", "Bert", {}),
    "deberta": ("deberta_v2", "DebertaV2", _DISENTANGLED),
    "roberta": ("roberta", "Roberta", {"type_vocab_size": 1}),
    "modernbert": (
        "modernbert",
        "ModernBert",
        {"local_attention": 16, "norm_bias": False, "classifier_pooling": "cls"},
    ),
    "electra": ("electra", "Electra", {"embedding_size": 24}),
    "distilbert": ("distilbert", "DistilBert", {}),
    "deberta_v1": ("deberta", "Deberta", _DISENTANGLED | {"max_relative_positions": 64}),
    "xlm_roberta": ("xlm_roberta", "XLMRoberta", {"type_vocab_size": 1}),
    "mpnet": ("mpnet", "MPNet", {}),
    "ernie": ("ernie", "Ernie", {}),
    "roberta_prelayernorm": ("roberta_prelayernorm", "RobertaPreLayerNorm", {"type_vocab_size": 1}),
    "megatron_bert": ("megatron_bert", "MegatronBert", {}),
}
ENCODERS: tuple[str, ...] = ("bert", "deberta", "roberta", "modernbert")
POST_NORM: tuple[str, ...] = ("bert", "deberta", "roberta")
OTHERS: tuple[str, ...] = tuple(name for name in _SPECS if name not in ENCODERS)
"""Classes that nothing in the package was written for."""
_TELL_APART = ("bert", "deberta", "electra", "ernie", "megatron_bert")  # whose tokenizers give segments
_SPECIALS = ("[CLS]", "<pad>", "[SEP]", "[UNK]")


def pair_tokenizer(segments: bool = True, doubled: bool = False) -> PreTrainedTokenizerFast:
    """Bytes and four special tokens. A pair is ``[CLS] a [SEP] b [SEP]``, or with two separators between (RoBERTa);
    `segments`: whether it tells the two texts apart for the model."""
    pieces = [*_SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in _SPECIALS])
    between = "[SEP] [SEP]" if doubled else "[SEP]"
    second = 1 if segments else 0
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair=f"[CLS] $A {between} $B:{second} [SEP]:{second}",
        special_tokens=[(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )  # fmt: skip
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if segments else [])]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]", pad_token="<pad>", unk_token="[UNK]",
        padding_side="right", clean_up_tokenization_spaces=False, model_input_names=names,
    )  # fmt: skip


def tiny_encoder(
    name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changed: object
) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """A randomised encoder with its classification head, in eval mode, and its tokenizer."""
    package, prefix, keys = _SPECS[name]
    tokenizer = pair_tokenizer(segments=name in _TELL_APART, doubled=name == "roberta")
    configuration = importlib.import_module(f"transformers.models.{package}.configuration_{package}")
    modeling = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    vocabulary = 16 * (len(tokenizer) // 16 + 1)
    ids = {"cls_token_id": 0, "sep_token_id": 2, "bos_token_id": 0, "eos_token_id": 2}
    config = getattr(configuration, f"{prefix}Config")(**(_COMMON | ids | keys | changed), vocab_size=vocabulary)
    with torch.random.fork_rng(devices=[]):
        module = getattr(modeling, f"{prefix}ForSequenceClassification")(config)
    randomise(module, seed)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    module.config.dtype = dtype
    return module.eval(), tokenizer


@functools.cache
def loaded(name: str):
    """The reward model of a tiny encoder; built once."""
    import reward_lens as rl

    return rl.RewardModel(*tiny_encoder(name), name=name)
