"""Validation errors as a person wants to read them: the field's path, what was found, what is allowed."""

import difflib
import re
import reprlib
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from methods.options import KINDS, UNUSABLE
from runfolder.job import Job

Path = tuple[str | int, ...]
_LONGEST_WORD = 80  # characters: what is longer is no typing error of a name
_LONGEST_VALUE = 200  # characters of a value in a message


def explain(error: ValidationError, found: Any) -> list[str]:
    """One line per field that is wrong; `found` is the data that was validated."""
    problems: dict[Path, list[Any]] = {}
    for problem in error.errors(include_url=False):
        path = _path(problem["loc"], found)
        if problem["type"].startswith("union_tag"):
            path = (*path, "kind")
        problems.setdefault(path, []).append(problem)
    return [f"{'.'.join(map(str, path)) or 'job'}: {_line(path, those, found)}" for path, those in problems.items()]


def nearest(word: object, among: Iterable[str]) -> str:
    """`did you mean 'lora'? `, or nothing."""
    known = isinstance(word, str) and len(word) <= _LONGEST_WORD
    close = difflib.get_close_matches(str(word), list(among), n=1) if known else []
    return f"did you mean {close[0]!r}? " if close else ""


def _line(path: Path, problems: list[Any], found: Any) -> str:
    kind, value = problems[0]["type"], _at(found, path)
    if kind == "extra_forbidden":
        return _unknown_key(path, found)
    seen = "missing; " if value is _NOTHING else f"found {_short(value)}; "
    if kind.startswith("union_tag") and str(value) in UNUSABLE:
        seen = f"found {_short(value)}, which cannot be used ({UNUSABLE[str(value)]}); "
    if kind == "value_error":
        return (seen if isinstance(value, str) else "") + str(problems[0]["msg"]).removeprefix("Value error, ")
    allowed = " or ".join(filter(None, dict.fromkeys(_allowed(problem) for problem in problems)))
    hint = nearest(value, re.findall(r"'([^']+)'", allowed))
    return f"{seen}{hint}allowed: {allowed}{_description(path, found)}" if allowed else "missing"


def _short(value: object) -> str:
    if value is None:
        return "null"
    text = reprlib.repr(value)  # of a deep value still thousands of characters
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _description(path: Path, found: Any) -> str:
    model = _model_at(path[:-1], found)
    field = model.model_fields.get(str(path[-1])) if model and path else None
    return f" ({field.description})" if field and field.description else ""


def _allowed(problem: Any) -> str:
    """What the field takes, in a few words."""
    kind = problem["type"]
    if kind == "missing":
        return ""
    if kind.startswith("union_tag"):
        return ", ".join(map(repr, KINDS))
    if kind == "literal_error":
        return str(problem["ctx"]["expected"])
    if kind in ("model_type", "model_attributes_type"):
        return "a mapping"
    return re.sub(r"^Input should (be )?|, (unable|got) .*", "", problem["msg"])


def _path(loc: Path, found: Any) -> Path:
    """A pydantic location without the labels of union branches, and nothing below such a label."""
    path: list[str | int] = []
    model: type[BaseModel] | None = Job
    steps = list(loc)
    while steps:
        step = steps.pop(0)
        known = model is not None and step in model.model_fields
        if model is None and not isinstance(step, int):
            break
        path.append(step)
        model = _inside(model, step, found) if known and model else None
        if known and step == "method" and steps:
            steps.pop(0)
    return tuple(path)


def _model_at(path: Path, found: Any) -> type[BaseModel] | None:
    model: type[BaseModel] | None = Job
    for step in path:
        model = _inside(model, step, found) if model else None
    return model


def _inside(model: type[BaseModel], key: str | int, found: Any) -> type[BaseModel] | None:
    """The model of a field, when it has one."""
    if model is Job and key == "method":
        kind = _at(found, ("method", "kind"))
        return KINDS.get(kind) if isinstance(kind, str) else None
    annotation = model.model_fields[str(key)].annotation if key in model.model_fields else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _unknown_key(path: Path, found: Any) -> str:
    key, model = path[-1], _model_at(path[:-1], found)
    siblings = list(model.model_fields) if model else []
    elsewhere = [name for name in _dotted(found) if name.split(".")[-1] == key]
    hint = nearest(key, siblings) or (f"did you mean {elsewhere[0]!r}? " if elsewhere else "")
    return f"unknown key; {hint}allowed: {', '.join(siblings)}"


def _dotted(found: Any) -> Iterator[str]:
    """Every key that the job knows, as in `--set`."""
    for name in Job.model_fields:
        inside = _inside(Job, name, found)
        yield from (f"{name}.{field}" for field in inside.model_fields) if inside else (name,)


_NOTHING = object()


def _at(found: Any, path: Path) -> Any:
    for step in path:
        try:
            found = found[step]
        except (KeyError, IndexError, TypeError):
            return _NOTHING
    return found
