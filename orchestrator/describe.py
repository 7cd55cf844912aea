"""What the methods are, as plain data: their options, defaults and meaning."""

from typing import Any

from methods.options import ALL, Options


def methods() -> list[dict[str, Any]]:
    """One record per method: kind, what it does, default learning rate, options."""
    return [_method(options) for options in ALL]


def _method(options: type[Options]) -> dict[str, Any]:
    return {
        "kind": options.model_fields["kind"].default,
        "summary": (options.__doc__ or "").strip().split("\n")[0],
        "lr": options.default_lr,
        "options": {
            name: {"default": field.default, "description": field.description}
            for name, field in options.model_fields.items()
            if name != "kind"
        },
    }
