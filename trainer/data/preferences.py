"""Preferences, read and checked without torch: of two answers to one prompt the better one, or one that was judged.

The prompt of a pair is what both answers have in front. Of two chats it is the turns that are equal; of two
transcripts in the format of HH-RLHF, the text up to the last `Assistant:`. Characters that happen to be equal say
nothing: two answers often begin alike.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from runfolder.objectives import RowsRead
from trainer.data.cells import text_of
from trainer.data.chats import Messages, turns_in
from trainer.data.files import RowError, SourceName, describe_value, reject
from trainer.data.rows import ColumnNames, Columns, Row, ShapedRecord, read_rows, row_of, shaped_records
from trainer.data.shapes import CHOSEN, COMPLETED, JUDGED, PAIRS, REJECTED

_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_LABELS: Mapping[object, bool] = {True: True, False: False}  # 1 and 0 are equal to these


@dataclass(frozen=True, slots=True)
class Preference:
    """The two answers of a row, each as a row of its own: the chosen one first.

    Of an answer that was judged, the other one is a neighbour's answer to the same prompt, which is not learned.
    `left_out` says why nothing can be learned of it, where that is so.
    """

    number: int
    answers: tuple[Row, ...]
    desirable: bool = True
    left_out: str | None = None
    unused: ColumnNames = ()


def read_pairs(source: SourceName, columns: Columns | None = None) -> Iterator[Preference]:
    """Stream the pairs of a source, by its columns prompt, chosen and rejected. Raises RowError."""
    for record in shaped_records(source, columns, PAIRS):
        if _has_turns(record, "chosen"):
            yield _pair_of_chats(record)
        elif "prompt" in record.shape.columns:
            chosen = row_of(record, CHOSEN)
            rejected = row_of(record, REJECTED)
            yield _pair(record, chosen, rejected)
        else:
            yield _pair_of_transcripts(record)


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


PREFERENCES: Mapping[RowsRead, Callable[[SourceName, Columns | None], Iterator[Preference]]] = {
    "pairs": read_pairs,
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


def _has_turns(record: ShapedRecord, column: str) -> bool:
    """Whether a record has its prompt, or an answer in a column, as turns of a chat."""
    prompt = record.fields.get("prompt")
    answer = record.fields.get(column)
    return isinstance(prompt, list) or isinstance(answer, list)


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
    if chosen.prompt != rejected.prompt:
        return replace(pair, left_out="branched")
    replies = (chosen.completion, rejected.completion)
    if not all(map(str.strip, replies)):
        return replace(pair, left_out="no_reply")
    return pair


def _cut_transcript(record: ShapedRecord, column: str) -> Row:
    """A transcript as its last reply behind all that comes before it."""
    where = f"{record.where}, field {column}"
    value = record.fields.get(column)
    text = text_of(value, where)
    found = describe_value(text)
    speakers = list(_SPEAKER.finditer(text))
    if not speakers or speakers[0].start() > 0:
        allowed = "a transcript that begins with '\\n\\nHuman:'; else give the prompt a column of its own"
        reject(where, found, allowed)
    last = speakers[-1]
    if last[1] != "Assistant":
        reject(where, "a last turn of the human", "a transcript whose last turn is the assistant's")
    cut = last.end()
    return Row(record.number, text[:cut], text[cut:])


def _pair_of_chats(record: ShapedRecord) -> Preference:
    """A pair of chats that are equal up to their last turns."""
    chosen = _chat(record, "chosen")
    rejected = _chat(record, "rejected")
    left_out = None
    if chosen == rejected:
        left_out = "identical"
    elif chosen[:-1] != rejected[:-1]:
        left_out = "branched"
    answers = (_last_turn(record, chosen), _last_turn(record, rejected))
    return Preference(record.number, answers, left_out=left_out, unused=record.unused)


def _last_turn(record: ShapedRecord, turns: Messages) -> Row:
    """A chat of which the last turn is learned."""
    return Row(record.number, "", "", turns, only_last=True)


def _chat(record: ShapedRecord, column: str) -> Messages:
    """The turns of a record's prompt, and behind them those of an answer in a column; a text is one turn of it."""
    where = f"{record.where}, field {column}"
    turns = _turns_of(record, column, "assistant")
    prompt = record.fields.get("prompt")
    if isinstance(prompt, list):
        asked = _turns_of(record, "prompt", "user")
        turns = (*asked, *turns)
    elif "prompt" in record.shape.columns:
        _require_same_question(record, turns)
    first = turns[0]["role"]
    if first == "assistant":
        reject(f"{where}[0].role", describe_value(first), "system, user: somebody asks first")
    last = turns[-1]["role"]
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
    prompt = text_of(record.fields.get("prompt"), where)
    for turn in turns:
        if turn["role"] == "user":
            if turn["content"] == prompt:
                return
            break
    reject(where, describe_value(prompt), "what the user asks first in the chats beside it, or a list of turns")


# Judged answers


def _judged(record: ShapedRecord) -> Preference:
    """An answer that was judged, without its neighbour."""
    where = f"{record.where}, field label"
    label = record.fields.get("label")
    desirable = _LABELS.get(label) if isinstance(label, int | float) else None
    if desirable is None:
        reject(where, describe_value(label), "true, false: whether the answer is desirable")
    if "messages" in record.shape.columns:
        turns = _chat(record, "messages")
        answer = _last_turn(record, turns)
    elif _has_turns(record, "completion"):
        turns = _chat(record, "completion")
        answer = _last_turn(record, turns)
    else:
        answer = row_of(record, COMPLETED)
    return Preference(record.number, (answer,), desirable, unused=record.unused)


def _beside(judged: Preference, neighbour: Preference) -> Preference:
    """A judged answer, and behind it the neighbour's answer to the same prompt."""
    (own,) = judged.answers
    (others,) = neighbour.answers
    turns = own.messages
    completion = others.completion
    if turns and others.messages:
        turns = (*turns[:-1], others.messages[-1])
    elif turns:
        turns = (*turns[:-1], {"role": "assistant", "content": completion})
    elif others.messages:
        completion = others.messages[-1]["content"]
    other = replace(own, completion=completion, messages=turns)
    return replace(judged, answers=(own, other))
