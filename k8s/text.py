"""Manifests as text that any reader of YAML takes for the same data."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

# Readers of YAML differ in what they take for a number or a truth value (`0o17`, `y`): all else is quoted.
_UNQUOTED = re.compile(r"[A-Za-z][\w./-]{2,}", re.ASCII)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that could be taken for something else, and repeats what occurs twice."""

    def ignore_aliases(self, _data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if _UNQUOTED.fullmatch(text) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """A manifest in YAML, in ASCII, its keys in the order that they have."""
    one_line = 1 << 16  # characters: no text is folded
    return yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, width=one_line)


def manifests_text(manifests: Iterable[Mapping[str, Any]]) -> str:
    """Several manifests, as one stream of documents."""
    return "---\n".join(map(manifest_text, manifests))


def manifest_in(text: str) -> dict[str, Any]:
    """The manifest that a text of one has."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    manifest: dict[str, Any] = yaml.load(text, Loader=loader)
    return manifest
