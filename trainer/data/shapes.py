"""The shapes that rows of data have: which columns make the prompt, and which the completion."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

SYSTEM = {"system": "{system}\n\n"}
CONTEXT = {"context": "Context: {context}\n"}
HISTORY = {"history": "{history}"}
# Columns that change what an answer means. Nothing here can honour them, and to leave one out would train on a lie.
_UNREAD = ("tools", "functions", "images", "image", "videos", "video", "audios", "audio")
_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")


@dataclass(frozen=True)
class RowShape:
    """Columns of a row, the learned one last, and the templates that make prompt and completion of them.

    A companion is a column that a row may have beside them: it enters the prompt by a template of its own, and leaves
    nothing where a row has none. Where `history` is a companion, it holds earlier pairs of question and answer.
    """

    columns: tuple[str, ...]
    prompt: str = ""
    completion: str = ""
    companions: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_chat(self) -> bool:
        """Whether its only column has the turns of a chat."""
        of_chats = (("messages",), ("conversations",))
        return self.columns in of_chats

    @property
    def all_columns(self) -> set[str]:
        """The columns of a row that have a use."""
        columns = set(self.columns)
        return columns.union(self.companions)

    def __str__(self) -> str:
        columns = "/".join(self.columns)
        if not self.companions:
            return columns
        companions = ", ".join(self.companions)
        return f"{columns} (and {companions})"


_INSTRUCTION = RowShape(
    ("instruction", "output"),
    "{system}{history}Instruction: {instruction}\n{context}{input}Response:",
    " {output}",
    {"input": "Input: {input}\n", **CONTEXT, **SYSTEM, **HISTORY},
)
SHAPES = (
    RowShape(("messages",), companions={"system": ""}),
    RowShape(("conversations",), companions={"system": ""}),  # as ShareGPT has them: from, value
    RowShape(
        ("prompt", "completion"), "{system}{context}{prompt}", "{completion}", {**SYSTEM, "context": "{context}\n\n"}
    ),
    RowShape(
        ("question", "answer"),
        "{system}{history}{context}Question: {question}\nAnswer:",
        " {answer}",
        {**CONTEXT, **SYSTEM, **HISTORY},
    ),
    _INSTRUCTION,
    RowShape(("instruction", "response"), _INSTRUCTION.prompt, " {response}", _INSTRUCTION.companions),
    RowShape(("text",), "", "{text}"),
)


@dataclass(frozen=True)
class RowFamily:
    """The shapes that rows have for an objective, and the columns that are refused beside them."""

    shapes: tuple[RowShape, ...]
    refused: tuple[str, ...]

    def with_columns(self, columns: Iterable[str]) -> RowShape | None:
        """The first shape of a row that has values in these columns."""
        filled = set(columns)
        for shape in self.shapes:
            if filled.issuperset(shape.columns):
                return shape
        return None

    def __str__(self) -> str:
        texts = map(str, self.shapes)
        return " | ".join(texts)


_PROMPT = "{system}{context}{prompt}"
_BESIDE_PROMPT = {**SYSTEM, "context": "{context}\n\n"}
ANSWERS = RowFamily(SHAPES, (*_UNREAD, "chosen", "rejected", "label", "labels"))
_LISTS = (
    RowShape(("prompt", "completions", "ranks"), companions=_BESIDE_PROMPT),
    RowShape(("prompt", "completions", "scores"), companions=_BESIDE_PROMPT),
    RowShape(("prompt", "completions"), companions=_BESIDE_PROMPT),  # each completion with its rank or score
)
_NOT_OF_PAIRS = (*_UNREAD, "label", "labels")
_MARGIN = {"margin": ""}  # no part of a prompt
_BESIDE_CHAT = {"system": ""}  # a turn of its own
PAIRS = RowFamily(
    (
        RowShape(("prompt", "chosen", "rejected"), companions=_BESIDE_PROMPT),
        RowShape(("chosen", "rejected"), companions=_BESIDE_CHAT),
        *_LISTS,
    ),
    _NOT_OF_PAIRS,
)
PAIRS_WITH_MARGINS = RowFamily(
    (
        RowShape(("prompt", "chosen", "rejected"), companions={**_BESIDE_PROMPT, **_MARGIN}),
        RowShape(("chosen", "rejected"), companions={**_BESIDE_CHAT, **_MARGIN}),
        *_LISTS,
    ),
    _NOT_OF_PAIRS,
)
JUDGED = RowFamily(
    (
        RowShape(("prompt", "completion", "label"), companions=_BESIDE_PROMPT),
        RowShape(("messages", "label"), companions=_BESIDE_CHAT),
    ),
    (*_UNREAD, "chosen", "rejected", "labels"),
)


def answered_by(column: str) -> RowShape:
    """The shape of a prompt and the answer in a column."""
    answer = f"{{{column}}}"
    return RowShape(("prompt", column), _PROMPT, answer, _BESIDE_PROMPT)


def fill_template(template: str, values: Mapping[str, str]) -> str:
    """A template with its `{name}`s replaced; `{{` and `}}` are braces. Raises KeyError for a name without value."""

    def value(placeholder: re.Match[str]) -> str:
        name = placeholder[1]
        if name:
            return values[name]
        braces = placeholder[0]
        return braces[0]

    return _PLACEHOLDER.sub(value, template)


def names_in(template: str) -> list[str]:
    """The names in a template, in order."""
    names = _PLACEHOLDER.findall(template)
    return [name for name in names if name]
