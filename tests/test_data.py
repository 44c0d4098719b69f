"""Preference data: what is read, what is refused and in which words, and what is reported."""

import csv
import dataclasses
import json
import pickle
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_lens.data import (
    Group,
    Pair,
    Pairs,
    StyleItem,
    as_messages,
    as_pairs,
    inputs_hash,
    load_groups,
    load_pairs,
    load_style_items,
)
from reward_lens.data.concepts import load_concepts
from reward_lens.data.counts import load_counts
from reward_lens.errors import DataError

ROW = {"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "Seven."}
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Name a colour."},
]


def answer(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def write(tmp_path):
    """Write rows (or a line as it is) to a JSONL file and give its path."""

    def writer(*rows, name="pairs.jsonl"):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return writer


# Pair, Group, StyleItem


def test_a_string_prompt_is_one_user_turn():
    pair = Pair("Hello", "a", "b")
    assert pair.prompt == "Hello"
    assert pair.messages == [{"role": "user", "content": "Hello"}]
    assert pair.responses == ("a", "b")
    assert pair.prompt_key == Pair([{"role": "user", "content": "Hello"}], "c", "d").prompt_key
    assert as_messages("Hello") == pair.messages


def test_a_conversation_is_read_with_its_roles():
    assert Pair("Hello", "a", "b").prompt_text == Pair([{"role": "user", "content": "Hello"}], "a", "b").prompt_text
    assert Pair("Hello", "a", "b").prompt_text == "Hello"
    turns = [{"role": r, "content": c} for r, c in (("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?"))]
    pair = Pair([*turns, {"role": "user", "content": "More"}], "a", "b")
    assert pair.prompt_text == "system: Be brief.\n\nuser: Hi\n\nassistant: Yes?\n\nuser: More"


def test_messages_come_back_equal_and_cannot_be_changed_from_outside():
    given_turns = [dict(turn) for turn in TURNS]
    pair = Pair(tuple(given_turns), "a", "b")
    given_turns[0]["content"] = "changed"
    pair.prompt.append(answer("changed"))
    pair.messages[0]["content"] = "changed"
    assert pair.prompt == pair.messages == TURNS


def test_a_pair_is_frozen_hashable_picklable_and_replaceable():
    pair = Pair(TURNS, "a", "b", id=7, subset="s")
    assert pair.id == "7"
    assert {pair: 1}[Pair(TURNS, "a", "b", "7", "s")] == 1
    assert pickle.loads(pickle.dumps(pair)) == pair
    assert dataclasses.replace(pair, chosen="c").prompt == TURNS
    with pytest.raises(dataclasses.FrozenInstanceError):
        pair.chosen = "c"


def test_prompt_key_does_not_change_between_processes():
    code = "from reward_lens.data import Pair; print(Pair('Hello', 'a', 'b').prompt_key)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == Pair("Hello", "x", "y").prompt_key


def test_importing_data_imports_nothing_heavy():
    code = "import sys, reward_lens.data, reward_lens.stats; print(*sys.modules)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "datasets", "pyarrow", "pandas", "scipy", "statsmodels"}
    assert not heavy & set(other.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ((3, "a", "b"), "'prompt'"),
        (("p", None, "b"), "'chosen'"),
        (("p", "a", ["b"]), "'rejected'"),
        (([], "a", "b"), "'prompt'"),
        ((TURNS[:3], "a", "b"), "a last message by 'assistant'"),
        (([{"role": "user"}], "a", "b"), "'prompt[0].content'"),
        (([{"role": "user", "content": 3}], "a", "b"), "'prompt[0].content'"),
        ((["Hello"], "a", "b"), "'prompt[0]'"),
        (([{**TURNS[1], "tool_calls": ["x"]}], "a", "b"), "tool_calls"),
        (("p", "a", "b", 1.5), "'id'"),
        (("p", "a", "b", "i", ["s"]), "'subset'"),
    ],
)
def test_a_pair_of_anything_but_text_is_refused(arguments, field):
    with pytest.raises(DataError) as error:
        Pair(*arguments)
    assert field in str(error.value)


def test_a_message_key_without_a_value_is_no_key():
    turn = {**TURNS[1], "tool_calls": None}  # how Parquet fills keys that other rows have
    assert Pair([turn], "a", "b").messages == [TURNS[1]]


def test_a_lone_surrogate_is_refused_with_field_and_index():
    with pytest.raises(DataError, match=r"'chosen'.*U\+D83D, at character index 2"):
        Pair("p", "ab\ud83d", "c")
    with pytest.raises(DataError, match=r"'prompt\[0\]\.content'.*U\+DE00, at character index 0"):
        Pair([{"role": "user", "content": "\ude00"}], "a", "b")
    assert Pair("p", "\U0001f600\0", "b").chosen == "\U0001f600\0"


def test_group_labels_ties_and_best():
    assert Group("p", ["a", "b", "c"]).best() == (0,)
    group = Group("p", ["a", "b", "c"], [0.5, 1, 1])
    assert group.labels == (0.5, 1.0, 1.0) and group.best() == (1, 2)
    assert hash(group) == hash(Group("p", ("a", "b", "c"), (0.5, 1, 1)))


@pytest.mark.parametrize(
    ("responses", "labels", "words"),
    [
        (["a"], None, "two or more responses"),
        ("ab", None, "a list of texts"),
        (["a", 2], None, r"'responses\[1\]'"),
        (["a", "b"], [1], "2 finite numbers"),
        (["a", "b"], [1, float("nan")], "2 finite numbers"),
        (["a", "b"], "10", "2 finite numbers"),
        (["a", "\udc00"], None, r"'responses\[1\]'.*U\+DC00"),
    ],
)
def test_a_malformed_group_is_refused(responses, labels, words):
    with pytest.raises(DataError, match=words):
        Group("p", responses, labels)


def test_style_items_have_three_responses_a_side():
    item = StyleItem("p", ["a", "b", "c"], ["d", "e", "f"])
    assert item.styles == ("concise", "detailed", "markdown")
    assert item.responses == tuple("abcdef")
    with pytest.raises(DataError, match=r"'rejected'.*2 response.*three responses"):
        StyleItem("p", ["a", "b", "c"], ["d", "e"])


# Pairs


def test_pairs_is_a_sequence_and_slices_to_pairs():
    pairs = Pairs([Pair("p", "a", "b"), Pair("q", "a", "b", id="x"), Pair("p", "c", "d")], "here")
    assert [pair.id for pair in pairs] == ["1", "x", "3"]
    part = pairs[1:]
    assert isinstance(part, Pairs) and list(part) == [pairs[1], pairs[2]] and part.source == "here"
    assert len(pairs) == 3 and pairs.n_prompts == 2 and pairs[-1] in pairs
    assert repr(pairs).splitlines()[0] == "<Pairs 3 from here, prompts 2>"


def test_a_split_keeps_prompts_and_order():
    pairs = Pairs([Pair(f"p{i % 10}", "a", f"b{i}") for i in range(30)], "here")
    parts = pairs.split(0.3, 0.5)
    assert [part.n_prompts for part in parts] == [3, 5, 2] and [len(part) for part in parts] == [9, 15, 6]
    assert not {p.prompt for p in parts[0]} & {p.prompt for p in parts[1]} and parts[0].source == "here"
    assert sorted(int(p.id) for part in parts for p in part) == list(range(1, 31))
    assert all([int(p.id) for p in part] == sorted(int(p.id) for p in part) for part in parts)
    assert [list(part) for part in pairs.split(0.3, 0.7)] == [list(parts[0]), [p for p in pairs if p not in parts[0]]]
    assert list(pairs.split(0.3, 0.5)[0]) == list(parts[0]) != list(pairs.split(0.3, 0.5, seed=1)[0])
    for shares in ((), (0.0,), (0.6, 0.6), (0.01,), (1.0, 0.5), (float("nan"),), (-0.5,)):
        with pytest.raises(DataError, match="cannot be split so"):
            pairs.split(*shares)


def test_what_is_odd_is_kept_and_noted():
    pairs = Pairs(
        [
            Pair("p", "a", "b", id="x"),
            Pair("p", "a", "b", id="x"),
            Pair("q", " \n", "b", id="y"),
            Pair("r", "same", "same", id="x"),
        ]
    )
    assert [pair.id for pair in pairs] == ["x", "x#2", "y", "x#3"]
    assert pairs.notes == (
        "empty or blank response: 1 (y)",
        "chosen equal to rejected: 1 (x#3)",
        "same texts as an earlier pair: 1 (x#2)",
        "id used before (a number was appended): 2 (x, x)",
        "repeated prompts: 4 pairs, different prompts 3",
    )
    assert Pairs([Pair("p", "a", "b"), Pair("q", "a", "b")]).notes == ()


def test_invented_ids_do_not_collide_with_given_ones():
    pairs = Pairs([Pair("p", "a", "b", id="2"), Pair("q", "a", "b"), Pair("r", "a", "b", id="2#2")])
    assert [pair.id for pair in pairs] == ["2", "2#2", "2#2#2"]


def test_an_id_that_every_row_has_takes_no_longer_a_row():
    started = time.process_time()
    pairs = Pairs(Pair(f"{i}", "a", "b", id="same") for i in range(6_000))
    assert pairs[-1].id == "same#6000"
    assert time.process_time() - started < 2.5  # 0.2 s; 6 where every row tries all numbers again


def test_as_pairs_takes_a_pair_an_iterable_or_pairs():
    pair = Pair("p", "a", "b")
    pairs = as_pairs(pair)
    assert list(pairs) == [dataclasses.replace(pair, id="1")]
    assert as_pairs(pairs) is pairs
    assert len(as_pairs(pair for _ in range(3))) == 3
    with pytest.raises(DataError, match="no pairs to work on"):
        as_pairs([])
    with pytest.raises(DataError, match=r"'pairs\[1\]'.*dict.*rl.load_pairs"):
        as_pairs([pair, ROW])
    with pytest.raises(DataError, match="an rl.Pair"):
        as_pairs(3)
    for name in ("pairs.jsonl", Path("pairs.jsonl")):
        with pytest.raises(
            DataError, match=r"'pairs' cannot be used.*read the file first: rl.load_pairs\('pairs.jsonl'\)"
        ):
            as_pairs(name)


def test_inputs_hash_follows_the_texts_alone():
    base = [Pair("p", "a", "b"), Pair("q", "a", "b")]
    assert inputs_hash(base) == inputs_hash([Pair("p", "a", "b", "id", "s"), base[1]])
    others = [base[::-1], base[:1], [Pair("p", "ab", ""), base[1]], [Pair("p", "b", "a"), base[1]]]
    assert len({inputs_hash(items) for items in [base, *others]}) == 5
    assert len(inputs_hash([Group("p", ["a", "b"]), StyleItem("p", list("abc"), list("def"))])) == 16


# Reading


def test_jsonl_with_ids_subsets_and_columns_of_no_interest(write):
    path = write({**ROW, "id": 31, "subset": "chat", "chosen_model": "m"}, "", {**ROW, "prompt": TURNS})
    pairs = load_pairs(path)
    assert list(pairs) == [Pair(**ROW, id="31", subset="chat"), Pair(**{**ROW, "prompt": TURNS}, id="2")]
    assert pairs.source == str(path)
    assert len(load_pairs(path, limit=1)) == 1


def test_the_demo_is_bundled():
    pairs = load_pairs("demo")
    assert pairs.source == "demo" and len(pairs) >= 48 and pairs.n_prompts == len(pairs)


def test_a_json_array_counts_rows_and_json_lines_are_understood(tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([ROW, {**ROW, "chosen": None}], indent=2))
    with pytest.raises(DataError, match=r"pairs\.json, row 2: the field 'chosen'.*null"):
        load_pairs(path)
    path.write_text(json.dumps(ROW) + "\n" + json.dumps(ROW))
    assert len(load_pairs(path)) == 2


def test_parquet_keeps_messages_and_names_the_row(tmp_path):
    path = tmp_path / "pairs.parquet"
    rows = [{**ROW, "prompt": TURNS}, {**ROW, "prompt": TURNS, "chosen": None}]
    pd.DataFrame(rows[:1]).to_parquet(path)
    assert load_pairs(path)[0].messages == TURNS
    pd.DataFrame(rows).to_parquet(path)
    with pytest.raises(DataError, match=r"pairs\.parquet, row 2: the field 'chosen'"):
        load_pairs(path)
    path.write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="a Parquet file"):
        load_pairs(path)


def test_csv_cells_may_hold_messages_as_json(tmp_path):
    path = tmp_path / "pairs.csv"
    rows = [
        {"prompt": json.dumps(TURNS), "chosen": "a", "rejected": "", "id": ""},
        {"prompt": '[{"not": "messages"}]', "chosen": "[1, 2", "rejected": "b", "id": "x"},
    ]
    pd.DataFrame(rows).to_csv(path, index=False)
    first, second = load_pairs(path)
    assert first.messages == TURNS and first.rejected == "" and first.id == "1"
    assert second.prompt == '[{"not": "messages"}]' and second.chosen == "[1, 2"
    assert load_pairs(path).notes == ("empty or blank response: 1 (1)",)


def test_csv_of_messages_as_python_prints_them_is_refused(tmp_path):
    path = tmp_path / "pairs.csv"
    pd.DataFrame([{**ROW, "prompt": TURNS}]).to_csv(path, index=False)
    with pytest.raises(DataError, match=r"row 1, 'prompt'.*json\.dumps"):
        load_pairs(path)


def test_csv_reads_long_cells_and_leaves_the_csv_module_as_it_was(tmp_path):
    path, long = tmp_path / "pairs.csv", "word " * 50_000
    path.write_text(f"prompt,chosen,rejected\np,{long},b\n")
    before = csv.field_size_limit()
    assert load_pairs(path)[0].chosen == long
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompt,chosen,rejected\na,b,c\na,b\n", "row 2.*2 cells.*3 cells, as in the header"),
        ('prompt,chosen,rejected\na,b,"c\n', "line 2.*unexpected end of data"),
        ("prompt,chosen\na,b\n", r"row 1: the field 'rejected'.*no such column \(columns: prompt, chosen\)"),
        ("prompt,chosen,chosen,rejected\na,b,c,d\n", "header.*columns of one name: chosen"),
        ("prompt;chosen;rejected\na, b;c, d;e\n", "row 1.*3 cells.*1 cells.*separate the columns by commas"),
        ("prompt,chosen,rejected\n", "no rows"),
        ("", "no rows"),
    ],
)
def test_malformed_csv_is_refused(tmp_path, text, words):
    path = tmp_path / "pairs.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=words):
        load_pairs(path)


# TRL's conversational form and RewardBench


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": TURNS, "chosen": [answer("Blue.")], "rejected": [answer("Seven.")]},
        {"chosen": [*TURNS, answer("Blue.")], "rejected": [*TURNS, answer("Seven.")]},
        {"prompt": TURNS, "chosen": [*TURNS, answer("Blue.")], "rejected": [*TURNS, answer("Seven.")]},
        {"prompt": None, "chosen": [*TURNS, answer("Blue.")], "rejected": [*TURNS, answer("Seven.")]},
    ],
)
def test_conversational_forms_give_the_same_pair(write, row):
    assert load_pairs(write(row))[0] == Pair(TURNS, "Blue.", "Seven.", id="1")


def test_a_string_prompt_beside_whole_conversations(write):
    talk = [{"role": "user", "content": "p"}]
    row = {"prompt": "p", "chosen": [*talk, answer("a")], "rejected": [*talk, answer("b")]}
    assert load_pairs(write(row))[0] == Pair("p", "a", "b", id="1")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"chosen": [TURNS[1], answer("a")], "rejected": [TURNS[3], answer("b")]},
            "differ in their last turn only",
        ),
        (
            {"prompt": "other", "chosen": [*TURNS, answer("a")], "rejected": [*TURNS, answer("b")]},
            "not the prompt",
        ),
        ({"chosen": [answer("a")], "rejected": [answer("b")]}, "'prompt'"),
        ({"chosen": TURNS, "rejected": TURNS}, "a last message by 'user'.*by 'assistant'"),
        ({"chosen": [TURNS[0], answer("a")], "rejected": [TURNS[0], answer("b")]}, "'prompt'.*by 'system'"),
        ({"prompt": "p", "chosen": [answer("a")], "rejected": "b"}, "'rejected'"),
        (
            {"prompt": "p", "chosen": [answer("\ud800")], "rejected": [answer("b")]},
            r"'chosen\[0\]\.content'.*U\+D800",
        ),
    ],
)
def test_conversations_that_are_no_pair_are_refused(write, row, words):
    with pytest.raises(DataError, match=rf"pairs\.jsonl, line 1: .*{words}"):
        load_pairs(write(row))


def test_arguments_of_a_chat_template_are_noted(write):
    """TRL gives these columns to the template: what a trainer scored is another text than prompt and response."""
    tools = [{"type": "function", "function": {"name": "look_up"}}]
    rows = [
        ROW,
        {**ROW, "chosen": "c", "tools": tools},
        {**ROW, "chosen": "d", "chat_template_kwargs": {"think": True}},
    ]
    notes = load_pairs(write(*rows)).notes
    assert "tools or chat_template_kwargs, which the chat template is not given: 2 rows: line 2, line 3" in notes
    assert not any("tools" in note for note in load_pairs(write({**ROW, "tools": None})).notes)


def test_whole_texts_without_a_prompt_are_refused_with_what_to_do(write):
    with pytest.raises(DataError, match=r"'prompt'.*no such column.*split off what both begin with"):
        load_pairs(write({"chosen": "Is it? Yes.", "rejected": "Is it? No."}))


def test_lists_of_strings_point_to_the_right_loader(write):
    row = {"prompt": "p", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"], "id": "k"}
    path = write(row, row)
    with pytest.raises(DataError, match="line 1: the field 'chosen'.*load_style_items.*load_groups"):
        load_pairs(path)
    items = load_style_items(path)
    assert items[0] == StyleItem("p", tuple("abc"), tuple("def"), id="k")
    assert [item.id for item in items] == ["k", "k#2"]


def test_groups_from_labels_and_from_reward_bench_two(write):
    path = write(
        {"prompt": "p", "responses": ["a", "b"], "labels": [0.2, 0.8]},
        {"prompt": "q", "chosen": ["a"], "rejected": ["b", "c"], "subset": "Ties"},
        {"prompt": TURNS, "responses": ["a", "b"]},
    )
    first, second, third = load_groups(path)
    assert first.labels == (0.2, 0.8) and first.best() == (1,) and first.id == "1"
    assert second == Group("q", ("a", "b", "c"), (1.0, 0.0, 0.0), id="2", subset="Ties")
    assert third.labels is None and third.messages == TURNS
    with pytest.raises(DataError, match="line 1: the field 'labels'"):
        load_groups(write({"prompt": "p", "responses": ["a", "b"], "labels": [1]}))


# Files that cannot be read


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "p", ', r"line 3 cannot be read.*column 1"),
        ("[1, 2]", "line 3: the field 'row'.*list.*an object with named fields"),
        ("9" * 5000, "line 3 cannot be read.*digits"),
        ('{"prompt": "p", "chosen": "a"}', r"line 3: the field 'rejected'.*\(columns: prompt, chosen\)"),
        ('{"prompt": "p", "chosen": 4, "rejected": "b"}', "line 3: the field 'chosen'.*int 4"),
        ('{"prompt": "p", "chosen": "x\\ud800", "rejected": "b"}', r"line 3: .*'chosen'.*U\+D800.*index 1"),
        ('{"prompt": "p\\udfff", "chosen": "a", "rejected": "b"}', r"line 3: .*'prompt'.*U\+DFFF"),
    ],
)
def test_a_bad_line_is_named(write, line, words):
    with pytest.raises(DataError, match=rf"pairs\.jsonl, {words}"):
        load_pairs(write(ROW, "", line))


def test_json_that_nests_too_deep_is_refused(write):
    with pytest.raises(DataError, match="line 1 cannot be read"):
        load_pairs(write("[" * 200_000))


def test_invalid_utf8_is_refused_with_its_offset(tmp_path):
    path = tmp_path / "pairs.jsonl"
    good = json.dumps(ROW).encode() + b"\n"
    path.write_bytes(b"\xef\xbb\xbf" + good + b'{"prompt": "\xff"}')
    with pytest.raises(DataError, match=rf"line 2 .*byte 0xff at byte offset {len(good) + 15}\."):
        load_pairs(path)
    path.write_bytes(b"\xef\xbb\xbf" + good)
    assert load_pairs(path)[0] == Pair(**ROW, id="1")


def test_the_sets_of_pairs_are_named_where_pairs_are_read(tmp_path):
    for read, named in ((load_pairs, True), (load_counts, False), (load_concepts, False)):
        with pytest.raises(DataError, match="nothing at that path") as caught:
            read(tmp_path / "none.csv")
        assert ("'demo'" in caught.value.expected) is named


def test_a_missing_file_an_unknown_kind_and_a_folder(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl cannot.*nothing at that path.*\.parquet.*org/name"):
        load_pairs(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="nothing at that path"):
        load_pairs("data/pairs.jsonl")  # a path that could pass for a hub id
    (tmp_path / "pairs.txt").write_text("x")
    with pytest.raises(DataError, match=r"a file ending in '\.txt'"):
        load_pairs(tmp_path / "pairs.txt")
    with pytest.raises(DataError, match="Found: a folder.*name a file in the folder"):
        load_pairs(tmp_path)


def test_a_folder_that_datasets_saved(tmp_path):
    rows = datasets.Dataset.from_list([ROW, {**ROW, "prompt": "other"}])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "two")
    assert [p.prompt for p in load_pairs(tmp_path / "one")] == [ROW["prompt"], "other"]
    assert [p.prompt for p in load_pairs(tmp_path / "two", split="test")] == ["other"]
    with pytest.raises(DataError, match="the splits train, test.*pass split="):
        load_pairs(tmp_path / "two")
    for folder, found in (("one", "without splits"), ("two", "the splits train, test")):
        with pytest.raises(DataError, match=f"split='dev'.*{found}"):
            load_pairs(tmp_path / folder, split="dev")


def test_empty_files_limits_and_splits(write):
    with pytest.raises(DataError, match="no rows.*at least one row"):
        load_pairs(write("", ""))
    path = write(ROW)
    with pytest.raises(DataError, match="limit=0"):
        load_pairs(path, limit=0)
    with pytest.raises(DataError, match="split='train'.*a file.*which has splits"):
        load_pairs(path, split="train")


# The hub, through a stand-in for `datasets.load_dataset`


def test_a_hub_id_goes_through_datasets(monkeypatch):
    asked = []

    def load_dataset(name, split=None):
        asked.append((name, split))
        rows = datasets.Dataset.from_list([{**ROW, "id": 5, "subset": "s"}, {**ROW, "id": 6, "subset": "s"}])
        parts = datasets.DatasetDict({"raw": rows, "filtered": rows})
        return parts[split] if split else parts

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    pairs = load_pairs("org/name", split="raw", limit=1)
    assert list(pairs) == [Pair(**ROW, id="5", subset="s")] and pairs.source == "org/name"
    with pytest.raises(DataError, match="the splits raw, filtered.*pass split="):
        load_pairs("org/name")
    assert asked == [("org/name", "raw"), ("org/name", None)]


def test_data_sets_in_memory_and_saved_folders(tmp_path):
    turns = [{"role": "user", "content": "Is it?"}]
    said = {"chosen": "a", "rejected": "b"}
    row = {side: [*turns, {"role": "assistant", "content": text}] for side, text in said.items()}
    rows = datasets.Dataset.from_list([row, row])
    parts = datasets.DatasetDict({"train": rows, "test": rows})
    pair = Pair(turns, "a", "b", id="1")
    for source in (rows, [row], rows.to_iterable_dataset(), datasets.DatasetDict({"train": rows})):
        pairs = load_pairs(source, limit=1)
        assert list(pairs) == [pair] and pairs.source == f"a {type(source).__name__}"
    assert list(load_pairs(rows.to_pandas(), limit=1)) == [pair]  # whose messages are arrays
    assert [p.subset for p in load_pairs(pd.DataFrame([ROW, {**ROW, "subset": "s"}]))] == [None, "s"]
    with pytest.raises(DataError, match="a DataFrame cannot be read. Found: Arrow.*columns of one type each"):
        load_pairs(pd.DataFrame([{**ROW, "chosen": 3}, ROW]))
    rows.save_to_disk(tmp_path / "rows")
    parts.save_to_disk(tmp_path / "parts")
    assert list(load_pairs(tmp_path / "rows", limit=1)) == [pair]
    for source in (parts, tmp_path / "parts"):
        assert list(load_pairs(source, split="test", limit=1)) == [pair]
        with pytest.raises(DataError, match="the splits train, test.*pass split="):
            load_pairs(source)
        with pytest.raises(DataError, match="the splits train, test.*pass split="):
            load_pairs(source, split="none")
    with pytest.raises(DataError, match="split='test' cannot be read.*leave split out"):
        load_pairs(rows, split="test")
    with pytest.raises(DataError, match="a Dataset, row 1: the field 'chosen'.*columns: prompt"):
        load_pairs(datasets.Dataset.from_list([{"prompt": "p"}]))
    (tmp_path / "rows" / "state.json").unlink()
    with pytest.raises(DataError, match="rows cannot be read.*a folder that save_to_disk wrote"):
        load_pairs(tmp_path / "rows")


def test_a_hub_row_is_named_and_a_hub_error_is_told(monkeypatch):
    rows = datasets.DatasetDict({"train": datasets.Dataset.from_list([ROW, {**ROW, "chosen": None}])})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split=None: rows)
    with pytest.raises(DataError, match="org/name, row 2: the field 'chosen'"):
        load_pairs("org/name")

    def fails(name, split=None):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(DataError, match="org/name cannot be read.*ConnectionError: no route.*hub login"):
        load_pairs("org/name")


# Any text comes back as it was

ODD = [
    "",
    "\0",
    "a\r\nb\rc\n",
    '"quoted", and\ttabs',
    "\u2028\u2029\x85",
    "\U0001f9d1\u200d\U0001f680",
    "NA",
    "\ufeff",
]
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(ODD)
row = st.fixed_dictionaries({"prompt": text, "chosen": text, "rejected": text})


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(row, min_size=1, max_size=4), ascii_only=st.booleans())
def test_any_text_survives_every_format(tmp_path_factory, rows, ascii_only):
    folder = tmp_path_factory.mktemp("any")
    lines = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    (folder / "pairs.jsonl").write_text(lines, encoding="utf-8", newline="")
    (folder / "pairs.json").write_text(json.dumps(rows), encoding="utf-8")
    pd.DataFrame(rows).to_parquet(folder / "pairs.parquet")
    with open(folder / "pairs.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "chosen", "rejected"], quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
    expected = [Pair(**row, id=str(number)) for number, row in enumerate(rows, start=1)]
    for kind in ("jsonl", "json", "parquet", "csv"):
        assert list(load_pairs(folder / f"pairs.{kind}")) == expected


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=20))
def test_any_string_is_taken_or_refused_for_its_surrogate(text):
    try:
        assert Pair("p", text, "b").chosen == text
        text.encode("utf-8")
    except DataError as error:
        assert "surrogate" in str(error)
        with pytest.raises(UnicodeEncodeError):
            text.encode("utf-8")


def test_labels_that_contradict_each_other_and_blank_prompts_are_noted():
    pairs = Pairs([Pair("p", "a", "b"), Pair("p", "b", "a"), Pair(" ", "a", "b"), Pair("p", "c", "c")])
    assert "an earlier pair with the preference the other way round: 1 (2)" in pairs.notes
    assert "empty or blank prompt: 1 (3)" in pairs.notes and len(pairs.notes) == 4


def test_a_transcript_as_prompt_is_noted():
    pairs = Pairs([Pair("\n\nHuman: Hi\n\nAssistant:", "a", "b"), Pair("Human beings", "a", "b")])
    assert pairs.notes == ("a transcript (Human: ...) as prompt, taken as one user turn: 1 (1)",)


def test_a_prompt_that_stands_in_the_responses_too_is_noted():
    pairs = Pairs(
        [Pair("Is it?", "Is it? Yes.", "\nIs it? No."), Pair("Is it?", "Is it? Yes.", "No."), Pair("", "a", "b")]
    )
    assert "both responses begin with the prompt, which the model is given before them: 1 (1)" in pairs.notes


def test_a_prompt_column_that_is_only_the_last_turn_says_what_to_do(write):
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
             {"role": "user", "content": "three"}]  # fmt: skip
    row = {side: [*turns, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    with pytest.raises(DataError, match="leave out the column prompt"):
        load_pairs(write({**row, "prompt": "three"}))
    assert load_pairs(write(row))[0].messages == turns
