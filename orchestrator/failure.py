"""What a worker ended with, so that it can travel: as text for people, and as names of types to judge it by."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

_OF_ALL = (object, BaseException, Exception)


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
        """As plain data that `load` reads."""
        return asdict(self)


def load(found: dict[str, Any]) -> Failure:
    """The failure in plain data."""
    types: Sequence[str] = found["types"]
    return Failure(found["text"], tuple(types), found["preempted"])


def types_of(error: BaseException) -> tuple[str, ...]:
    """The qualified names of an exception's class and of its bases, like `builtins.ValueError`, nearest first."""
    return tuple(f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__ if kind not in _OF_ALL)
