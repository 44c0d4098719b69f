"""The search of `exploits`: suffixes that are text, rewards that are counted, and steps along gradients.

A step runs some of the texts with a gradient at the suffix's positions (keys and values before them are computed in the
same pass, and are shared by the candidates), ranks all exchanges of one token not tried before, scores the best and a
draw of the next best on these texts, the finalists on all, and moves if the mean reward rises.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reward_lens.engine.continuations import rewards_after
from reward_lens.engine.gradients import gradients
from reward_lens.engine.runs import common_start
from reward_lens.errors import CheckFailed, DataError
from reward_lens.methods.observation.embedding_paths import VOCABULARY_ROWS, entering_block_0
from reward_lens.model.prefix import NO_PREFIX, KeyValues, keys_and_values
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.sites import Site
from reward_lens.model.tokens import Tokens
from reward_lens.model.vocabulary import Vocabulary

SCREENED = 12
"""Texts on which a step takes gradients and scores all its candidates."""
FINALISTS = 4
"""Candidates of a step that are scored on all texts."""
TRIES = 500
"""Draws of a random suffix before the search gives up."""

Suffix = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Text:
    """A response to a prompt, that suffixes are appended to."""

    prompt: str
    """The prompt's key."""
    messages: list[dict[str, str]]
    response: str

    def tokens(self, rm: RewardModel, suffix: str = "") -> Tokens:
        """The conversation with `suffix` behind the response."""
        return rm.tokenizer.conversation(self.messages, self.response + suffix, rm.truncation)


class Meter:
    """Scores texts and counts them."""

    def __init__(self, rm: RewardModel, budget: int, progress: Callable[[int, int], None] | None):
        self.rm, self.budget, self.progress = rm, budget, progress
        self.used = 0

    def rewards(self, tokens: Sequence[Tokens]) -> np.ndarray:
        """Rewards of the texts; equal ones are run, and counted, once."""
        self.count(len({t.ids for t in tokens}))
        return self.rm.rewards(tokens).double().numpy()

    def count(self, texts: int) -> None:
        """Note that so many texts are being run."""
        if self.used + texts > self.budget:
            raise CheckFailed(
                "The search has run past its budget",
                found=f"{self.used} texts run and {texts} more to run",
                expected=f"at most {self.budget}",
                do="this is a fault of the library: please report it with your call",
            )
        self.used += texts
        if self.progress is not None:
            self.progress(self.used, self.budget)


class Suffixes:
    """Suffixes of `length` tokens that are read back as themselves behind every one of `texts`."""

    def __init__(self, rm: RewardModel, texts: Sequence[Text], length: int):
        self.rm, self.texts, self.length = rm, texts, length
        self.vocabulary = Vocabulary(rm.tokenizer, min(len(rm.tokenizer.hf), rm.config.get_text_config().vocab_size))
        self.pool = np.array(self.vocabulary.readable(), dtype=int)
        self.left_out = 0
        """Suffixes that came up and were not read back as themselves."""

    def text(self, suffix: Suffix) -> str:
        return self.vocabulary.texts([suffix])[0]

    def stands(self, tokens: Tokens, suffix: Suffix) -> bool:
        """Whether the response ends in exactly these tokens."""
        own = [tokens.ids[i] for i in tokens.response]
        return tuple(own[-len(suffix) :]) == suffix

    def behind(self, suffix: Suffix) -> list[Tokens] | None:
        """Every text with the suffix; None, and counted, where it is not read back as itself."""
        text, out = self.text(suffix), []
        for one in self.texts:
            out.append(one.tokens(self.rm, text))
            if not self.stands(out[-1], suffix):
                self.left_out += 1
                return None
        return out

    def random(self, rng: np.random.Generator) -> Suffix:
        """A suffix of tokens drawn at random."""
        for _ in range(TRIES):
            suffix = tuple(rng.choice(self.pool, self.length).tolist()) if len(self.pool) else ()
            if suffix and self.behind(suffix) is not None:
                return suffix
        raise DataError(
            "No suffix is read back as the tokens it was made of",
            found=f"{TRIES} draws of {self.length} from {len(self.pool)} tokens, none of which stands behind all "
            f"{len(self.texts)} responses",
            expected="tokens whose text the tokenizer reads as these tokens, whatever the response ends in",
            do="use a smaller n_tokens, or look for responses that end in white space or half a word",
        )

    def describe(self, suffix: Suffix) -> dict:
        """The suffix for a result's `meta`."""
        pieces = self.vocabulary.texts([[i] for i in suffix])
        return {"text": self.text(suffix), "ids": list(suffix), "pieces": pieces}


def step_cost(texts: int, candidates: int) -> int:
    """Texts that a step with so many candidates runs, at most."""
    screened = min(SCREENED, texts)
    return screened * (1 + candidates) + min(FINALISTS, candidates) * (texts - screened)


class Search:
    """The walk from a random suffix to a better one."""

    def __init__(self, suffixes: Suffixes, meter: Meter, before: np.ndarray, candidates: int, rng: np.random.Generator):
        self.suffixes, self.meter, self.candidates, self.rng = suffixes, meter, candidates, rng
        self.rm = suffixes.rm
        keys = [text.prompt for text in suffixes.texts]
        self.weights = np.array([1 / keys.count(key) for key in keys]) / len(set(keys))
        self.best = suffixes.random(rng)
        self.tokens: list[Tokens] = suffixes.behind(self.best) or []
        self.trace = [{"passes": meter.used, "reward": float(before @ self.weights), "suffix": ""}]
        self.rewards = meter.rewards(self.tokens)
        self.gap, self.backward = 0.0, 0
        self.tried = {self.best}
        self._note()

    def run(self, until: int) -> None:
        """Take steps until another one would run more than `until` texts in all, or no exchange is left to try."""
        while (room := self._affordable(until - self.meter.used)) > 0 and self._step(room):
            self._note()

    def _affordable(self, left: int) -> int:
        """Candidates that a step may have."""
        fits = (n for n in range(self.candidates, 0, -1) if step_cost(len(self.tokens), n) <= left)
        return next(fits, 0)

    def _step(self, count: int) -> bool:
        """Whether there was anything to try."""
        everywhere = np.arange(len(self.tokens))
        screened = np.sort(self.rng.permutation(everywhere)[:SCREENED])
        others = np.setdiff1d(everywhere, screened)
        slopes, known = self._gradients(screened)
        drawn = list(self._exchanges(slopes, count))
        if not drawn:
            return False
        suffixes, read = zip(*drawn, strict=True)
        rewards = np.empty((len(read), len(self.tokens)))
        for i, keys in zip(screened, known, strict=True):
            texts = [tokens[i] for tokens in read]
            self.meter.count(len(texts))
            shared = keys.first(min(len(keys), common_start(self.tokens[i], *texts)))
            rewards[:, i] = rewards_after(self.rm, shared, texts).double().numpy()
        finalists = np.argsort(-rewards[:, screened].mean(1), kind="stable")[:FINALISTS]
        for k in finalists:
            if len(others):
                rewards[k, others] = self.meter.rewards([read[k][i] for i in others])
        means = rewards[finalists] @ self.weights
        winner = int(finalists[np.argmax(means)])
        if means.max() > self.rewards @ self.weights:
            self.best, self.tokens, self.rewards = suffixes[winner], read[winner], rewards[winner]
        return True

    def _gradients(self, screened: np.ndarray) -> tuple[Float[Tensor, "token d"], list[KeyValues]]:
        """Mean slope at each of the suffix's positions, and every text's keys and values before the suffix."""
        slopes, known = [], []
        for i in screened:
            text = self.tokens[i]
            at = text.response.stop - self.suffixes.length
            self.meter.count(1)
            self.backward += 1
            with torch.no_grad():
                keys = keys_and_values(self.rm.trunk, text, at) if at and self.rm.reuses_prefix(text) else NO_PREFIX
            found = gradients(self.rm, text, [Site("embed")], len(keys), keys)
            own = found.slopes[Site("embed")]
            slope = own.new_zeros(self.suffixes.length, own.shape[1])
            seen = own[at - len(keys) : text.response.stop - len(keys)]  # no further than the reward position
            slope[: len(seen)] = seen
            slopes.append(slope)
            known.append(keys)
            gap = abs(found.reward - self.rewards[i]) / self.rm.effect_scale(float(self.rewards[i]))
            self.gap = max(self.gap, float(gap))
        return torch.stack(slopes).mean(0), known

    def _exchanges(self, slopes: Float[Tensor, "token d"], count: int) -> Iterator[tuple[Suffix, list[Tokens]]]:
        """Up to `count` new suffixes that differ in one token, with the texts they stand in: half of them those that
        the slopes rank highest, since the ranking is of first order the others drawn from those that come next."""
        ranked = list(itertools.islice(self._ranked(slopes), len(self.best) * self.candidates))
        first = (count + 1) // 2
        order = [*range(first), *(first + self.rng.permutation(max(0, len(ranked) - first)))]
        found = 0
        for suffix in (ranked[k] for k in order if k < len(ranked)):
            self.tried.add(suffix)
            texts = self.suffixes.behind(suffix)
            if texts is not None:
                yield suffix, texts
                found += 1
            if found == count:
                return

    def _ranked(self, slopes: Float[Tensor, "token d"]) -> Iterator[Suffix]:
        """Suffixes not yet tried that differ in one token, from the best of each position down."""
        by_gain = np.argsort(-self._gains(slopes), axis=1, kind="stable")
        for rank in by_gain.T:
            for t, token in enumerate(self.suffixes.pool[rank].tolist()):
                suffix = (*self.best[:t], token, *self.best[t + 1 :])
                if suffix not in self.tried:
                    yield suffix

    def _gains(self, slopes: Float[Tensor, "token d"]) -> Float[np.ndarray, "token pool"]:
        """First-order change of the mean reward for every token of the pool, up to a constant a position."""
        pool = torch.from_numpy(self.suffixes.pool)
        blocks = []
        for some in pool.split(VOCABULARY_ROWS):
            entering = entering_block_0(self.rm, some[:, None])[:, 0]
            blocks.append((slopes.to(entering) @ entering.T).double().cpu())
        return torch.cat(blocks, 1).numpy()

    def _note(self) -> None:
        suffix = self.suffixes.text(self.best)
        reward = float(self.rewards @ self.weights)
        self.trace.append({"passes": self.meter.used, "reward": reward, "suffix": suffix})
