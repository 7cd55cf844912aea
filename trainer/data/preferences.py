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
from trainer.data.chats import Messages, turns_in
from trainer.data.files import RowError, SourceName, describe_value, reject
from trainer.data.ranked import PairOfColumns, has_list, spread
from trainer.data.rows import ColumnNames, Columns, Row, ShapedRecord, read_rows, row_of, shaped_records
from trainer.data.shapes import JUDGED, PAIRS, PAIRS_WITH_MARGINS, answered_by

_NAMED: PairOfColumns = ("chosen", "rejected")
_TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True, slots=True)
class Preference:
    """The two answers of a row, each as a row of its own: the chosen one first.

    Of an answer that was judged, the other one is a neighbour's answer to the same prompt, which is not learned.
    `margin`: by how much the chosen answer is to lead; `left_out`: why nothing is learned; `part`: which pair it is.
    """

    number: int
    answers: tuple[Row, ...]
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
    """Stream the judged answers of a source, each with the answer of the row before it (the first: behind it).

    Raises RowError.
    """
    stream = map(_judged, shaped_records(source, columns, JUDGED))
    first = next(stream)
    second = next(stream, None)
    if second is None:
        raise RowError(f"{source}: found one row, allowed: two or more, as each is seen with a neighbour's answer")
    yield _beside(first, second)
    yield _beside(second, first)
    before = second
    for judged in stream:
        yield _beside(judged, before)
        before = judged


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
    if _has_turns(record, better):
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


def _has_turns(record: ShapedRecord, column: str) -> bool:
    """Whether a record has its prompt, or an answer in a column, as turns of a chat."""
    fields = record.fields
    for name in ("prompt", column):
        value = fields.get(name)
        if isinstance(value, list):
            return True
    return False


def _pair(record: ShapedRecord, chosen: Row, rejected: Row) -> Preference:
    """A pair of texts whose prompt was given."""
    left_out = None
    if chosen.completion == rejected.completion:
        left_out = "identical"
    return Preference(record.number, (chosen, rejected), left_out=left_out, unused=record.unused)


def _pair_of_transcripts(record: ShapedRecord) -> Preference:
    """A pair of whole transcripts, each cut before its last reply."""
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
    chosen = _chat(record, better_column)
    rejected = _chat(record, worse_column)
    *before_chosen, _ = chosen
    *before_rejected, _ = rejected
    left_out = None
    if chosen == rejected:
        left_out = "identical"
    elif before_chosen != before_rejected:
        left_out = "branched"
    better = _last_turn(record, chosen)
    worse = _last_turn(record, rejected)
    answers = (better, worse)
    return Preference(record.number, answers, left_out=left_out, unused=record.unused)


def _last_turn(record: ShapedRecord, turns: Messages) -> Row:
    """A chat of which the last turn is learned."""
    number = record.number
    return Row(number, "", "", turns, only_last=True)


def _chat(record: ShapedRecord, column: str) -> Messages:
    """The turns of a record's prompt, and behind them those of an answer in a column; a text is one turn of it."""
    where = f"{record.where}, field {column}"
    turns = _turns_of(record, column, "assistant")
    fields = record.fields
    prompt = fields.get("prompt")
    if isinstance(prompt, list):
        asked = _turns_of(record, "prompt", "user")
        turns = (*asked, *turns)
    elif "prompt" in record.shape.columns:
        _require_same_question(record, turns)
    first_turn = turns[0]
    last_turn = turns[-1]
    first = first_turn["role"]
    last = last_turn["role"]
    if first == "assistant":
        found = describe_value(first)
        reject(f"{where}[0].role", found, "system, user: somebody asks first")
    if last != "assistant":
        reject(where, f"a last turn of the role {last}", "a last turn of the assistant, as it is what is learned")
    return turns


def _turns_of(record: ShapedRecord, column: str, speaker: str) -> Messages:
    """What a column holds as turns; a text is one of a speaker."""
    where = f"{record.where}, field {column}"
    value = record.fields.get(column)
    if isinstance(value, str):
        value = [{"role": speaker, "content": value}]
    return turns_in(value, where)


def _require_same_question(record: ShapedRecord, turns: Messages) -> None:
    """Raise RowError where a prompt that is a text beside whole chats is not what is asked first in them."""
    where = f"{record.where}, field prompt"
    fields = record.fields
    value = fields.get("prompt")
    prompt = text_of(value, where)
    asked = []
    for turn in turns:
        if turn["role"] == "user":
            content = turn["content"]
            asked.append(content)
    if asked[:1] == [prompt]:
        return
    found = describe_value(prompt)
    reject(where, found, "what the user asks first in the chats beside it, or a list of turns")


# Judged answers


def _judged(record: ShapedRecord) -> Preference:
    """An answer that was judged, without its neighbour."""
    desirable = _desirable(record)
    column, *_ = record.shape.columns
    if column != "messages":
        column = "completion"
    if column == "messages" or _has_turns(record, column):
        turns = _chat(record, column)
        answer = _last_turn(record, turns)
    else:
        answer = row_of(record, answered_by("completion"))
    answers = (answer,)
    return Preference(record.number, answers, desirable, unused=record.unused)


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
