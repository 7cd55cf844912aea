"""A task: a YAML file that says which rows are asked, how, and what counts as right."""

import datetime
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from orchestrator.errors import InputError
from orchestrator.planning.spec import load_yaml
from orchestrator.planning.spec_errors import explain
from runfolder.resources import Section
from runfolder.sources import SubmitterFile, parse_source

HARNESS = "lm_eval:"  # what the name of a task of lm-evaluation-harness begins with
TASK_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}")
_OF_CHOICE = ("prompt", "choices", "answer")


class TaskSpec(Section):
    """What is asked of every adapter, and how its answers are judged."""

    name: str = Field(min_length=1, description="what its results are called; without it, the name of the file")
    kind: Literal["exact_match", "choice", "generation"] = Field(
        description="exact_match: the answer that is written is that of the data; choice: the likeliest of several "
        "texts is the right one; generation: exact match as evaluations of a job judge it, and the loss"
    )
    data: str = Field(min_length=1, description="a file beside the task or anywhere, or a hub dataset")
    rows: int | None = Field(None, ge=1, description="how many of them, from the first; null: all")
    columns: dict[str, str] | None = Field(
        None, min_length=1, description="which column, or template with {column}s, is the prompt, the completion, ..."
    )
    chat: bool = Field(False, description="ask through the base's chat template, the prompt as a user's turn")
    prompt: str | None = Field(None, min_length=1, description="of choice: a template with {column}s")
    choices: str | tuple[str, ...] | None = Field(
        None, description="of choice: the column that has a list of texts, or a template for each text"
    )
    answer: str | None = Field(
        None,
        description="of choice: the column that has the right one, as its text, its number from 0, or its letter",
    )
    normalise: Literal["none", "characters", "tokens"] = Field(
        "none", description="of choice: what log-likelihoods are divided by"
    )
    extract: str | None = Field(
        None,
        min_length=1,
        description="a regular expression whose last match is compared, or number; null: what follows ####, else all",
    )
    max_new_tokens: int = Field(256, ge=1, description="longest answer that is written")
    stop: tuple[str, ...] = Field((), description="texts at the first of which an answer is cut off")
    criterion: str = Field(
        "more helpful and more correct",
        min_length=1,
        description="what a judging model takes for the better of two answers; evaluate --judge",
    )
    may_lose: float | None = Field(
        None,
        ge=0,
        le=100,
        description="points that an adapter may lose to the base, or before a judge, without a warning",
    )
    parse_special: bool = Field(False, description="names of control tokens in the data are control tokens, not text")
    date: datetime.date | None = Field(None, description="what a chat template takes for today; null: today")

    @field_validator("name")
    @classmethod
    def _names_a_file(cls, name: str) -> str:
        if not TASK_NAME.fullmatch(name):
            raise ValueError("must be at most 64 letters, digits, dots, - and _, and begin with a letter or digit")
        return name

    @field_validator("extract")
    @classmethod
    def _is_an_expression(cls, extract: str | None) -> str | None:
        if extract is None:
            return None
        try:
            re.compile(extract)
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}; allowed: one, or number") from None
        return extract

    @model_validator(mode="after")
    def _says_what_is_chosen(self) -> "TaskSpec":
        given = [name for name in _OF_CHOICE if getattr(self, name) is not None]
        if self.kind != "choice":
            if given:
                raise ValueError(f"kind {self.kind} with {given[0]}, which is for kind choice")
            return self
        missing = [name for name in _OF_CHOICE if name not in given]
        if missing:
            raise ValueError(f"kind choice without {missing[0]}; allowed: prompt, choices and answer together")
        if self.columns:
            raise ValueError("kind choice with columns; allowed: prompt, choices and answer")
        if isinstance(self.choices, tuple) and len(self.choices) < 2:
            raise ValueError("choices: found fewer than two; allowed: a column, or at least two templates")
        return self

    @property
    def measures(self) -> tuple[str, ...]:
        """What its answers are judged by; what an adapter is known by comes first."""
        if self.kind == "generation":
            return ("exact_match", "loss")
        if self.kind == "choice":
            return ("accuracy",)
        return ("exact_match",)


def read_task(path: Path) -> TaskSpec:
    """The task in a file; raises InputError with one line per error."""
    plain = load_yaml(path)
    plain.setdefault("name", path.stem)
    choices = plain.get("choices")
    if isinstance(choices, list):
        plain["choices"] = tuple(choices)
    try:
        task = TaskSpec.model_validate(plain)
    except ValidationError as error:
        lines = []
        for problem in explain(error, plain, TaskSpec):
            of_task = problem.removeprefix("job: ")
            lines.append(f"{path}: {of_task}")
        raise InputError("\n".join(lines)) from None
    return task.model_copy(update={"data": _found_from(task.data, path)})


def read_tasks(paths: list[Path]) -> list[TaskSpec]:
    """The tasks in some files, whose names differ; raises InputError with a line for each error of all of them."""
    tasks: list[TaskSpec] = []
    problems: list[str] = []
    for path in paths:
        try:
            tasks.append(read_task(path))
        except InputError as error:
            problems.append(str(error))
    names: set[str] = set()
    for task in tasks:
        if task.name in names:
            problems.append(f"--tasks: found two of the name {task.name}; allowed: one of each name")
        names.add(task.name)
    if problems:
        raise InputError("\n".join(problems))
    return tasks


def _found_from(source: str, task_file: Path) -> str:
    """A task's data as it is found from anywhere: a path of this machine is relative to the task's file."""
    parsed = parse_source(source)
    if not isinstance(parsed, SubmitterFile):
        return source
    path = task_file.parent / source
    return str(path.resolve())


def described(task: TaskSpec) -> dict[str, Any]:
    """What a task's questions depend on, beside its data; not what counts as right: that is judged each time."""
    judged_later = {"data", "rows", "extract", "normalise", "answer", "criterion", "may_lose"}
    return task.model_dump(mode="json", exclude=judged_later)
