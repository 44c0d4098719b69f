"""The diagnostic set: 12 dimensions of 40 prompts, balanced in length, without clones."""

import itertools
import json
import re
from collections import Counter
from importlib.resources import files

import pytest

import reward_lens as rl
from reward_lens.model.demo import demo_tokenizer

DIMENSIONS = {
    "helpfulness", "correctness", "safety", "refusal_quality", "factuality", "instruction_following", "code",
    "arithmetic", "verbosity", "sycophancy", "formatting", "confidence",
}  # fmt: skip
FIELDS = {"id", "subset", "prompt", "chosen", "rejected", "rationale"}
MARKUP = re.compile(r"<\||\|>|</?s>|\[/?INST\]|<start_of_turn>|<end_of_turn>")
MOST_SHARED = 0.3  # of the runs of four words of two texts


def rows() -> list[dict[str, str]]:
    text = files("reward_lens").joinpath("assets/diagnostic.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


ROWS = rows()


def runs_of_four(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 4]) for i in range(max(1, len(words) - 3))}


def test_every_dimension_has_forty_prompts_of_its_own():
    assert Counter(r["subset"] for r in ROWS) == dict.fromkeys(DIMENSIONS, 40)
    assert len({r["prompt"] for r in ROWS}) == len(ROWS) == len({r["id"] for r in ROWS}) == 480
    for r in ROWS:
        assert set(r) == FIELDS and all(v == v.strip() and v for v in r.values()), r["id"]
        assert r["chosen"] != r["rejected"] and "\n" not in r["rationale"], r["id"]
        assert not MARKUP.search(r["prompt"] + r["chosen"] + r["rejected"]), r["id"]


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_no_two_pairs_are_clones(field):
    where: dict[tuple[str, ...], list[int]] = {}
    texts = [runs_of_four(r[field]) for r in ROWS]
    for i, text in enumerate(texts):
        for run in text:
            where.setdefault(run, []).append(i)
    shared = Counter(pair for some in where.values() for pair in itertools.combinations(some, 2))
    for (i, j), count in shared.items():
        share = count / len(texts[i] | texts[j])
        assert share <= MOST_SHARED, (ROWS[i]["id"], ROWS[j]["id"], share)


def test_length_says_little_about_the_label():
    tokenizer = demo_tokenizer()
    for dimension in sorted(DIMENSIONS):
        some = [r for r in ROWS if r["subset"] == dimension]
        lengths = [[len(tokenizer(r[side])["input_ids"]) for side in ("chosen", "rejected")] for r in some]
        longer, shorter = sum(a > b for a, b in lengths), sum(a < b for a, b in lengths)
        assert 40 - longer - shorter >= 20, dimension
        assert 0.4 <= longer / (longer + shorter) <= 0.6, (dimension, longer, shorter)


def test_it_loads_like_any_other_set():
    pairs = rl.load_pairs("diagnostic")
    assert len(pairs) == 480 and {p.subset for p in pairs} == DIMENSIONS and not pairs.notes
