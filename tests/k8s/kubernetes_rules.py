"""What an API server and a kubelet do with a manifest, as far as tests need it."""

import gzip
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft4Validator

FOLDER = Path(__file__).parent  # of the schemas of ray.io/v1 in KubeRay 1.7, as its CRDs have them


@cache
def plain_schema(kind: str = "RayJob") -> Any:
    """The schema of a kind, with what may be a number or a text said in the words of JSON Schema."""
    packed = FOLDER / f"{kind.lower()}_schema.json.gz"
    return worded(json.loads(gzip.decompress(packed.read_bytes())))


@cache
def validator_of(kind: str) -> Draft4Validator:
    """What the API server checks with strict validation: types, required fields, and that all fields are known."""
    return Draft4Validator(strict(plain_schema(kind)))


def worded(schema: Any) -> Any:
    """A structural schema of Kubernetes in the words of JSON Schema."""
    if isinstance(schema, list):
        return [worded(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {key: worded(part) for key, part in schema.items()}
    if changed.pop("x-kubernetes-int-or-string", False):
        changed.pop("type", None)
        changed |= {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    return changed


def strict(schema: Any) -> Any:
    """A schema whose objects take known fields alone."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {key: strict(part) for key, part in schema.items()}
    is_open = "additionalProperties" in changed or changed.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(schema.get("properties"), dict) and not is_open and "type" in schema:
        changed["additionalProperties"] = False
    return changed


def schema_errors(manifest: Mapping[str, Any]) -> list[str]:
    """What strict validation would refuse, a line for each. `metadata` has a schema of its own in every server."""
    plain = json.loads(json.dumps(manifest))
    plain["metadata"] = {}
    return [
        f"{error.json_path}: {error.message[:200]}" for error in validator_of(manifest["kind"]).iter_errors(plain)
    ]


def expanded(text: str, variables: Mapping[str, str]) -> str:
    """A value as the kubelet sets it: `$(NAME)` replaced where the name is known, `$$` one `$`.

    After k8s.io/kubernetes/third_party/forked/golang/expansion.
    """
    parts = []
    rest = text
    while rest:
        before, dollar, rest = rest.partition("$")
        parts.append(before)
        if not dollar:
            break
        if rest.startswith("$"):
            parts.append("$")
            rest = rest[1:]
        elif rest.startswith("(") and ")" in rest:
            name, _, rest = rest[1:].partition(")")
            parts.append(variables.get(name, f"$({name})"))
        else:
            parts.append("$")
    return "".join(parts)


def variables_in(container: Mapping[str, Any]) -> dict[str, str]:
    """The variables with values that a container has; each may refer to those before it."""
    variables: dict[str, str] = {}
    for variable in container["env"]:
        if "value" in variable:
            variables[variable["name"]] = expanded(variable["value"], variables)
    return variables
