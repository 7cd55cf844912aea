"""Preferences, read and checked without torch: of two answers to one prompt the better one, or one that was judged.

The prompt of a pair is what both answers have in front. Of two chats it is the turns that are equal; of two
transcripts in the format of HH-RLHF, the text up to the last `Assistant:`. Characters that happen to be equal say
nothing: two answers often begin alike.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from runfolder.objective import RowsRead
from trainer.data.cells import finite_number, is_empty, text_of
from trainer.data.chats import Messages
from trainer.data.files import RowError, SourceName, describe_value, reject
from trainer.data.preference_chats import chat_of, has_turns, last_turn, refuse_beside
from trainer.data.ranked import PairOfColumns, has_list, spread
from trainer.data.rows import ColumnNames, Columns, Row, ShapedRecord, read_rows, row_of, shaped_records
from trainer.data.shapes import JUDGED, PAIRS, PAIRS_WITH_MARGINS, answered_by

_NAMED: PairOfColumns = ("chosen", "rejected")
_TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True, slots=True)
class Preference:
    """The two answers of a row, each as a row of its own: the chosen one first.

    Of an answer that was judged, the other one is a neighbour's answer to the same prompt, which is not learned.
    `titles` say for people which answer is which.
    `margin`: by how much the chosen answer is to lead; `left_out`: why nothing is learned; `part`: which pair it is.
    """

    number: int
    answers: tuple[Row, ...]
    titles: tuple[str, str] = _NAMED
    desirable: bool = True
    margin: float = 0.0
    left_out: str | None = None
    unused: ColumnNames = ()
    part: int = 0


def read_pairs(source: SourceName, columns: Columns | None = None) -> Iterator[Preference]:
    """Stream the pairs of a source, by its columns prompt, chosen and rejected, or of its lists. Raises RowError."""
    for record in shaped_records(source, columns, PAIRS):
        yield from _pairs_of(record)


def read_margins(source: SourceName, columns: Columns | None = None) -> Iterator[Preference]:
    """Stream the pairs of a source, each perhaps with a margin. Raises RowError."""
    for record in shaped_records(source, columns, PAIRS_WITH_MARGINS):
        margin = 0.0
        if "margin" in record.shape.companions:
            margin = _margin(record)
        for pair in _pairs_of(record):
            yield replace(pair, margin=margin)


def read_judged(source: SourceName, columns: Columns | None = None) -> Iterator[Preference]:
    """Stream the judged answers of a source, each with the nearest answer before it to another prompt.

    Those to the first prompt have the next one behind them. Raises RowError.
    """
    stream = map(_judged, shaped_records(source, columns, JUDGED))
    before = None  # the newest answer to another prompt than the one of now
    newest: list[Preference] = []  # to the prompt of now
    for judged in stream:
        if newest and _asked(judged) != _asked(newest[0]):
            if before is None:
                for early in newest:
                    yield _beside(early, judged)
            before = newest[-1]
            newest.clear()
        if before is not None:
            yield _beside(judged, before)
        newest.append(judged)
    if before is None:
        yield from _of_one_prompt(source, newest)


PreferenceReader = Callable[[SourceName, Columns | None], Iterator[Preference]]
PREFERENCES: Mapping[RowsRead, PreferenceReader] = {
    "pairs": read_pairs,
    "margins": read_margins,
    "judged": read_judged,
}


def read_answers(rows: RowsRead, source: SourceName, columns: Columns | None = None) -> Iterator[Row]:
    """Stream all answers of a source, for whichever objective: several of a row follow one another."""
    if rows == "answers":
        yield from read_rows(source, columns)
        return
    read = PREFERENCES[rows]
    for preference in read(source, columns):
        yield from preference.answers


# Pairs


def _pairs_of(record: ShapedRecord) -> Iterator[Preference]:
    """The pair that a record is, or those of its list."""
    if not has_list(record):
        yield _pair_of(record, _NAMED)
        return
    spread_record, pairs = spread(record)
    for part, names in enumerate(pairs):
        yield replace(_pair_of(spread_record, names), part=part)
    if not pairs:
        yield Preference(record.number, (), left_out="tied", unused=record.unused)


def _pair_of(record: ShapedRecord, names: PairOfColumns) -> Preference:
    """The pair of the answers in two columns of a record."""
    better, worse = names
    if has_turns(record, better):
        return _pair_of_chats(record, names)
    if "prompt" not in record.shape.columns:
        return _pair_of_transcripts(record)
    chosen = row_of(record, answered_by(better))
    rejected = row_of(record, answered_by(worse))
    return _pair(record, chosen, rejected)


def _margin(record: ShapedRecord) -> float:
    """By how much the chosen answer of a record is to lead: zero where it does not say."""
    margin = record.fields.get("margin")
    if is_empty(margin):
        return 0.0
    where = f"{record.where}, field margin"
    return finite_number(margin, where)


def _pair(record: ShapedRecord, chosen: Row, rejected: Row) -> Preference:
    """A pair of texts whose prompt was given."""
    left_out = None
    if chosen.completion == rejected.completion:
        left_out = "identical"
    return Preference(record.number, (chosen, rejected), left_out=left_out, unused=record.unused)


def _pair_of_transcripts(record: ShapedRecord) -> Preference:
    """A pair of whole transcripts, each cut before its last reply."""
    refuse_beside(record, "system", "a transcript")
    chosen = _cut_transcript(record, "chosen")
    rejected = _cut_transcript(record, "rejected")
    pair = _pair(record, chosen, rejected)
    chosen_reply = chosen.completion.strip()
    rejected_reply = rejected.completion.strip()
    if chosen.prompt != rejected.prompt:
        return replace(pair, left_out="branched")
    if not chosen_reply or not rejected_reply:
        return replace(pair, left_out="no_reply")
    return pair


def _cut_transcript(record: ShapedRecord, column: str) -> Row:
    """A transcript as its last reply behind all that comes before it."""
    where = f"{record.where}, field {column}"
    value = record.fields.get(column)
    text = text_of(value, where)
    turns = list(_TURN.finditer(text))
    begins = bool(_TURN.match(text))
    if not begins:
        found = describe_value(text)
        allowed = "a transcript that begins with '\\n\\nHuman:'; else give the prompt a column of its own"
        reject(where, found, allowed)
    last = turns[-1]
    speaker = last[1]
    if speaker != "Assistant":
        reject(where, "a last turn of the human", "a transcript whose last turn is the assistant's")
    cut = last.end()
    prompt = text[:cut]
    reply = text[cut:]
    return Row(record.number, prompt, reply)


def _pair_of_chats(record: ShapedRecord, names: PairOfColumns) -> Preference:
    """A pair of chats that are equal up to their last turns."""
    better_column, worse_column = names
    chosen = chat_of(record, better_column)
    rejected = chat_of(record, worse_column)
    *before_chosen, _ = chosen
    *before_rejected, _ = rejected
    left_out = None
    if chosen == rejected:
        left_out = "identical"
    elif before_chosen != before_rejected:
        left_out = "branched"
    better = last_turn(record, chosen)
    worse = last_turn(record, rejected)
    answers = (better, worse)
    return Preference(record.number, answers, left_out=left_out, unused=record.unused)


# Judged answers


def _judged(record: ShapedRecord) -> Preference:
    """An answer that was judged, without its neighbour."""
    desirable = _desirable(record)
    column, *_ = record.shape.columns
    if column != "messages":
        column = "completion"
    if column == "messages" or has_turns(record, column):
        turns = chat_of(record, column)
        answer = last_turn(record, turns)
    else:
        answer = row_of(record, answered_by("completion"))
    answers = (answer,)
    title = "desirable" if desirable else "undesirable"
    titles = (title, "a neighbour's answer, for the baseline")
    return Preference(record.number, answers, titles, desirable, unused=record.unused)


def _asked(judged: Preference) -> tuple[str, Messages]:
    """What is in front of a judged answer."""
    (answer,) = judged.answers
    return answer.prompt, answer.messages[:-1]


def _of_one_prompt(source: SourceName, judged: list[Preference]) -> Iterator[Preference]:
    """Judged answers that all are to one prompt, each with the answer of the row before it (the first: behind it)."""
    if len(judged) == 1:
        raise RowError(f"{source}: found one row, allowed: two or more, as each is seen with a neighbour's answer")
    neighbours = [judged[1], *judged]
    for each, neighbour in zip(judged, neighbours, strict=False):
        yield _beside(each, neighbour)


def _desirable(record: ShapedRecord) -> bool:
    """Whether an answer was judged desirable; 1 and 0 say it too."""
    where = f"{record.where}, field label"
    fields = record.fields
    label = fields.get("label")
    is_number = isinstance(label, int | float)
    if not is_number or label not in (0, 1):
        found = describe_value(label)
        reject(where, found, "true, false: whether the answer is desirable")
    return bool(label)


def _beside(judged: Preference, neighbour: Preference) -> Preference:
    """A judged answer, and behind it the neighbour's answer to the same prompt."""
    (own,) = judged.answers
    (others,) = neighbour.answers
    completion = others.completion
    if others.messages:
        last = others.messages[-1]
        completion = last["content"]
    other = replace(own, completion=completion)
    if own.messages:
        *before, _ = own.messages
        answer = {"role": "assistant", "content": completion}
        turns = (*before, answer)
        other = replace(own, messages=turns)
    answers = (own, other)
    return replace(judged, answers=answers)
