"""What an API server says of an object that it does not take, in its words."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from jsonschema import Draft4Validator
from kubernetes_rules import plain_schema

NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
REST = (
    "<nil>: Invalid value: null: some validation rules were not checked because the object was invalid; "
    "correct the existing errors to complete validation"
)
Causes = tuple[tuple[str, str], ...]


@dataclass
class Status(Exception):
    """An answer that is no success."""

    code: int
    reason: str
    message: str
    causes: Causes = field(default=())

    def dump(self) -> dict[str, Any]:
        """The answer's body."""
        causes = [{"reason": reason, "field": name} for reason, name in self.causes]
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "reason": self.reason,
            "message": self.message,
            "details": {"causes": causes},
            "code": self.code,
        }


def admit(body: Mapping[str, Any], is_strict: bool) -> None:
    """Raise Status for a RayJob or a RayService that is not taken."""
    name = body["metadata"].get("name", "")
    kind = body["kind"]
    if is_strict:
        unknown = sorted(unknown_fields(body, plain_schema(kind)))
        if unknown:
            words = ", ".join(f'unknown field "{path}"' for path in unknown)
            raise Status(
                400,
                "BadRequest",
                f'{kind} in version "v1" cannot be handled as a {kind}: strict decoding error: {words}',
            )
    invalid = f'{kind}.ray.io "{name}" is invalid: '
    if not NAME.fullmatch(name) or len(name) > 253:
        words = f'metadata.name: Invalid value: "{name}": a lowercase RFC 1123 subdomain must consist of lower case'
        raise Status(422, "Invalid", invalid + words, (("FieldValueInvalid", "metadata.name"),))
    for value in body["metadata"].get("labels", {}).values():
        if len(value) > 63:
            words = f'metadata.labels: Invalid value: "{value}": must be no more than 63 bytes'
            raise Status(422, "Invalid", invalid + words, (("FieldValueInvalid", "metadata.labels"),))
    text = json.dumps({**body, "metadata": {}})
    twice = first_duplicate(text, kind)
    if twice:
        path, key = twice
        words = f"{invalid}{path}: Duplicate value: {json.dumps(key)}"
        raise Status(422, "Invalid", words, (("FieldValueDuplicate", path),))
    problem = first_problem(text, kind)
    if problem is not None:
        raise broken_schema(invalid, problem)


@cache
def first_problem(text: str, kind: str) -> Any:
    """What the schema of a kind first finds in the JSON of one; None where it finds nothing."""
    return next(Draft4Validator(plain_schema(kind)).iter_errors(json.loads(text)), None)


@cache
def first_duplicate(text: str, kind: str) -> tuple[str, Any] | None:
    """Where the JSON of an object has two items of one key in a list that is a map by it, and the key."""
    return next(duplicates(json.loads(text), plain_schema(kind)), None)


def duplicates(value: Any, schema: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The paths of items whose key an item before them has, and the keys."""
    if isinstance(value, list):
        names = schema.get("x-kubernetes-list-map-keys", [])
        seen: list[Any] = []
        for number, item in enumerate(value):
            here = f"{path}[{number}]"
            key = {name: item[name] for name in names if name in item}
            if key and key in seen:
                yield here, key
            seen.append(key)
            yield from duplicates(item, schema.get("items", {}), here)
    elif isinstance(value, dict):
        for name, item in value.items():
            inner = schema.get("properties", {}).get(name, {})
            yield from duplicates(item, inner, f"{path}.{name}".removeprefix("."))


def broken_schema(invalid: str, problem: Any) -> Status:
    """The answer to an object that its schema does not fit."""
    path = problem.json_path.removeprefix("$.")
    if problem.validator == "required":
        missing = re.sub(r"^'(\w+)'.*", r"\1", problem.message)
        path = f"{path}.{missing}"
        kind, words = "FieldValueRequired", "Required value"
    elif problem.validator == "enum":
        supported = ", ".join(f'"{value}"' for value in problem.validator_value)
        kind, words = (
            "FieldValueNotSupported",
            f'Unsupported value: "{problem.instance}": supported values: {supported}',
        )
    else:
        kind = "FieldValueTypeInvalid"
        words = f'Invalid value: "integer": {path} in body must be of type {problem.validator_value}: "integer"'
    return Status(
        422, "Invalid", f"{invalid}[{path}: {words}, {REST}]", ((kind, path), ("FieldValueInvalid", "<nil>"))
    )


def exceeded_quota(collection: str, name: str, most: int) -> Status:
    """The answer to one object more than a quota has."""
    count = f"count/{collection}.ray.io"
    words = f"exceeded quota: q, requested: {count}=1, used: {count}={most}, limited: {count}={most}"
    return Status(403, "Forbidden", f'{collection}.ray.io "{name}" is forbidden: {words}')


def unknown_fields(value: Any, schema: Any, path: str = "") -> set[str]:
    """The paths of fields that a schema does not have; metadata has one of its own."""
    if isinstance(value, list):
        return set().union(*(unknown_fields(item, schema.get("items", {}), f"{path}[]") for item in value))
    properties = schema.get("properties")
    if not isinstance(value, dict) or properties is None:
        return set()
    unknown: set[str] = set()
    for key, item in value.items():
        inner = f"{path}.{key}".removeprefix(".")
        if inner == "metadata":
            continue
        if key not in properties:
            unknown.add(inner)
        else:
            unknown |= unknown_fields(item, properties[key], inner)
    return unknown


def without_unknown(value: Any, schema: Any, path: str = "") -> Any:
    """A value without the fields that its schema does not have."""
    if isinstance(value, list):
        return [without_unknown(item, schema.get("items", {}), f"{path}[]") for item in value]
    properties = schema.get("properties")
    if not isinstance(value, dict) or properties is None or path == ".metadata":
        return value
    return {
        key: without_unknown(item, properties[key], f"{path}.{key}")
        for key, item in value.items()
        if key in properties
    }
