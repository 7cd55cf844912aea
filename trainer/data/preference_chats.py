"""Answers of preferences as chats: turns of a prompt, and behind them those of an answer; the last one is learned."""

from trainer.data.cells import is_empty, text_of
from trainer.data.chats import Messages, system_turn, turns_in
from trainer.data.files import describe_value, reject
from trainer.data.rows import Row, ShapedRecord


def has_turns(record: ShapedRecord, column: str) -> bool:
    """Whether a record has its prompt, or an answer in a column, as turns of a chat."""
    fields = record.fields
    for name in ("prompt", column):
        value = fields.get(name)
        if isinstance(value, list):
            return True
    return False


def last_turn(record: ShapedRecord, turns: Messages) -> Row:
    """A chat of which the last turn is learned."""
    number = record.number
    return Row(number, "", "", turns, only_last=True)


def chat_of(record: ShapedRecord, column: str) -> Messages:
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
    turns = _with_system(record, turns)
    first = turns[0]["role"]
    last = turns[-1]["role"]
    if first == "assistant":
        found = describe_value(first)
        reject(f"{where}[0].role", found, "system, user: somebody asks first")
    if last != "assistant":
        reject(where, f"a last turn of the role {last}", "a last turn of the assistant, as it is what is learned")
    return turns


def _with_system(record: ShapedRecord, turns: Messages) -> Messages:
    """A chat behind what the record's column `system` says; raises RowError where it has a `context`, too."""
    refuse_beside(record, "context", "a prompt of turns")
    fields = record.fields
    value = fields.get("system")
    if is_empty(value):
        return turns
    system = system_turn(value, turns, f"{record.where}, field system")
    return (system, *turns)


def refuse_beside(record: ShapedRecord, name: str, what: str) -> None:
    """Raise RowError where a column that belongs to a prompt has no place in one."""
    fields = record.fields
    value = fields.get(name)
    is_companion = name in record.shape.companions
    if is_companion and not is_empty(value):
        where = f"{record.where}, field {name}"
        found = describe_value(value)
        reject(where, found, f"nothing beside {what}")


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
