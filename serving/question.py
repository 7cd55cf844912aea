"""What an evaluation asks of every adapter: to go on with a prompt, to score texts, or both.

A question's key is the digest of all that its answer depends on beside base and adapter, so that an answer that is
kept somewhere can be found again, and is never taken for the answer to another question.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

KEY_SHOWN = 16  # characters of a digest in the name of a file
TokenRange = tuple[int, int]  # the first of some tokens, and the one behind the last


def _range_of(plain: Sequence[int]) -> TokenRange:
    """A range in plain data."""
    first, stop = plain
    return first, stop


@dataclass(frozen=True)
class ScoredText:
    """A text as token ids, and the ranges of it whose log-likelihood is asked; the first token has none."""

    ids: tuple[int, ...]
    ranges: tuple[TokenRange, ...]

    @property
    def start(self) -> int:
        """The first token that is scored."""
        first, _ = self.ranges[0]
        return first

    @property
    def count(self) -> int:
        """How many tokens are scored."""
        count = 0
        for first, stop in self.ranges:
            count += stop - first
        return count

    def total(self, scores: Sequence[float]) -> float:
        """The log-likelihood of what is asked, by the log-probabilities of all tokens from `start` on."""
        total = 0.0
        for first, stop in self.ranges:
            asked = scores[first - self.start : stop - self.start]
            total += sum(asked)
        return total

    @classmethod
    def load(cls, plain: Sequence[Any]) -> "ScoredText":
        """The text in plain data."""
        ids, plain_ranges = plain
        ranges = tuple(map(_range_of, plain_ranges))
        return cls(tuple(ids), ranges)


@dataclass(frozen=True)
class Question:
    """A prompt that is gone on with for at most `new_tokens` (0: not at all), and texts that are scored.

    What is written ends with a token of `stop`, or soon after one of `stop_texts`. At a `temperature` above 0 it is
    drawn, from `seed` alone.
    """

    prompt: tuple[int, ...] = ()
    new_tokens: int = 0
    stop: tuple[int, ...] = ()
    stop_texts: tuple[str, ...] = ()
    texts: tuple[ScoredText, ...] = ()
    temperature: float = 0.0
    seed: int = 0

    @cached_property
    def key(self) -> str:
        """The digest of what is asked."""
        plain = json.dumps(self.dump())
        digest = hashlib.sha256(plain.encode())
        return digest.hexdigest()[:32]

    def dump(self) -> dict[str, Any]:
        """The question as plain data."""
        texts = []
        for text in self.texts:
            texts.append([text.ids, text.ranges])
        plain = {
            "prompt": self.prompt,
            "new_tokens": self.new_tokens,
            "stop": self.stop,
            "stop_texts": self.stop_texts,
            "texts": texts,
        }
        if self.temperature:  # else the key is that of before there were draws
            plain |= {"temperature": self.temperature, "seed": self.seed}
        return plain

    @classmethod
    def load(cls, plain: Mapping[str, Any]) -> "Question":
        """The question in plain data."""
        texts = map(ScoredText.load, plain["texts"])
        return cls(
            prompt=tuple(plain["prompt"]),
            new_tokens=plain["new_tokens"],
            stop=tuple(plain["stop"]),
            stop_texts=tuple(plain["stop_texts"]),
            texts=tuple(texts),
            temperature=plain.get("temperature", 0.0),
            seed=plain.get("seed", 0),
        )


@dataclass(frozen=True)
class AskedTask:
    """Questions that belong together; the key is a digest of how they are made of their data."""

    name: str
    key: str
    questions: tuple[Question, ...]

    @property
    def folder_name(self) -> str:
        """The name of the folder that has its answers."""
        key = self.key[:KEY_SHOWN]
        return f"{self.name}-{key}"

    @classmethod
    def load(cls, plain: Mapping[str, Any]) -> "AskedTask":
        """The task in plain data."""
        name = plain["name"]
        key = plain["key"]
        questions = map(Question.load, plain["questions"])
        return cls(name, key, tuple(questions))
