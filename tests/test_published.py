"""Published preference sets in their own columns, by `load_pairs`, `load_groups` and `load_style_items`."""

import csv
import json

import pytest

import reward_lens as rl

LLMBAR = [
    {"input": "Name a fruit.", "output_1": "An apple.", "output_2": "A chair.", "label": 1},
    {"input": "Name a tool.", "output_1": "A cloud.", "output_2": "A saw.", "label": 2},
]
JUDGEBENCH = [
    {"pair_id": "a", "question": "2 + 2?", "response_A": "5", "response_B": "4", "label": "B>A", "source": "math"},
    {"pair_id": "b", "question": "3 + 3?", "response_A": "6", "response_B": "7", "label": "A>B", "source": "math"},
    {"pair_id": "c", "question": "4 + 4?", "response_A": "8", "response_B": "eight", "label": "A=B", "source": "math"},
]
PREFERENCE = [
    {"split": "train", "prompt": "Say hi.", "response_1": "Hi.", "response_2": "No.", "preference_strength": -2},
    {"split": "train", "prompt": "Say so.", "response_1": "No.", "response_2": "So.", "preference_strength": 1},
    {"split": "train", "prompt": "Say it.", "response_1": "It.", "response_2": "It!", "preference_strength": 0},
]
HELPSTEER3 = [
    {"domain": "code", "language": "python", "context": [{"role": "user", "content": "Print 1."}],
     "response1": "print(2)", "response2": "print(1)", "overall_preference": 3},
]  # fmt: skip
RATINGS = [
    {"prompt": "Name a sea.", "response": "The Baltic.", "helpfulness": 4, "verbosity": 1},
    {"prompt": "Name a sea.", "response": "Water.", "helpfulness": 1, "verbosity": 1},
    {"prompt": "Name a lake.", "response": "Wet.", "helpfulness": 0, "verbosity": 1},
    {"prompt": "Name a lake.", "response": "Lake Como.", "helpfulness": 3, "verbosity": 1},
    {"prompt": "Name a bay.", "response": "Biscay.", "helpfulness": 3, "verbosity": 1},
    {"prompt": "Name a bay.", "response": "Bay of Biscay.", "helpfulness": 3, "verbosity": 1},
]
HH = [
    {"chosen": "\n\nHuman: Hi there\n\nAssistant: Hello.\n\nHuman: A joke?\n\nAssistant: Knock, knock.",
     "rejected": "\n\nHuman: Hi there\n\nAssistant: Hello.\n\nHuman: A joke?\n\nAssistant: No."},
]  # fmt: skip
ULTRAFEEDBACK = [
    {"prompt": "Spell cat.", "prompt_id": "1", "score_chosen": 8.0, "score_rejected": 2.0,
     "chosen": [{"role": "user", "content": "Spell cat."}, {"role": "assistant", "content": "c-a-t"}],
     "rejected": [{"role": "user", "content": "Spell cat."}, {"role": "assistant", "content": "k-a-t"}]},
]  # fmt: skip
REWARDBENCH = [{"prompt": "Add 1 and 1.", "chosen": "2", "rejected": "3", "subset": "math-prm", "id": 7,
                "chosen_model": "human", "rejected_model": "a model"}]  # fmt: skip


def written(folder, rows) -> str:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (LLMBAR, [("Name a fruit.", "An apple.", "A chair."), ("Name a tool.", "A saw.", "A cloud.")]),
        (JUDGEBENCH, [("2 + 2?", "4", "5"), ("3 + 3?", "6", "7")]),
        (PREFERENCE, [("Say hi.", "Hi.", "No."), ("Say so.", "So.", "No.")]),
        (HELPSTEER3, [("Print 1.", "print(1)", "print(2)")]),
        (RATINGS, [("Name a sea.", "The Baltic.", "Water."), ("Name a lake.", "Lake Como.", "Wet.")]),
        (HH, [("A joke?", "Knock, knock.", "No.")]),
        (ULTRAFEEDBACK, [("Spell cat.", "c-a-t", "k-a-t")]),
        (REWARDBENCH, [("Add 1 and 1.", "2", "3")]),
    ],
)
def test_pairs_of_every_form(rows, expected, tmp_path):
    pairs = rl.load_pairs(written(tmp_path, rows))
    assert [(p.messages[-1]["content"], p.chosen, p.rejected) for p in pairs] == expected
    ties = sum(r.get("label") == "A=B" or r.get("preference_strength") == 0 for r in rows) + (rows is RATINGS)
    assert any("without a preference" in note for note in pairs.notes) == bool(ties)


@pytest.mark.parametrize("rows", [LLMBAR, PREFERENCE, RATINGS])
def test_numbers_are_text_in_a_csv_file(rows, tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert list(rl.load_pairs(path)) == list(rl.load_pairs(written(tmp_path, rows)))


def test_the_limit_counts_pairs_and_not_halves_of_them(tmp_path):
    path = written(tmp_path, RATINGS)
    assert [len(rl.load_pairs(path, limit=n)) for n in (1, 2, 3)] == [1, 2, 2]  # the third is a tie
    assert len(rl.load_pairs(written(tmp_path, LLMBAR), limit=1)) == 1


def test_labels_and_earlier_turns_are_kept(tmp_path):
    pairs = rl.load_pairs(written(tmp_path, JUDGEBENCH))
    assert [(p.id, p.subset) for p in pairs] == [("a", "math"), ("b", "math")]
    assert rl.load_pairs(written(tmp_path, HELPSTEER3))[0].subset == "code"
    turns = rl.load_pairs(written(tmp_path, HH))[0].messages
    assert [(t["role"], t["content"]) for t in turns] == [
        ("user", "Hi there"), ("assistant", "Hello."), ("user", "A joke?")]  # fmt: skip


def test_lists_and_styles(tmp_path):
    row = {"prompt": "Q?", "chosen": ["yes"], "rejected": ["no", "perhaps", "why"], "subset": "Ties", "id": "1"}
    (group,) = rl.load_groups(written(tmp_path, [row]))
    assert group.labels == (1.0, 0.0, 0.0, 0.0) and group.subset == "Ties"
    row = {"prompt": "Q?", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"], "domain": "chat", "id": "1"}
    (item,) = rl.load_style_items(written(tmp_path, [row]))
    assert item.subset == "chat"


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([LLMBAR[0] | {"label": 3}], "1 or 2, the better output"),
        ([JUDGEBENCH[0] | {"label": "tie"}], "'A>B' or 'B>A'"),
        ([PREFERENCE[0] | {"preference_strength": None}], "a number"),
        ([PREFERENCE[0] | {"preference_strength": float("nan")}], "float nan.*a number"),
        ([HELPSTEER3[0] | {"overall_preference": float("nan")}], "float nan.*a number"),
        ([RATINGS[0], RATINGS[1] | {"helpfulness": None}], r"list \[4, None\]"),
        ([JUDGEBENCH[0] | {"label": ["A>B"]}], "'A>B' or 'B>A'"),
        (RATINGS[:1], "two responses to the prompt"),
        (RATINGS[1:3], "two responses to the prompt"),
        ([PREFERENCE[2]], "1 rows without a preference"),
        ([{"chosen": "\n\nHuman: Hi", "rejected": "\n\nHuman: Hi"}], "assistant's turn"),
    ],
)
def test_bad_rows_are_named(rows, match, tmp_path):
    with pytest.raises(rl.DataError, match=match) as caught:
        rl.load_pairs(written(tmp_path, rows))
    assert "rows.jsonl" in str(caught.value)
