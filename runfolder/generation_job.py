"""A stage that writes: the rows of a file get columns, which the base answers or judges, or which are counted."""

import datetime
import re
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from runfolder.job import Base, Tracking
from runfolder.resources import Resources, Section, as_mapping
from runfolder.variables import Variables

ROWS_FILE = "rows.jsonl"  # what it leaves
_TEMPLATE = "a template with {column}s, and {principle.field}s of the principle that a row draws"


class AnswerColumn(Section):
    """What the base writes behind a prompt."""

    prompt: str = Field(min_length=1, description=_TEMPLATE)
    max_new_tokens: int = Field(256, ge=1, description="longest answer that is written")
    temperature: float = Field(0.0, ge=0, description="of a draw; 0: the likeliest token each time")
    stop: tuple[str, ...] = Field((), description="texts at the first of which an answer is cut off")
    round: int = Field(0, ge=0, description="columns of one round have the same principle of a row")


class JudgedColumns(Section):
    """Which of two columns is better, by the base: the rows get chosen, rejected and p_first.

    It is asked in both orders, and p_first is the mean. A row in which both are equal, or one is empty, is left out,
    and so is one of which the base is not sure enough.
    """

    judge: str = Field(min_length=1, description=f"{_TEMPLATE}, and {{first}} and {{second}}")
    first: str = Field(min_length=1, description="a column")
    second: str = Field(min_length=1, description="another column")
    answers: tuple[str, str] = Field((" A", " B"), description="texts that stand for the first and the second one")
    margin: float = Field(0.0, ge=0, lt=0.5, description="of rows that are left out: how near to 0.5 p_first is")
    round: int = Field(0, ge=0, description="columns of one round have the same principle of a row")

    @model_validator(mode="after")
    def _tells_its_columns_apart(self) -> Self:
        columns = (self.first, self.second)
        for what, both in {"answers": self.answers, "columns": columns}.items():
            first, second = both
            if first == second:
                raise ValueError(f"found {what} that are both {first!r}; allowed: two that differ")
        return self


class MatchColumn(Section):
    """Whether a column has what a regular expression finds: 1 or 0."""

    matches: str = Field(min_length=1, description="a regular expression")
    column: str = Field(min_length=1, description="the column that is searched")

    @field_validator("matches")
    @classmethod
    def _is_an_expression(cls, matches: str) -> str:
        try:
            re.compile(matches)
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from None
        return matches


def _kind_of_column(plain: Any) -> str:
    """The kind of a column, by the key that only this kind has."""
    for kind in ("judge", "matches"):
        if kind in plain if isinstance(plain, dict) else hasattr(plain, kind):
            return kind
    return "prompt"


MadeColumn = Annotated[
    Annotated[AnswerColumn, Tag("prompt")]
    | Annotated[JudgedColumns, Tag("judge")]
    | Annotated[MatchColumn, Tag("matches")],
    Discriminator(_kind_of_column),
]


class Generate(Section):
    """The rows that are read, and the columns that are made of them, one after another."""

    rows: str = Field(min_length=1, description="a file of rows, or stage:name/rows.jsonl")
    principles: str | None = Field(
        None, description="a YAML list of {id, ...}: of each round a row draws one, by its id and theirs"
    )
    columns: dict[str, MadeColumn] = Field(min_length=1, description="by name; later ones may use earlier ones")
    chat: bool = Field(False, description="ask through the base's chat template, the prompt as a user's turn")
    seed: int = Field(0, ge=0, description="what principles and tokens are drawn from")
    date: datetime.date | None = Field(
        None, description="what a chat template takes for today; null: the day of submission"
    )


class GenerationJob(Section):
    """One stage that writes. It has one worker, whatever the others have."""

    name: str = Field("job", description="what its run id begins with")
    base: Annotated[Base, as_mapping("model")]
    generate: Generate
    resources: Resources = Resources()
    tracking: Tracking = Tracking()
    env: Variables = Field({}, description="variables for controller and worker; secret ones are kept apart")

    @property
    def sources(self) -> dict[str, str]:
        """What it reads beside the base, by field."""
        by_field = {"generate.rows": self.generate.rows}
        if self.generate.principles:
            by_field["generate.principles"] = self.generate.principles
        return by_field

    def dump(self) -> dict[str, Any]:
        """The job as plain data that `GenerationJob.model_validate` reads back."""
        return self.model_dump(mode="json")


def is_generation(plain: Mapping[str, Any]) -> bool:
    """Whether the job in plain data is one that writes."""
    return "generate" in plain
