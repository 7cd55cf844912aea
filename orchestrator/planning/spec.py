"""From a job.yaml and overrides to a validated `Job`, or to one clear line per error."""

import re
import reprlib
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from orchestrator.errors import InputError
from orchestrator.planning.spec_errors import explain
from runfolder.job import Job

LARGEST = 1 << 20  # bytes of a job.yaml
# What a bare string stands for in job.yaml.
SHORT = {"base": "model", "data": "train", "method": "kind"}


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
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands there twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read(path: Path, overrides: Iterable[str] = ()) -> Job:
    """The job in a file, with `key=value` overrides applied; raises InputError."""
    return validate(load(path), overrides, str(path))


def validate(found: dict[str, Any], overrides: Iterable[str] = (), source: str = "job") -> Job:
    """The job in plain data, with overrides applied; raises InputError with one line per error."""
    found = _spelled_out(found)
    for override in overrides:
        found = _spelled_out(_override(found, override))
    try:
        return Job.model_validate(found)
    except ValidationError as error:
        raise InputError("\n".join(f"{source}: {line}" for line in explain(error, found))) from None


def load(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, unvalidated."""
    found = parse(_text(path), str(path))
    if not isinstance(found, dict):
        what = "nothing" if found is None else type(found).__name__
        raise InputError(f"{path}: found {what}; allowed: a mapping of keys like name, base, method, data, train")
    return found


def parse(text: str, source: str) -> Any:
    """The value of a YAML text; raises InputError with the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise InputError(f"{source}: {line}{error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{source}: not YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise InputError(f"{source}: nested too deeply") from None


def _text(path: Path) -> str:
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise InputError(f"{path}: found {size} bytes; a job.yaml has at most {LARGEST}")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file (UTF-8)") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def _spelled_out(found: dict[str, Any]) -> dict[str, Any]:
    """Bare strings as the mappings that they stand for."""
    return {
        key: {SHORT[key]: value} if key in SHORT and isinstance(value, str) else value for key, value in found.items()
    }


def _override(found: dict[str, Any], text: str) -> dict[str, Any]:
    """Set one dotted key; the mappings on its way are made."""
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
        raise InputError(f"--set {text}: write key=value, like train.lr=3e-4")
    return _put(found, key.split("."), parse(value, f"--set {text}"), f"--set {text}", ())


def _put(found: dict[str, Any], keys: list[str], value: Any, source: str, above: tuple[str, ...]) -> dict[str, Any]:
    key, *rest = keys
    if not rest:
        return {**found, key: value}
    inner = found.get(key)
    path = (*above, key)
    if inner is not None and not isinstance(inner, dict):
        raise InputError(f"{source}: {'.'.join(path)} is {reprlib.repr(inner)}, not a mapping")
    return {**found, key: _put(inner or {}, rest, value, source, path)}
