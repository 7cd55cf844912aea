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
        raise InputError(f"found the method {kind!r}; allowed: {', '.join(KINDS)}")
    seen = json.loads((files("methods") / "support.json").read_text())
    unseen = {"stages": {}, "commit": "none"}
    shown = [(name, options) for name, options in KINDS.items() if kind in (None, name)]
    return [_method(options, seen.get(name, unseen)) for name, options in shown]


def support(method: dict[str, Any]) -> list[str]:
    """What is known of a method's capabilities: ZeRO stages, or that it is refused."""
    return [_cell(method["support"][name]) for name in CAPABILITIES]


def support_table() -> str:
    """Methods and capabilities as Markdown, with the reasons for what is refused."""
    found = methods()
    rows = [["method", *CAPABILITIES, "commit"], ["---"] * (len(CAPABILITIES) + 2)]
    rows += [[f"`{method['kind']}`", *support(method), method["support_commit"]] for method in found]
    reasons = [
        f"- `{method['kind']}`, {name}: {seen['refused']}."
        for method in found
        for name, seen in method["support"].items()
        if "refused" in seen
    ]
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", *reasons])


def _cell(seen: dict[str, Any]) -> str:
    if "refused" in seen:
        return "refused"
    if not seen["zero"]:
        return "not run"
    return "ZeRO 0-3" if seen["zero"] == [0, 1, 2, 3] else f"ZeRO {', '.join(map(str, seen['zero']))}"


def _method(options: type[Options], seen: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": options.model_fields["kind"].default,
        "summary": (options.__doc__ or "").strip().split("\n")[0],
        "lr": options.default_lr,
        "options": {
            name: {"default": field.default, "description": field.description}
            for name, field in options.model_fields.items()
            if name != "kind"
        },
        "support": {
            name: {"refused": options.refusals[name]}
            if name in options.refusals
            else {"zero": seen["stages"].get(name, [])}
            for name in CAPABILITIES
        },
        "support_commit": seen["commit"],
    }
