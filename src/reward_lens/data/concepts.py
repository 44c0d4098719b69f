"""Texts that show a concept, texts that show its opposite, and neutral ones, over topics that the concepts share.

The topic is the unit of every statistic about concepts: what differs between two concepts on one topic is not the
topic. So a text belongs to one topic, and the same conversation under two of them is refused: it would count twice.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, no_type_check, overload

from reward_lens.arguments import checked_arguments
from reward_lens.data.checks import checked_text, malformed, shown
from reward_lens.data.items import Message, Pair, as_messages
from reward_lens.data.loading import parse_rows
from reward_lens.data.sources import open_rows
from reward_lens.errors import DataError

BUNDLED = "concepts"
NEUTRAL = "neutral"
POLARITIES = ("positive", "negative")
PROMPT = "Please write a few sentences about {topic}."


@no_type_check  # as in `data.items`: a wrong type is a DataError
@dataclasses.dataclass(frozen=True)
class ConceptText:
    """A response that shows a concept on a topic.

    `concept` "neutral" marks a text that shows none. `polarity` is "positive", or "negative" for a text that shows the
    opposite. `prompt` is text or messages; None: a request for a few sentences about the topic. Raises `DataError` for
    anything but text, for blank texts and for a neutral text of negative polarity.
    """

    concept: str
    topic: str
    text: str
    polarity: str = "positive"
    prompt: Any = None
    id: str | None = None

    def __post_init__(self):
        for name in ("concept", "topic", "text", "polarity"):
            if not checked_text(getattr(self, name), name).strip():
                raise malformed(name, "a blank", "a text that says something")
        if self.polarity not in POLARITIES:
            raise malformed("polarity", shown(self.polarity), "'positive' or 'negative'")
        if self.concept == NEUTRAL and self.polarity != "positive":
            raise malformed("polarity", "a neutral text that is negative", "neutral texts without a polarity, or "
                            "'positive'")  # fmt: skip
        _ = self.messages  # checks the prompt

    @functools.cached_property
    def messages(self) -> list[Message]:
        """The prompt as messages, ready for a chat template."""
        return as_messages(PROMPT.format(topic=self.topic) if self.prompt is None else self.prompt)

    @property
    def responses(self) -> tuple[str]:
        """The text."""
        return (self.text,)

    @functools.cached_property
    def prompt_key(self) -> str:
        """A short hash of `messages`."""
        return Pair(self.messages, "", "").prompt_key

    def __hash__(self):
        return hash((self.concept, self.topic, self.text, self.polarity, self.prompt_key))


class ConceptTexts(Sequence):
    """An immutable sequence of `ConceptText`; `source` names where they came from.

    Raises `DataError` for one that is none, for an empty sequence, and where a concept has the same conversation under
    two topics.
    """

    def __init__(self, texts: Iterable, source: str = "memory"):
        self._texts = tuple(texts)
        self.source = source
        seen: dict[tuple, str] = {}
        for index, text in enumerate(self._texts):
            if not isinstance(text, ConceptText):
                do = "build each as ConceptText(concept, topic, text), or read a file with load_concepts"
                raise malformed(f"texts[{index}]", shown(text), "a ConceptText", do=do)
            prompt = None if text.prompt is None else text.prompt_key
            first = seen.setdefault((text.concept, text.polarity, prompt, text.text), text.topic)
            if first != text.topic:
                raise DataError(
                    f"One text of the concept '{text.concept}' stands under two topics",
                    found=f"{shown(text.text)} under '{first}' and '{text.topic}'",
                    expected="different texts for different topics: the topic is the unit of the statistics",
                    do="keep it under one topic",
                )
        if not self._texts:
            raise DataError("There are no concept texts", found="an empty sequence", expected="at least one",
                            do="pass texts, for example load_concepts('concepts')")  # fmt: skip

    @property
    def concepts(self) -> tuple[str, ...]:
        """Names with positive texts, in order of first appearance, without "neutral"."""
        named = (t.concept for t in self._texts if t.polarity == "positive" and t.concept != NEUTRAL)
        return tuple(dict.fromkeys(named))

    @property
    def topics(self) -> tuple[str, ...]:
        """Topics of all texts, sorted."""
        return tuple(sorted({t.topic for t in self._texts}))

    def of(self, polarity: str) -> list[ConceptText]:
        """The texts of the concepts of one polarity, without the neutral ones."""
        return [t for t in self._texts if t.concept != NEUTRAL and t.polarity == polarity]

    @property
    def neutral(self) -> list[ConceptText]:
        """The neutral texts."""
        return [t for t in self._texts if t.concept == NEUTRAL]

    def __len__(self) -> int:
        return len(self._texts)

    @overload
    def __getitem__(self, index: int) -> ConceptText: ...
    @overload
    def __getitem__(self, index: slice) -> "ConceptTexts": ...
    def __getitem__(self, index):
        return ConceptTexts(self._texts[index], self.source) if isinstance(index, slice) else self._texts[index]

    def __repr__(self) -> str:
        sizes = f"{len(self)} from {self.source}, concepts {len(self.concepts)}, topics {len(self.topics)}"
        return f"<ConceptTexts {sizes}, negative {len(self.of('negative'))}, neutral {len(self.neutral)}>"


def as_concept_texts(texts: Any) -> ConceptTexts:
    """`ConceptTexts` from one `ConceptText`, an iterable of them, or `ConceptTexts` (as they are)."""
    if isinstance(texts, ConceptTexts):
        return texts
    if isinstance(texts, ConceptText):
        texts = [texts]
    return ConceptTexts(texts if isinstance(texts, Iterable) and not isinstance(texts, str) else [texts])


@checked_arguments
def load_concepts(path: str | Path = BUNDLED, limit: int | None = None) -> ConceptTexts:
    """Concept texts from ``"concepts"`` (written for this project) or from a .jsonl, .json, .parquet or .csv file.

    Columns: `concept` ("neutral" for neutral texts), `topic`, `text`, and where present `polarity` ("positive", the
    default, or "negative"), `prompt` (text or messages) and `id`; others are ignored. `limit`: the first rows alone.

    Returns `ConceptTexts`. Raises `DataError` naming file, line (row, for parquet, CSV and JSON arrays) and field, and
    where the bundled file is not part of the installation.
    """
    name, source = str(path), path
    if name == BUNDLED:
        source = Path(str(resources.files("reward_lens") / "assets" / "concepts.jsonl"))
        if not source.is_file():
            raise DataError(
                "The bundled concept texts are not installed",
                found=f"no {source.name} among the package's assets",
                expected="a file of one concept text a line",
                do="reinstall the package, or pass the path of a file of your own",
            )
    _, rows = open_rows(source, None, limit)
    return ConceptTexts(parse_rows(name, rows, _concept_text), name)


def _concept_text(row: Mapping) -> ConceptText:
    lacking = [name for name in ("concept", "topic", "text") if row.get(name) is None]
    if lacking:
        raise malformed(lacking[0], "null or no such column", "a value in each row", do="rename or fill the column")
    given = {name: row[name] for name in ("polarity", "prompt", "id") if row.get(name) not in (None, "")}
    return ConceptText(row["concept"], row["topic"], row["text"], **given)
