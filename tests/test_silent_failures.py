"""Ten ways to a wrong reward without an error: each shown with plain transformers, then refused or put right here."""

import logging
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers import AutoModelForSequenceClassification as Classifier
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import reward_lens as rl
from families import CHAT_TEMPLATES, LONG_FROM, tiny_model, tiny_tokenizer

PROMPT, ANSWER = "What is the capital of France?", "The capital is Paris."
LONGER = "I do not know, and I do not care; ask somebody who has been there, or look at a map of the country."
WRONG = 1e-2  # a reward that is off by more is another reward: rounding moves these by 1e-6


@contextmanager
def said():
    """What transformers logs inside, at the level of warnings."""
    words: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: words.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        yield words
    finally:
        logger.removeHandler(handler)


def messages(answer: str = ANSWER, prompt: str = PROMPT) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def written(tokenizer, answer: str = ANSWER, prompt: str = PROMPT) -> list[int]:
    return tokenizer.apply_chat_template(messages(answer, prompt), return_dict=False)


@torch.no_grad()
def plain(module, ids, mask=None, row: int = 0, **options) -> float:
    """The reward of a row of token ids as a caller of the Hugging Face class gets it."""
    ids = torch.tensor(ids).reshape(-1, len(ids) if isinstance(ids[0], int) else len(ids[0]))
    return float(module(input_ids=ids, attention_mask=mask, **options).logits[row, 0])


def padded(tokenizer, side: str, prompt: str = PROMPT) -> tuple[list[list[int]], torch.Tensor]:
    """The short and the long answer in one batch, with the mask that follows from their lengths."""
    rows = [written(tokenizer, answer, prompt) for answer in (ANSWER, LONGER)]
    longest, fill = max(map(len, rows)), tokenizer.pad_token_id
    gaps = [longest - len(row) for row in rows]
    ids = [[fill] * g + row if side == "left" else row + [fill] * g for row, g in zip(rows, gaps, strict=True)]
    ones = [[1] * len(row) for row in rows]
    mask = [[0] * g + o if side == "left" else o + [0] * g for o, g in zip(ones, gaps, strict=True)]
    return ids, torch.tensor(mask)


def test_double_bos():
    """allenai/reward-bench#164, OpenRLHF#393: a rendered template is tokenised with special tokens once more."""
    module, tokenizer = tiny_model("llama")
    rendered = tokenizer.apply_chat_template(messages(), tokenize=False)
    twice, bos = tokenizer(rendered)["input_ids"], tokenizer.bos_token_id
    once = written(tokenizer)
    with said() as words:
        assert twice == [bos, *once] and once[0] == bos
        assert abs(plain(module, twice) - plain(module, once)) > WRONG and not words
    assert rl.RewardModel(module, tokenizer).score(PROMPT, ANSWER) == pytest.approx(plain(module, once), abs=1e-5)
    doubled = tiny_tokenizer(chat_template="{{ bos_token }}" + CHAT_TEMPLATES["markers"])
    with pytest.raises(rl.LoadError, match="no doubled BOS.*the text begins '<bos><bos>.*remove the BOS from the chat"):
        rl.RewardModel(module, doubled)


def test_missing_bos(tmp_path):
    """RLHFlow/RLHF-Reward-Modeling#16: the template writes no BOS, where every other text of the tokenizer has one."""
    bare = tiny_tokenizer(chat_template=CHAT_TEMPLATES["markers"].replace("{{ bos_token }}", ""))
    module, _ = tiny_model("llama", tokenizer=bare)
    ids, bos = written(bare), bare.bos_token_id
    with said() as words:
        assert bare("a text")["input_ids"][0] == bos and ids[0] != bos
        assert abs(plain(module, ids) - plain(module, [bos, *ids])) > WRONG and not words
    wanted = "BOS present.*begins '<.user.>.*own rule '<bos>'.*if the model was trained with it.*add_bos_token=False"
    with pytest.raises(rl.LoadError, match=wanted):
        rl.RewardModel(module, bare)
    module.save_pretrained(tmp_path)
    bare.save_pretrained(tmp_path)
    with pytest.raises(rl.LoadError, match="pass it: rl.load"):
        rl.load(tmp_path)
    bare.add_bos_token = False  # what the message names for a model that was trained without
    assert rl.load(tmp_path, tokenizer=bare).score(PROMPT, ANSWER) == pytest.approx(plain(module, ids), abs=1e-5)


def test_pad_equal_to_eos():
    """transformers#35352, trl#937: a mask made from `ids != pad` hides every end of turn from the model."""
    template = CHAT_TEMPLATES["markers"].replace("<|end|>", "' + eos_token + '")
    tokenizer = tiny_tokenizer(pad="eos", chat_template=template)
    module, _ = tiny_model("llama", tokenizer=tokenizer)
    ids, mask = padded(tokenizer, "right")
    guessed = torch.tensor(ids).ne(tokenizer.pad_token_id).long()
    alone = plain(module, written(tokenizer))
    with said() as words:
        assert abs(plain(module, ids, guessed) - alone) > WRONG and not words
    assert plain(module, ids, mask) == pytest.approx(alone, abs=1e-5)
    rm = rl.RewardModel(module, tokenizer)
    assert "pad == eos" in rm.load_report.value.sel(check="reward position").found.item()
    texts = [(PROMPT, a) for a in (ANSWER, LONGER, f"a{tokenizer.eos_token}b")]
    together = rm.rewards([rm.tokenize(*text) for text in texts]).tolist()
    assert together[0] == pytest.approx(alone, abs=1e-5)
    assert together == pytest.approx([rm.hf_score(*text) for text in texts], abs=1e-5)


def test_left_padding():
    """transformers#24265, #35909: classes that count positions from the first slot score a left-padded text wrong."""
    module, tokenizer = tiny_model("gpt2")
    ids, mask = padded(tokenizer, "left")
    alone = plain(module, written(tokenizer))
    with said() as words:
        assert abs(plain(module, ids, mask) - alone) > WRONG and not words
    tokenizer.padding_side = "left"
    rm = rl.RewardModel(module, tokenizer)
    together = rm.rewards([rm.tokenize(PROMPT, a) for a in (ANSWER, LONGER)])
    assert float(together[0]) == pytest.approx(alone, abs=1e-5)
    padding = rm.load_report.value.sel(check="padding")
    assert float(padding) <= float(padding.tolerance) and "left-padded in a batch" in padding.found.item()


def test_embeddings_as_inputs():
    """Given `inputs_embeds` the class cannot see padding and reads the last slot; it warns once in a process."""
    module, tokenizer = tiny_model("llama")
    ids, mask = padded(tokenizer, "right")
    with torch.no_grad():
        embeddings = module.get_input_embeddings()(torch.tensor(ids))
        given = float(module(inputs_embeds=embeddings, attention_mask=mask).logits[0, 0])
    alone = plain(module, written(tokenizer))
    assert abs(given - alone) > WRONG and plain(module, ids, mask) == pytest.approx(alone, abs=1e-5)
    # Attributions to embeddings change what enters the network at the module itself, so ids and mask are given still.
    rm = rl.RewardModel(module, tokenizer)
    shares = rl.token_attribution(rm, [rl.Pair(PROMPT, ANSWER, LONGER)], method="integrated")
    assert all(check.gap <= check.tolerance for check in shares.checks)


def test_random_head(tmp_path):
    """trl#1379: a language model loads as a classifier with a head of random numbers, and a warning."""
    module, tokenizer = tiny_model("llama")
    AutoModelForCausalLM.from_config(module.config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    scores = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        scores.append(plain(Classifier.from_pretrained(tmp_path, num_labels=1), written(tokenizer)))
    assert abs(scores[0] - scores[1]) > 1e-4
    with pytest.raises(rl.LoadError, match="is a language model, not a reward model.*lacks score.weight.*scores noise"):
        rl.load(tmp_path)
    module.save_pretrained(tmp_path)  # a classifier's checkpoint whose head was lost
    weights = load_file(tmp_path / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(rl.LoadError, match="no trained reward head.*lacks score.weight.*random numbers scores noise"):
        rl.load(tmp_path)


@pytest.mark.parametrize("kept", [False, True])
def test_dropped_head(tmp_path, kept):
    """reward-bench#257: the auto class has no place for the head of a class of its own, so the head is left out."""
    module, tokenizer = tiny_model("llama")
    module.config.architectures = ["LlamaForCostModel"]
    module.config.auto_map = {"AutoModelForSequenceClassification": "modeling_cost.LlamaForCostModel"}
    module.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    extra = {"cost_head.0.weight": torch.randn(4, 32), "cost_head.2.weight": torch.randn(1, 4)}
    save_file({k: v for k, v in weights.items() if kept or k != "score.weight"} | extra,
              tmp_path / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    fallen = Classifier.from_pretrained(tmp_path, trust_remote_code=False)
    assert type(fallen).__name__ == "LlamaForSequenceClassification"
    assert not any("cost_head" in name for name, _ in fallen.named_parameters())
    place = "LlamaForSequenceClassification has no place for its cost_head.0.weight, cost_head.2.weight"
    wanted = f"beside its trunk would be dropped.*{place}" if kept else f"lacks score.weight; {place}"
    with pytest.raises(rl.LoadError, match=wanted):
        rl.load(tmp_path)


class Int8Linear(nn.Module):
    """A linear map in int8 with one scale."""

    def __init__(self, linear):
        super().__init__()
        self.scale = float(linear.weight.detach().abs().max()) / 127
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return x @ (self.weight.to(x) * self.scale).T


def test_quantised_head():
    """unslothai/unsloth#5027: a loader quantises the head along with the trunk, and the reward direction changes."""
    module, tokenizer = tiny_model("llama")
    ids = written(tokenizer)
    exact = plain(module, ids)
    module.score = Int8Linear(module.score)
    with said() as words:
        assert abs(plain(module, ids) - exact) > 1e-3 and not words
    wanted = "head.*is quantised.*score is a Int8Linear with torch.int8 weights.*llm_int8_skip_modules=..score.."
    with pytest.raises(rl.LoadError, match=wanted):
        rl.RewardModel(module, tokenizer)


def test_batch_dependent_score():
    """reward-bench#137: one text, two batches, two scores. Here the rotary factors follow the batch's longest text."""
    module, tokenizer = tiny_model("phi3_longrope")
    ids, mask = padded(tokenizer, "right", "Hi")
    alone = plain(module, written(tokenizer, prompt="Hi"))
    assert len(written(tokenizer, prompt="Hi")) < LONG_FROM < len(ids[0])
    with said() as words:
        assert abs(plain(module, ids, mask) - alone) > WRONG and not words
    rm = rl.RewardModel(module, tokenizer)
    together = rm.rewards([rm.tokenize("Hi", a) for a in (LONGER, ANSWER)])
    assert float(together[1]) == pytest.approx(alone, abs=1e-5) == rm.hf_score("Hi", ANSWER)


def _uncapped(module, query, key, value, attention_mask, softcap=None, **kwargs):
    """A fused attention that takes every argument and knows nothing of a soft cap."""
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def test_soft_cap_under_fused_attention(tmp_path):
    """reward-bench#169: Gemma-2 under sdpa lost its soft cap. transformers 5 refuses sdpa there; a kernel that swallows
    the argument still loses it."""
    module, tokenizer = tiny_model("gemma2")
    ids = written(tokenizer)
    capped = plain(module, ids)
    AttentionInterface.register("uncapped", _uncapped)
    AttentionMaskInterface.register("uncapped", sdpa_mask)
    module.set_attn_implementation("uncapped")
    with said() as words:
        assert abs(plain(module, ids) - capped) > WRONG and not words
    with pytest.raises(
        rl.LoadError, match="failed the test 'attention'.*uncapped against eager.*implementation='eager'"
    ):
        rl.RewardModel(module, tokenizer)
    assert module.config._attn_implementation == "uncapped"  # what was set is left as it was
    module.set_attn_implementation("eager")
    assert rl.RewardModel(module, tokenizer).score(PROMPT, ANSWER) == pytest.approx(capped, abs=1e-5)
    module.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(rl.LoadError, match="could not be loaded.*does not support.*scaled_dot_product_attention"):
        rl.load(tmp_path, attn_implementation="sdpa")


def test_attention_written_out_and_fused_are_compared_on_every_model():
    module, tokenizer = tiny_model("llama")
    row = rl.RewardModel(module, tokenizer).load_report.value.sel(check="attention")
    assert row.found.item() == "sdpa against eager on 2 texts" and 0 < float(row) < float(row.tolerance)
    for family in ("bloom", "falcon"):
        module, tokenizer = tiny_model(family)
        with said() as words:
            row = rl.RewardModel(module, tokenizer).load_report.value.sel(check="attention")
        assert "nothing to hold it against" in row.found.item() and float(row) == 0
        assert not words  # classes that cannot be switched are not asked to
