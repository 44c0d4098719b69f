"""Which pairs the standard analysis asks its questions of."""

import published_heads
import reward_lens as rl
from families import tiny_model
from language_models import PAIR_JUDGE, tiny_language_model
from reward_lens.analysis import SHOWN, halves, questions, spread_over_subsets
from reward_lens.data import by_prompt


def pairs_of(*prompts: str) -> rl.Pairs:
    return rl.Pairs([rl.Pair(p, f"yes {i}", f"no {i}", subset=p[0]) for i, p in enumerate(prompts)], "here")


def test_no_prompt_is_in_both_halves():
    """Rows of one prompt that stand side by side, or once in either half of the file, are of one part."""
    for prompts in (("a", "a", "b", "b", "c", "c", "d", "d"), ("a", "b", "c", "d", "a", "b", "c", "d")):
        first, second = halves(pairs_of(*prompts))
        assert {p.prompt for p in first} == {"a", "c"} and {p.prompt for p in second} == {"b", "d"}
        assert len(first) == len(second) == 4 and first.source == "here"
    inside, outside = by_prompt(pairs_of("a", "b", "c"), {pairs_of("b")[0].prompt_key})
    assert [p.prompt for p in inside] == ["b"] and [p.id for p in outside] == ["1", "3"]


def test_pairs_are_spread_over_subsets_and_then_over_prompts():
    chosen = spread_over_subsets(pairs_of("a1", "a2", "b1", "b2", "b3", "c1"), 4)
    assert [p.prompt for p in chosen] == ["a1", "a2", "b1", "c1"]
    same = spread_over_subsets(pairs_of("a1", "a1", "a1", "a2", "a3", "b1"), 4)
    assert [p.prompt for p in same] == ["a1", "a2", "a3", "b1"]
    assert len(spread_over_subsets(pairs_of("a1", "a1"), 6)) == 2


def test_a_judge_of_pairs_and_a_gated_head_are_asked_what_only_they_have(tmp_path):
    module, tokenizer = tiny_language_model("llama")
    judge = rl.RewardModel(module, tokenizer, readout=rl.VocabReadout("A", "B", template=PAIR_JUDGE))
    gated, plain = rl.load(published_heads.save(tmp_path, "armo")), rl.RewardModel(*tiny_model("llama"))
    pairs = pairs_of("a", "b")
    for rm, own in ((judge, "pair_judge"), (gated, "gate_weights"), (plain, None)):
        ask = questions(rm, pairs, rm.score_pairs(pairs))
        assert {"pair_judge", "gate_weights"} & set(ask) == ({own} if own else set())
        if own:
            assert own in rl.write_report([ask[own]()], tmp_path / f"{own}.html").read_text(encoding="utf-8")


def test_tokens_are_read_of_as_many_pairs_as_a_page_shows(monkeypatch):
    """A table of tokens is as wide as the longest text: of 10,000 pairs it has gigabytes, of which a page shows few."""
    asked = []
    monkeypatch.setattr(rl, "token_attribution", lambda rm, pairs, **_: asked.append(len(pairs)), raising=False)
    rm = rl.RewardModel(*tiny_model("llama"))
    scores = rm.score_pairs(pairs_of("a"))
    for n in (48, 1_000):
        questions(rm, pairs_of(*(f"a{i}" for i in range(n))), scores)["tokens_prefix"]()
    assert asked == [48, SHOWN]
