"""What a worker ended with, so that it can travel: as text for people, and as names of types to judge it by."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

_BASES_OF_ALL = (object, BaseException, Exception)


@dataclass(frozen=True)
class Failure:
    """An exception as text and the qualified names of its class and its bases, nearest first.

    What Ray says was the cause follows behind. Without types: a process that ended without a word. `preempted`: Ray
    knows that the node was taken away.
    """

    text: str
    types: tuple[str, ...] = ()
    preempted: bool = False

    def dump(self) -> dict[str, Any]:
        """The failure as plain data, which `load_failure` reads."""
        return asdict(self)


def load_failure(record: dict[str, Any]) -> Failure:
    """The failure in plain data, as `dump` made it."""
    text: str = record["text"]
    types: Sequence[str] = record["types"]
    preempted: bool = record["preempted"]
    return Failure(text, tuple(types), preempted)


def types_of(error: BaseException) -> tuple[str, ...]:
    """The qualified names of an exception's class and of its bases, like `builtins.ValueError`, nearest first."""
    names = []
    for ancestor in type(error).__mro__:
        if ancestor not in _BASES_OF_ALL:
            names.append(f"{ancestor.__module__}.{ancestor.__qualname__}")
    return tuple(names)
