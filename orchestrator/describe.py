"""What the methods are, as plain data: their options, defaults and meaning, and what was seen to work."""

import json
from importlib.resources import files
from typing import Any

from methods.options import KINDS, Options
from orchestrator.errors import InputError

CAPABILITIES = ("train", "accumulate", "packed", "resume", "reshard", "merge", "export")


def methods(kind: str | None = None) -> list[dict[str, Any]]:
    """One record per method: kind, what it does, default learning rate, options, support; raises InputError."""
    if kind not in (None, *KINDS):
        allowed = ", ".join(KINDS)
        raise InputError(f"found the method {kind!r}; allowed: {allowed}")
    support_file = files("methods") / "support.json"
    seen = json.loads(support_file.read_text())
    unseen = {"stages": {}, "commit": "none"}
    descriptions = []
    for name, options in KINDS.items():
        if kind in (None, name):
            descriptions.append(_method_record(options, seen.get(name, unseen)))
    return descriptions


def support(method: dict[str, Any]) -> list[str]:
    """What is known of a method's capabilities: ZeRO stages, or that it is refused."""
    cells = []
    for name in CAPABILITIES:
        cells.append(_cell(method["support"][name]))
    return cells


def _cell(seen: dict[str, Any]) -> str:
    """What was seen of one capability of a method, in a few characters."""
    if "refused" in seen:
        return "refused"
    stages = seen["zero"]
    if not stages:
        return "not run"
    if stages == [0, 1, 2, 3]:
        return "ZeRO 0-3"
    return f"ZeRO {', '.join(map(str, stages))}"


def _method_record(options: type[Options], seen: dict[str, Any]) -> dict[str, Any]:
    """The record of one method, from its options and from what support.json says was seen of it."""
    docstring = (options.__doc__ or "").strip()
    return {
        "kind": options.model_fields["kind"].default,
        "summary": docstring.split("\n")[0],
        "lr": options.default_lr,
        "options": _option_records(options),
        "support": _support_records(options, seen["stages"]),
        "support_commit": seen["commit"],
    }


def _option_records(options: type[Options]) -> dict[str, Any]:
    records = {}
    for name, field in options.model_fields.items():
        if name != "kind":
            records[name] = {"default": field.default, "description": field.description}
    return records


def _support_records(options: type[Options], stages: dict[str, list[int]]) -> dict[str, Any]:
    """By capability why it is refused, or the ZeRO stages at which it was seen to work."""
    records: dict[str, Any] = {}
    for name in CAPABILITIES:
        if name in options.refusals:
            records[name] = {"refused": options.refusals[name]}
        else:
            records[name] = {"zero": stages.get(name, [])}
    return records
