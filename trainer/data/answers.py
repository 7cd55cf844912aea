"""From preferences to shards of tokens: the two answers of each are kept, cut or left out together."""

from collections.abc import Iterator, Sequence

import numpy as np

from trainer.data.counts import Counts
from trainer.data.encode import Encoded, Encoder, Ids, LabelMask, Reading
from trainer.data.making import notice_columns, notice_text
from trainer.data.preferences import Preference
from trainer.data.rows import Row
from trainer.data.shards import Array, Shard, join_examples

AnswersToFit = Sequence[Encoded]


def shard_of_preferences(encoder: Encoder, chunk: list[Preference], reading: Reading) -> Shard:
    """The answers of some preferences, two documents each, and what was noticed about them."""
    counts = Counts()
    usable = []
    rows: list[Row] = []
    for preference in chunk:
        if preference.part == 0:
            counts.rows += 1
            notice_columns(counts, preference.unused, preference.number)
        if preference.left_out:
            counts.notice(preference.left_out, preference.number)
            continue
        usable.append(preference)
        rows += preference.answers
        first_row = preference.answers[0]
        if first_row.messages:
            counts.notice("chat", preference.number)
    encoded = encoder.examples(rows)
    kept: list[tuple[Ids, LabelMask]] = []
    numbers: list[int] = []
    desirable: list[bool] = []
    margins: list[float] = []
    for preference in usable:
        answers = _next_answers(encoded, preference)
        first = answers[0]
        opening = encoder.opening(first.ids)
        fitting = Fitting(answers, opening, reading)
        fate = fitting.fate
        _notice_answers(counts, fitting.learned, preference.number, fate)
        if fate in ("dropped", "empty"):
            continue
        fitted = fitting.fitted()
        kept += fitted
        count = len(fitted)
        numbers += [preference.number] * count
        desirable += [preference.desirable] * count
        margins += [preference.margin] * count
    return join_examples(kept, numbers, counts, desirable, margins)


def _next_answers(encoded: Iterator[tuple[object, list[Encoded]]], preference: Preference) -> list[Encoded]:
    """The answers of a preference, from a stream of the examples of all answers."""
    answers = []
    for _ in preference.answers:
        _, examples = next(encoded)
        answers += examples
    return answers


class Fitting:
    """Two answers to one prompt that are to fit into `max_tokens`, of which the prompt gives up its beginning.

    The same tokens are cut from both, so that both go on from one prompt; `opening` control tokens in front stay. A
    neighbour's answer, which nobody learns, loses its end instead of ruling what is cut.
    """

    def __init__(self, answers: AnswersToFit, opening: int, reading: Reading) -> None:
        self._answers = answers
        self._opening = opening
        self._max_tokens = reading.max_tokens
        self._drops = reading.too_long == "drop"
        self.learned = answers
        if reading.rows == "judged":
            self.learned = answers[:1]

    @property
    def longest(self) -> int:
        """The tokens of the longest answer that is learned, with its prompt."""
        lengths = [len(answer.ids) for answer in self.learned]
        return max(lengths)

    @property
    def cut(self) -> int:
        """How many tokens the prompt gives up."""
        too_many = self.longest - self._max_tokens
        return max(0, too_many)

    @property
    def cut_place(self) -> tuple[int, int]:
        """Which tokens [start, stop) of the prompt are cut."""
        start = max(1, self._opening)
        return start, start + self.cut

    @property
    def fate(self) -> str | None:
        """What becomes of the answers: truncated prompts, dropped where an answer would be cut, or empty ones."""
        for answer in self._answers:
            if not answer.target.any():
                return "empty"
        if not self.cut:
            return None
        first_learned = []
        for answer in self._answers:
            place = answer.target.argmax()
            first_learned.append(int(place))
        staying = max(1, self._opening)  # the first label is predicted from a token in front of it
        removable = min(first_learned) - staying
        if self._drops or self.cut > removable:
            return "dropped"
        return "truncated"

    def fitted(self) -> list[tuple[Ids, LabelMask]]:
        """Ids and labels of the answers, behind what is left of the prompt."""
        fitted = []
        for answer in self._answers:
            ids = self._without_cut(answer.ids)
            target = self._without_cut(answer.target)
            fitted.append((ids, target))
        return fitted

    def _without_cut(self, whole: Array) -> Array:
        start, stop = self.cut_place
        opening = whole[:start]
        rest = whole[stop:]
        joined = np.concatenate([opening, rest])
        return joined[: self._max_tokens]


def _notice_answers(counts: Counts, answers: AnswersToFit, row: int, fate: str | None) -> None:
    counts.examples += 1
    for answer in answers:
        length = len(answer.ids)
        counts.longest = max(counts.longest, length)
    if fate is not None:
        counts.notice(fate, row)
    for answer in answers:
        notice_text(counts, answer, row)
