"""The bundled preference pairs keep the promises that examples and tests build on."""

import itertools
import json
import re
from collections import Counter
from importlib.resources import files

import pytest

from reward_lens.model.demo import demo_tokenizer

SUBSETS = {
    "helpfulness",
    "correctness",
    "safety",
    "honesty_under_pressure",
    "instruction_following",
    "conciseness",
    "formatting",
    "confidence",
}
FIELDS = {"id", "prompt", "chosen", "rejected", "subset", "edit", "rationale"}
MARKUP = re.compile(r"<\||\|>|</?s>|\[/?INST\]|<start_of_turn>|<end_of_turn>")


def load():
    text = files("reward_lens").joinpath("assets/pairs.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


PAIRS = load()
MINIMAL = [pair for pair in PAIRS if pair["edit"] == "minimal"]
FREE = [pair for pair in PAIRS if pair["edit"] == "free"]
each_pair = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair["id"])
each_minimal_pair = pytest.mark.parametrize("pair", MINIMAL, ids=lambda pair: pair["id"])


def messages(pair):
    prompt = pair["prompt"]
    return prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]


def prompt_text(pair):
    return "\n".join(message["content"] for message in messages(pair))


def words(text):
    return set(re.findall(r"[a-z0-9]+", text.lower()))


def changed_words(pair):
    """Words of both sides between their common beginning and their common end."""
    chosen, rejected = pair["chosen"].split(), pair["rejected"].split()
    while chosen and rejected and chosen[0] == rejected[0]:
        chosen, rejected = chosen[1:], rejected[1:]
    while chosen and rejected and chosen[-1] == rejected[-1]:
        chosen, rejected = chosen[:-1], rejected[:-1]
    return chosen, rejected


def response_tokens(tokenizer, pair, side):
    """(tokens of the response, tokens of the whole text), as the chat template renders them.

    The response is not tokenized alone: its first and last tokens could merge with the template around it.
    """
    start = len(tokenizer.apply_chat_template(messages(pair), tokenize=False, add_generation_prompt=True))
    turns = [*messages(pair), {"role": "assistant", "content": pair[side]}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    end = start + len(pair[side])
    assert text[start:end] == pair[side]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    inside = [span for span in encoded["offset_mapping"] if span[0] < end and span[1] > start]
    assert inside[0][0] == start and inside[-1][1] == end, "a token straddles the edge of the response"
    return len(inside), len(encoded["input_ids"])


@pytest.fixture(scope="module")
def tokenizer():
    return demo_tokenizer()


def test_eight_subsets_of_six_or_more_pairs():
    counts = Counter(pair["subset"] for pair in PAIRS)
    assert set(counts) == SUBSETS
    assert min(counts.values()) >= 6
    assert len(PAIRS) >= 48


def test_ids_and_prompts_are_unique():
    assert len({pair["id"] for pair in PAIRS}) == len(PAIRS)
    assert len({prompt_text(pair) for pair in PAIRS}) == len(PAIRS)


def test_no_two_prompts_are_nearly_the_same():
    for a, b in itertools.combinations(PAIRS, 2):
        left, right = words(prompt_text(a)), words(prompt_text(b))
        assert len(left & right) / len(left | right) < 0.5, (a["id"], b["id"])


@each_pair
def test_fields_are_complete_and_clean(pair):
    assert set(pair) == FIELDS
    assert pair["id"].startswith(pair["subset"] + "-")
    assert pair["edit"] in {"minimal", "free"}
    assert pair["chosen"] != pair["rejected"]
    assert pair["rationale"] and "\n" not in pair["rationale"]
    for text in (prompt_text(pair), pair["chosen"], pair["rejected"], pair["rationale"]):
        assert text and text == text.strip()
        assert text.isascii()
        assert not MARKUP.search(text)


@each_pair
def test_a_prompt_ends_with_a_user_turn(pair):
    roles = [message["role"] for message in messages(pair)]
    assert roles == ["user" if i % 2 == 0 else "assistant" for i in range(len(roles))]
    assert roles[-1] == "user"


def test_at_least_half_are_minimal_and_three_in_each_subset():
    assert len(MINIMAL) >= len(PAIRS) / 2
    counts = Counter(pair["subset"] for pair in MINIMAL)
    assert all(counts[subset] >= 3 for subset in SUBSETS)


@each_minimal_pair
def test_a_minimal_edit_is_one_short_phrase(pair):
    for side in changed_words(pair):
        assert 1 <= len(side) <= 12


def test_length_does_not_give_the_chosen_free_response_away():
    longer = sum(len(pair["chosen"].split()) > len(pair["rejected"].split()) for pair in FREE)
    assert 0.4 <= longer / len(FREE) <= 0.6


@each_minimal_pair
def test_minimal_edits_have_equal_token_counts(tokenizer, pair):
    assert response_tokens(tokenizer, pair, "chosen") == response_tokens(tokenizer, pair, "rejected")


def test_the_set_is_cheap_to_run(tokenizer):
    counts = [response_tokens(tokenizer, pair, side) for pair in PAIRS for side in ("chosen", "rejected")]
    assert all(10 <= response <= 120 for response, _ in counts)
    assert sum(whole for _, whole in counts) < 9000
