"""Texts and pairs of the demo reward model: reading, rendering, splitting and batching.

A *text* is one conversation with its response, rendered by the tokenizer's own chat template and tokenised
once; the reward is read at its last token. A *pair* names two texts by index, so a response that several
pairs share (the reference response of every AlpacaEval prompt) is run once a batch, not once a pair.
"""

import json
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

CAP = 2048  # positions; what is over is cut from the left, where the prompt is
HH_TRAINING_ROWS = 2000  # rows of hh_harmless_test.jsonl that are for training; the rest is a test set


@dataclass
class Texts:
    """Token ids of every distinct rendering, and the length of each one's response in tokens."""

    tokenizer: object
    ids: list = field(default_factory=list)
    response_tokens: list = field(default_factory=list)
    cut: int = 0
    _known: dict = field(default_factory=dict)

    def add(self, prompt, response):
        """Index of the text `prompt` + `response`; a text seen before keeps its index."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        rendered = self.tokenizer.apply_chat_template(
            [*messages, {"role": "assistant", "content": response}], tokenize=False
        )
        if rendered in self._known:
            return self._known[rendered]
        ids = self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        self.cut += len(ids) > CAP
        self._known[rendered] = len(self.ids)
        self.ids.append(ids[-CAP:])
        self.response_tokens.append(len(self.tokenizer(response, add_special_tokens=False)["input_ids"]))
        return self._known[rendered]


@dataclass(frozen=True)
class Pair:
    chosen: int
    rejected: int
    source: str
    prompt: str  # the first user turn: the cluster of bootstraps and of the validation split
    subset: str


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]


def first_turn(prompt):
    return prompt if isinstance(prompt, str) else next(m["content"] for m in prompt if m["role"] == "user")


def pairs_of(rows, texts, source):
    return [
        Pair(
            texts.add(row["prompt"], row["chosen"]),
            texts.add(row["prompt"], row["rejected"]),
            source,
            first_turn(row["prompt"]),
            row["subset"],
        )
        for row in rows
        if row["chosen"] != row["rejected"]
    ]


def training_pairs(folder, texts, seed, off_topic):
    """(training, validation) pairs; validation is the pairs of 60 AlpacaEval prompts and 150 HH first turns.

    `off_topic` = pairs a prompt (AlpacaEval, HH) that are added to training: their rejected response
    answers another prompt of the same source, the one of 64 drawn whose length is nearest to the chosen
    one's, so that length does not tell them apart.
    """
    draw = random.Random(seed)
    rows = {
        "alpaca": read(Path(folder) / "alpaca_eval_train.jsonl"),
        "hh": read(Path(folder) / "hh_harmless_test.jsonl")[:HH_TRAINING_ROWS],
    }
    training, validation = [], []
    for source, held_out, added in (("alpaca", 60, off_topic[0]), ("hh", 150, off_topic[1])):
        prompts = sorted({first_turn(row["prompt"]) for row in rows[source]})
        held = set(draw.sample(prompts, held_out))
        kept = [row for row in rows[source] if first_turn(row["prompt"]) not in held]
        training += pairs_of(kept, texts, source)
        validation += pairs_of([r for r in rows[source] if first_turn(r["prompt"]) in held], texts, source)
        training += off_topic_pairs(kept, texts, source, added, draw)
    return training, validation


def off_topic_pairs(rows, texts, source, per_prompt, draw):
    by_prompt = {}
    for row in rows:
        by_prompt.setdefault(first_turn(row["prompt"]), []).append(row)
    made = []
    whole, part = int(per_prompt), per_prompt % 1
    for prompt, own in sorted(by_prompt.items()):
        for _ in range(whole + (draw.random() < part)):
            row = draw.choice(own)
            others = [r for r in draw.choices(rows, k=64) if first_turn(r["prompt"]) != prompt]
            near = min(others, key=lambda r: abs(len(r["chosen"]) - len(row["chosen"])))
            made.append(
                Pair(
                    texts.add(row["prompt"], row["chosen"]),
                    texts.add(row["prompt"], near["chosen"]),
                    source,
                    prompt,
                    "off_topic",
                )
            )
    return made


def length_class(pair, texts):
    """+1 the chosen response is the longer one in tokens, -1 the shorter one, 0 as long."""
    a, b = texts.response_tokens[pair.chosen], texts.response_tokens[pair.rejected]
    return (a > b) - (a < b)


def pair_weights(pairs, texts, balance):
    """One weight a pair, mean 1: within a source, a length class of n pairs gets n ** -balance.

    balance = 0 leaves the data as they are; balance = 1 gives longer-chosen and shorter-chosen pairs the
    same total.
    """
    key = [(p.source, p.subset == "off_topic", length_class(p, texts)) for p in pairs]
    n = Counter(key)
    raw = [(n[k] ** -balance) if k[2] and not k[1] else 0.0 for k in key]
    # equal lengths and off-topic pairs carry no length signal: they get the mean weight of their source
    for source in {p.source for p in pairs}:
        rows = [i for i, p in enumerate(pairs) if p.source == source]
        mean = sum(raw[i] for i in rows) / max(1, sum(raw[i] > 0 for i in rows))
        for i in rows:
            raw[i] = (raw[i] or mean) / mean
    return raw


def batches(pairs, size, seed, epoch):
    """Lists of pair indices in an order drawn per epoch; pairs of one prompt share responses and stay together."""
    draw = random.Random(f"{seed}-{epoch}")
    groups = {}
    for i, p in enumerate(pairs):
        groups.setdefault((p.source, p.prompt), []).append(i)
    order = sorted(groups)
    draw.shuffle(order)
    made, now = [], []
    for key in order:
        members = groups[key][:]
        draw.shuffle(members)
        for i in members:
            now.append(i)
        if len(now) >= size:
            made.append(now)
            now = []
    return made + ([now] if now else [])


def packs(indices, lengths, budget):
    """Split text indices into groups of like length, each at most `budget` positions with its padding."""
    made, now = [], []
    for i in sorted(indices, key=lambda i: (lengths[i], i)):
        if now and lengths[i] * (len(now) + 1) > budget:
            made.append(now)
            now = []
        now.append(i)
    return made + ([now] if now else [])
