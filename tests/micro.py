"""A reward model of integer weights, small enough to compute by hand: the expected numbers are literals.

A real `LlamaForSequenceClassification` of width 4 with two layers, two heads that share one key and value
head, a final norm with gains and a head bias. Queries and keys are zero, so attention is the plain mean over
the tokens so far; the activation is ReLU and the norms have eps 0, so all before the final norm is rational.

Written (e0, e1, e2, e3), every token's embedding has entries +1 or -1 and e3 = +1:

    <bos> (-1, 1, 1, 1)    <end> (-1, -1, 1, 1)
    a (1, 1, 1, 1)    b (1, -1, -1, 1)    c (-1, 1, -1, 1)    d (1, -1, 1, 1)

Block 0. The root mean square of an embedding is 1. v = (2 e3, 0) = (2, 0) at every position; head 0 writes
-2 v0 = -4 and head 1 writes +1 v0 = +2 to e3. So attn = (0, 0, 0, -2) and e3 becomes -1; the root mean square
stays 1. MLP: neuron 0 writes -relu(e0) (2 e2) to e2, so e2 changes sign where e0 = +1. Neuron 1 has the gate
e3 = -1 and never fires. After block 0 a token is (x0, x1, y2, -1) with

    y2:  <bos> 1   <end>  1   a -1   b  1   c -1   d -1
    x1:  <bos> 1   <end> -1   a  1   b -1   c  1   d -1

Block 1. v = (2 y2, x1); head 0 writes 2 v0 to e0 and head 1 writes 4 v1 to e1: attn = (4 mean y2, 4 mean x1,
0, 0). At the reward position, which is <end>: m = (-1 + 4 mean y2, -1 + 4 mean x1, 1, -1). MLP, with R = mean
of m^2 and norm gains (2, 1, 1, 3): neuron 0 writes 3 relu(2 m0 + m1) m2 / R to e2,
neuron 1 writes relu(-m1) (2 m0) / R to e3.

Head. Gains (1, 2, 3, 1) and weight (2, -1, 1, 3) make (2, -2, 3, 3); the bias is -2:

    r = (2 h0 - 2 h1 + 3 h2 + 3 h3) / sqrt(mean h^2) - 2

Prompt "a", by response:

    b    4 tokens, sum y2 = 2, sum x1 = 0: m = (1, -1, 1, -1), R = 1, MLP (0, 0, 3, 2), h = (1, -1, 4, 1);
         r = 19 / sqrt(19 / 4) - 2 = 2 sqrt(19) - 2
    c    4 tokens, sum y2 = 0, sum x1 = 2: m = h = (-1, 1, 1, -1), no neuron fires; r = -4 / 1 - 2
    d    4 tokens, sum y2 = 0, sum x1 = 0: m = (-1, -1, 1, -1), R = 1, MLP (0, 0, 0, -2), h = (-1, -1, 1, -3);
         r = -6 / sqrt(3) - 2 = -2 sqrt(3) - 2
    b b  5 tokens, sum y2 = 3, sum x1 = -1: m = (7/5, -9/5, 1, -1), R = 9/5, MLP (0, 0, 5/3, 14/5),
         h = (7/5, -9/5, 8/3, 9/5), mean h^2 = 3499/900;
         r = (99/5) / sqrt(3499/900) - 2 = 594 / sqrt(3499) - 2
"""

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

PROMPT = "a"

# Response to `PROMPT` -> reward. Prompt "b" and response "a" have the reward of "a" and "b".
EXPECTED: dict[str, float] = {
    "b": 6.717797887081348,
    "c": -6.0,
    "d": -5.464101615137754,
    "b b": 8.041867201114753,
}

# Response "b". Contributions: (2, -2, 3, 3) . write * 2 / sqrt(19) of the embedding (-1, -1, 1, 1) and of the
# writes (0, 0, 0, -2), (0, 0, 0, 0), (2, 0, 0, 0), (0, 0, 3, 2), that is 6, -6, 0, 4, 15 times 0.458831; they
# and the bias add up to the reward. Lens, every depth by its own norm: (-1, -1, 1, 1) gives 6 - 2,
# (-1, -1, 1, -1) gives 0 - 2, and the last is the reward.
EXPECTED_CONTRIBUTIONS: dict[str, float] = {
    "embed": 2.7529888064467407,
    "L0.attn": -2.7529888064467407,
    "L0.mlp": 0.0,
    "L1.attn": 1.835325870964494,
    "L1.mlp": 6.882472016116853,
    "bias": -2.0,
}
EXPECTED_LENS: tuple[float, ...] = (4.0, -2.0, 6.717797887081348)

_EMBEDDINGS: dict[str, tuple[int, int, int, int]] = {
    "<pad>": (1, 1, 1, 1),
    "<bos>": (-1, 1, 1, 1),
    "<end>": (-1, -1, 1, 1),
    "a": (1, 1, 1, 1),
    "b": (1, -1, -1, 1),
    "c": (-1, 1, -1, 1),
    "d": (1, -1, 1, 1),
}
_SPECIALS = ("<pad>", "<bos>", "<end>")
_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ ' ' + m['content'] }}{% endfor %}"
    "{% if not add_generation_prompt %}{{ ' ' + eos_token }}{% endif %}"
)

# Rows are outputs. Both heads read the same v; the columns of `o_proj` are head 0's two, then head 1's two.
_ZERO = [[0] * 4] * 4
_WEIGHTS: dict[str, list] = {
    "model.embed_tokens.weight": list(_EMBEDDINGS.values()),
    "model.layers.0.input_layernorm.weight": [1, 2, 3, 2],
    "model.layers.0.self_attn.q_proj.weight": _ZERO,
    "model.layers.0.self_attn.k_proj.weight": _ZERO[:2],
    "model.layers.0.self_attn.v_proj.weight": [[0, 0, 0, 1], [0, 0, 0, 0]],
    "model.layers.0.self_attn.o_proj.weight": [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [-2, 0, 1, 0]],
    "model.layers.0.post_attention_layernorm.weight": [1, 1, 2, 1],
    "model.layers.0.mlp.gate_proj.weight": [[1, 0, 0, 0], [0, 0, 0, 1]],
    "model.layers.0.mlp.up_proj.weight": [[0, 0, 1, 0], [1, 1, 0, 0]],
    "model.layers.0.mlp.down_proj.weight": [[0, 5], [0, 0], [-1, 0], [0, 0]],
    "model.layers.1.input_layernorm.weight": [1, 1, 2, 1],
    "model.layers.1.self_attn.q_proj.weight": _ZERO,
    "model.layers.1.self_attn.k_proj.weight": _ZERO[:2],
    "model.layers.1.self_attn.v_proj.weight": [[0, 0, 1, 0], [0, 1, 0, 0]],
    "model.layers.1.self_attn.o_proj.weight": [[2, 0, 0, 0], [0, 0, 0, 4], [0, 0, 0, 0], [0, 0, 0, 0]],
    "model.layers.1.post_attention_layernorm.weight": [2, 1, 1, 3],
    "model.layers.1.mlp.gate_proj.weight": [[1, 1, 0, 0], [0, -1, 0, 0]],
    "model.layers.1.mlp.up_proj.weight": [[0, 0, 1, 0], [1, 0, 0, 0]],
    "model.layers.1.mlp.down_proj.weight": [[0, 0], [0, 0], [3, 0], [0, 1]],
    "model.norm.weight": [1, 2, 3, 1],
    "score.weight": [[2, -1, 1, 3]],
    "score.bias": [-2],
}


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; the template is `<bos> prompt response <end>`. Any other word is a "d"."""
    words = {word: i for i, word in enumerate(_EMBEDDINGS)}
    backend = Tokenizer(models.WordLevel(vocab=words, unk_token="d"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in _SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<end>",
        padding_side="right",
        chat_template=_TEMPLATE,
    )


def micro_model() -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """The model of the module's docstring and its tokenizer."""
    config = LlamaConfig(
        vocab_size=len(_EMBEDDINGS),
        hidden_size=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=2,
        intermediate_size=2,
        hidden_act="relu",
        rms_norm_eps=0.0,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        num_labels=1,
    )
    with torch.random.fork_rng(devices=[]):
        module = LlamaForSequenceClassification(config)
        module.score = nn.Linear(4, 1)  # Hugging Face's head has no bias; published reward models do
    module.load_state_dict({name: torch.tensor(rows, dtype=torch.float32) for name, rows in _WEIGHTS.items()})
    return module.eval(), _tokenizer()
