"""Chats of a record as turns {role, content}, from the two forms in which data has them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.data.cells import is_empty, text_of
from trainer.data.files import describe_value, reject

Message = dict[str, str]
Messages = tuple[Message, ...]


@dataclass(frozen=True)
class _Form:
    """How data writes a turn: the fields of its speaker and its content, and the role of each speaker."""

    speaker: str
    content: str
    roles: Mapping[str, str]

    @property
    def fields(self) -> str:
        """The two fields as an error names them."""
        return f"{self.speaker}, {self.content}"


_OPENAI = _Form("role", "content", {"system": "system", "user": "user", "assistant": "assistant"})
_SHAREGPT = _Form(
    "from",
    "value",
    {
        "system": "system",
        **dict.fromkeys(("human", "user"), "user"),
        **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot"), "assistant"),
    },
)
_CHAT_FORMS = {"messages": _OPENAI, "conversations": _SHAREGPT}  # by the column that has the chat


def messages(column: str, record: Mapping[str, Any], where: str) -> Messages:
    """The turns of the chat in a column of a record, behind the turn of its column `system`. Raises RowError."""
    where_chat = f"{where}, field {column}"
    form = _CHAT_FORMS[column]
    value = record.get(column)
    turns = _turns(value, form, where_chat)
    prompt = record.get("system")
    if not is_empty(prompt):
        system = system_turn(prompt, turns, f"{where}, field system")
        turns = (system, *turns)
    roles = []
    for turn in turns:
        roles.append(turn["role"])
    if roles[0] == "assistant":
        reject(f"{where_chat}[0].role", describe_value("assistant"), "system, user: somebody asks first")
    if "assistant" not in roles:
        reject(where_chat, "no assistant turn", "at least one, as it is what is learned")
    return turns


def turns_in(value: object, where: str) -> Messages:
    """The turns {role, content} that a cell holds, at least one. Raises RowError."""
    return _turns(value, _OPENAI, where)


def _turns(value: object, form: _Form, where: str) -> Messages:
    if not isinstance(value, list) or not value:
        allowed = f"a list of {{{form.fields}}}"
        reject(where, describe_value(value), allowed)
    turns = []
    for index, turn in enumerate(value):
        where_turn = f"{where}[{index}]"
        message = _turn(turn, form, where_turn)
        turns.append(message)
    return tuple(turns)


def system_turn(value: object, turns: Messages, where: str) -> Message:
    """What a column `system` says, as the turn in front of a chat that has none. Raises RowError."""
    first = turns[0]
    if first["role"] == "system":
        reject(where, describe_value(value), "nothing beside a system turn")
    content = text_of(value, where)
    return {"role": "system", "content": content}


def _turn(turn: object, form: _Form, where: str) -> Message:
    """One turn as {role, content}, from an object in a form."""
    if not isinstance(turn, Mapping):
        allowed = f"an object {{{form.fields}}}"
        reject(where, describe_value(turn), allowed)
    _refuse_other_fields(turn, form, where)
    where_content = f"{where}.{form.content}"
    where_speaker = f"{where}.{form.speaker}"
    value = turn.get(form.content)
    content = text_of(value, where_content)
    speaker = turn.get(form.speaker)
    role = _role(speaker, form, where_speaker)
    if role == "assistant" and not content.strip():
        reject(where_content, "empty text", "text that is not empty")
    return {"role": role, "content": content}


def _role(speaker: object, form: _Form, where: str) -> str:
    roles = form.roles
    if not isinstance(speaker, str) or speaker not in roles:
        allowed = ", ".join(roles)
        reject(where, describe_value(speaker), allowed)
    return roles[speaker]


def _refuse_other_fields(turn: Mapping[Any, Any], form: _Form, where: str) -> None:
    fields = (form.speaker, form.content)
    others = []
    for name, value in turn.items():
        if value is not None and name not in fields:
            others.append(str(name))
    if others:
        names = ", ".join(others)
        reject(where, f"the fields {names}", form.fields)
