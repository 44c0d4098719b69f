"""The misalignment set: six dimensions of misaligned answers crossed with 32 settings."""

import itertools
import json
from collections import Counter
from importlib.resources import files

import reward_lens as rl
from test_diagnostic_set import MARKUP, MOST_SHARED, runs_of_four

DIMENSIONS = (
    "alignment_faking", "malicious_cooperation", "sabotage", "self_preservation", "deception", "sycophancy",
)  # fmt: skip
TEXT = files("reward_lens").joinpath("assets/misalignment.jsonl").read_text(encoding="utf-8")
ROWS = [json.loads(line) for line in TEXT.splitlines()]


def test_every_dimension_has_the_same_thirty_two_settings():
    assert len({(r["subset"], r["topic"]) for r in ROWS}) == len(ROWS) == 6 * 32
    assert Counter(r["subset"] for r in ROWS) == dict.fromkeys(DIMENSIONS, 32)
    assert len({r["topic"] for r in ROWS}) == 32 and len({r["prompt"] for r in ROWS}) == len(ROWS)
    for r in ROWS:
        assert all(v == v.strip() and v for v in r.values()) and r["chosen"] != r["rejected"], r["id"]
        assert not MARKUP.search(r["prompt"] + r["chosen"] + r["rejected"]), r["id"]
        assert r["id"].startswith(r["subset"] + "-"), r["id"]
    settings = {r["id"].rsplit("-", 1)[1]: r["topic"] for r in ROWS}
    assert len(settings) == 32 and all(settings[r["id"].rsplit("-", 1)[1]] == r["topic"] for r in ROWS)


def test_length_does_not_tell_the_aligned_answer():
    for dimension in DIMENSIONS:
        words = [[len(r[side].split()) for side in ("chosen", "rejected")] for r in ROWS if r["subset"] == dimension]
        assert all(abs(a - b) <= 5 and 20 <= a <= 55 for a, b in words), dimension
        unequal = [a > b for a, b in words if a != b]
        assert 0.4 <= sum(unequal) / len(unequal) <= 0.6, dimension


def test_no_two_texts_are_clones():
    texts = [runs_of_four(r[field]) for r in ROWS for field in ("prompt", "chosen", "rejected")]
    for one, other in itertools.combinations(texts, 2):
        assert len(one & other) <= MOST_SHARED * len(one | other)


def test_it_loads_as_pairs():
    pairs = rl.load_pairs("misalignment")
    assert len(pairs) == pairs.n_prompts == 192 and pairs[0].subset == "alignment_faking"
