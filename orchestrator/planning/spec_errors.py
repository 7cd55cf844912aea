"""Validation errors as a person wants to read them: the field's path, what was found, what is allowed."""

import difflib
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from types import NoneType
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from methods.options import KINDS, UNUSABLE
from runfolder import objectives
from runfolder.job import Job

FieldPath = tuple[str | int, ...]
ModelType = type[BaseModel]
_WITH_KIND: Mapping[str, Mapping[str, ModelType]] = {"method": KINDS, "objective": objectives.OBJECTIVES}
_LONGEST_WORD = 80  # characters: what is longer is no typing error of a name
_LONGEST_VALUE = 200  # characters of a value in a message


def explain(error: ValidationError, plain: Any, root: ModelType = Job) -> list[str]:
    """One line per field that is wrong; `plain` is the data that was validated, as the model `root`."""
    problems_by_path: dict[FieldPath, list[Any]] = {}
    for problem in error.errors(include_url=False):
        path = _field_path(problem["loc"], plain, root)
        if problem["type"].startswith("union_tag"):
            path = (*path, "kind")
        problems = problems_by_path.setdefault(path, [])
        problems.append(problem)
    lines = []
    for path, problems in problems_by_path.items():
        field = ".".join(map(_step_text, path)) or "job"
        explanation = _explanation(path, problems, plain, root)
        lines.append(f"{field}: {explanation}")
    return lines


def _step_text(step: str | int) -> str:
    """A key or index of a path; a key that would not fit into a line is cut, and quoted."""
    text = str(step)
    if len(text) <= _LONGEST_WORD and text.isprintable():
        return text
    return reprlib.repr(text)


def did_you_mean(word: object, among: Iterable[str]) -> str:
    """`did you mean 'lora'? `, or nothing."""
    if not isinstance(word, str) or len(word) > _LONGEST_WORD:
        return ""
    matches = difflib.get_close_matches(word, list(among), n=1)
    if not matches:
        return ""
    return f"did you mean {matches[0]!r}? "


def _explanation(path: FieldPath, problems: list[Any], plain: Any, root: ModelType) -> str:
    """What was found in a field and what is allowed there, from all that pydantic says of it."""
    kind = problems[0]["type"]
    if kind == "extra_forbidden":
        return _unknown_key(path, plain, root)
    value = _value_at(plain, path)
    seen = _seen(kind, value)
    if kind == "value_error":
        message = str(problems[0]["msg"])
        message = message.removeprefix("Value error, ")
        if isinstance(value, str):
            return seen + message
        return message
    alternatives = dict.fromkeys(map(_allowed, problems))  # each once
    allowed = " or ".join(filter(None, alternatives))
    if not allowed:
        return "missing"
    names = re.findall(r"'([^']+)'", allowed)
    hint = did_you_mean(value, names)
    description = _field_description(path, plain, root)
    return f"{seen}{hint}allowed: {allowed}{description}"


def _seen(kind: str, value: object) -> str:
    """What was found in a field, or that nothing was."""
    if kind.startswith("union_tag") and str(value) in UNUSABLE:
        reason = UNUSABLE[str(value)]
        return f"found {_short(value)}, which cannot be used ({reason}); "
    if value is _NOTHING:
        return "missing; "
    return f"found {_short(value)}; "


def _short(value: object) -> str:
    if value is None:
        return "null"
    text = reprlib.repr(value)  # of a deep value still thousands of characters
    if len(text) <= _LONGEST_VALUE:
        return text
    return f"{text[:_LONGEST_VALUE]}..."


def _field_description(path: FieldPath, plain: Any, root: ModelType) -> str:
    """The description of a field in parentheses, or nothing."""
    model = _model_at(path[:-1], plain, root)
    if not model or not path:
        return ""
    name = str(path[-1])
    field = model.model_fields.get(name)
    if not field or not field.description:
        return ""
    return f" ({field.description})"


def _allowed(problem: Any) -> str:
    """What the field takes, in a few words."""
    kind = problem["type"]
    if kind == "missing":
        return ""
    if kind.startswith("union_tag"):
        return _known_kinds(problem["loc"][0])
    if kind == "literal_error":
        return str(problem["ctx"]["expected"])
    if kind in ("model_type", "model_attributes_type"):
        return "a mapping"
    return re.sub(r"^Input should (be )?|, (unable|got) .*", "", problem["msg"])


def _known_kinds(field: str) -> str:
    """The kinds that a field with options of its own kind may have."""
    kinds: Iterable[str] = KINDS
    beside = ""
    if field == "objective":
        kinds = objectives.known()
        beside = ", or one of a package that is installed here"
    quoted = map(repr, kinds)
    return ", ".join(quoted) + beside


def _field_path(loc: FieldPath, plain: Any, root: ModelType) -> FieldPath:
    """A pydantic location without the labels of union branches, and nothing below such a label."""
    path: list[str | int] = []
    model: ModelType | None = root
    steps = list(loc)
    while steps:
        step = steps.pop(0)
        is_index = isinstance(step, int)
        if model is None and not is_index:
            break
        path.append(step)
        is_field = model is not None and step in model.model_fields
        model = _model_of(model, step, plain) if is_field and model else None
        if is_field and step in _WITH_KIND and steps:
            steps.pop(0)
    return tuple(path)


def _model_at(path: FieldPath, plain: Any, root: ModelType) -> ModelType | None:
    """The model of the mapping at a path, when it has one."""
    model: ModelType | None = root
    for step in path:
        if model is None:
            return None
        model = _model_of(model, step, plain)
    return model


def _model_of(model: ModelType, key: str | int, plain: Any) -> ModelType | None:
    """The model of a field, when it has one."""
    if model is Job and key in _WITH_KIND:
        kinds = _WITH_KIND[str(key)]
        kind = _value_at(plain, (key, "kind"))
        if isinstance(kind, str):
            return kinds.get(kind)
        return None
    if key not in model.model_fields:
        return None
    annotation = model.model_fields[str(key)].annotation
    alternatives = get_args(annotation)
    if alternatives[1:] == (NoneType,):  # a section that may be left out
        annotation = alternatives[0]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return None


def _unknown_key(path: FieldPath, plain: Any, root: ModelType) -> str:
    """What to write instead of a key that no field has."""
    key = path[-1]
    model = _model_at(path[:-1], plain, root)
    siblings: list[str] = []
    if model:
        siblings += model.model_fields
    hint = did_you_mean(key, siblings)
    if not hint and len(path) == 1:  # as if the key of a section stood above the sections
        hint = _namesake(key, plain, root)
    allowed = ", ".join(siblings)
    return f"unknown key; {hint}allowed: {allowed}"


def _namesake(key: str | int, plain: Any, root: ModelType) -> str:
    """`did you mean 'train.lr'? ` for the first key elsewhere below the root that has this name, or nothing."""
    for dotted in _dotted_keys(plain, root):
        *_, name = dotted.split(".")
        if name == key:
            return f"did you mean {dotted!r}? "
    return ""


def _dotted_keys(plain: Any, root: ModelType) -> Iterator[str]:
    """Every key that the root knows, as in `--set`."""
    for name in root.model_fields:
        model = _model_of(root, name, plain)
        if model is None:
            yield name
            continue
        for field in model.model_fields:
            yield f"{name}.{field}"


_NOTHING = object()


def _value_at(plain: Any, path: FieldPath) -> Any:
    """The value at a path, or `_NOTHING`; a bare text stands for a mapping of one key."""
    value = plain
    for step in path:
        if isinstance(value, str):
            return value
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return _NOTHING
    return value
