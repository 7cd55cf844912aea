"""From a job.yaml and overrides to a validated `Job`, or to one clear line per error."""

import re
import reprlib
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from orchestrator.errors import InputError
from orchestrator.planning.spec_errors import explain
from runfolder.job import Job

LARGEST = 1 << 20  # bytes of a job.yaml
# What a bare string stands for in job.yaml.
SHORT = {"base": "model", "data": "train", "method": "kind", "objective": "kind"}
_DOTTED_KEY = re.compile(r"[\w-]+(\.[\w-]+)*")
_EXPONENT_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")

SomeSpec = TypeVar("SomeSpec", bound=BaseModel)
PlainJob = dict[str, Any]  # a job as YAML has it, before it is validated


class _Loader(yaml.SafeLoader):
    """YAML where 1e-4 is a number (as in YAML 1.2), a key may stand only once, and nothing stands for something else.

    A few lines of aliases of aliases expand to more than a machine can hold ("billion laughs").
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            alias: Any = self.peek_event()  # type: ignore[no-untyped-call]
            problem = f"found the alias *{alias.anchor}; write its value out"
            raise yaml.composer.ComposerError(None, None, problem, alias.start_mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                problem = f"the key {key.value!r} stands there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT_FLOAT, list("-+.0123456789"))


def read_job_file(path: Path, overrides: Iterable[str] = ()) -> Job:
    """The job in a file, with `key=value` overrides applied; raises InputError."""
    plain = load_yaml(path)
    return validate(plain, overrides, str(path))


def validate(plain: PlainJob, overrides: Iterable[str] = (), source: str = "job") -> Job:
    """The job in plain data, with overrides applied; raises InputError with one line per error."""
    return validated(Job, plain, overrides, source)


def validated(kind: type[SomeSpec], plain: PlainJob, overrides: Iterable[str], source: str) -> SomeSpec:
    """The job of a kind in plain data, with overrides applied; raises InputError with one line per error."""
    plain = overridden(plain, overrides)
    try:
        return kind.model_validate(plain)
    except ValidationError as error:
        problems = explain(error, plain, kind)
        lines = []
        for problem in problems:
            lines.append(f"{source}: {problem}")
        raise InputError("\n".join(lines)) from None


def overridden(plain: PlainJob, overrides: Iterable[str]) -> PlainJob:
    """Plain data with `key=value` overrides applied, and bare strings spelled out; raises InputError."""
    plain = spelled_out(plain)
    for override in overrides:
        with_key = _override(plain, override)
        plain = spelled_out(with_key)
    return plain


def load_yaml(path: Path) -> PlainJob:
    """The mapping in a YAML file, unvalidated."""
    text = _read_text(path)
    plain = parse_yaml(text, str(path))
    if not isinstance(plain, dict):
        kind = "nothing" if plain is None else type(plain).__name__
        raise InputError(f"{path}: found {kind}; allowed: a mapping of keys like name, base, method, data, train")
    return plain


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text; raises InputError with the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        place = ""
        if error.problem_mark:
            line = error.problem_mark.line + 1
            place = f"line {line}: "
        raise InputError(f"{source}: {place}{error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        raise InputError(f"{source}: not YAML: {first_line}") from None
    except RecursionError:
        raise InputError(f"{source}: nested too deeply") from None


def _read_text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise InputError(f"{path}: found {size} bytes; a job.yaml has at most {LARGEST}")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file (UTF-8)") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def spelled_out(plain: PlainJob) -> PlainJob:
    """Bare strings as the mappings that they stand for, those of its stages too."""
    whole = dict(plain)
    for key, inner_key in SHORT.items():
        value = plain.get(key)
        if isinstance(value, str):
            whole[key] = {inner_key: value}
    stages = plain.get("stages")
    if isinstance(stages, dict):
        whole["stages"] = {}
        for stage, job in stages.items():
            whole["stages"][stage] = spelled_out(job) if isinstance(job, dict) else job
    return whole


def _override(plain: PlainJob, text: str) -> PlainJob:
    """A copy with one dotted key set; the mappings on its way are made."""
    key, equals, value_text = text.partition("=")
    source = f"--set {text}"
    if not equals or not _DOTTED_KEY.fullmatch(key):
        raise InputError(f"{source}: write key=value, like train.lr=3e-4")
    value = parse_yaml(value_text, source)
    *parents, last = key.split(".")
    changed = dict(plain)
    mapping = changed
    for depth, parent in enumerate(parents, 1):
        inner = mapping.get(parent)
        if inner is not None and not isinstance(inner, dict):
            path = ".".join(parents[:depth])
            value_there = reprlib.repr(inner)
            raise InputError(f"{source}: {path} is {value_there}, not a mapping")
        mapping[parent] = dict(inner or {})
        mapping = mapping[parent]
    mapping[last] = value
    return changed
