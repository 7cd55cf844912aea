"""Connections on which no request comes: who opens many and says nothing, or never ends a head, keeps out others."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol


class Closable(Protocol):
    """What a connection is closed by."""

    def close(self) -> None:
        """Close it, once what was written is sent."""


class Connection(Protocol):
    """A connection as uvicorn has it: `cycle` is its newest request with its answer, None before the first."""

    cycle: Any
    transport: Closable


@dataclass(frozen=True)
class Idleness:
    """Since when nothing is answered on a connection, and the last request before."""

    cycle: Any
    since: float


class IdleConnections:
    """Closes connections on which no request has come, with all of its head, for too long."""

    def __init__(self, most_s: float) -> None:
        """`most_s` is how long a connection may be open between two requests, or before the first."""
        self._most_s = most_s
        self._idle: dict[int, Idleness] = {}

    def look(self, connections: Iterable[Connection], now_s: float) -> None:
        """Close those that have been idle for too long, by a clock that only goes on."""
        idle: dict[int, Idleness] = {}
        for connection in connections:
            cycle = connection.cycle
            if cycle is not None and not cycle.response_complete:
                continue
            key = id(connection)
            known = self._idle.get(key)
            if known is None or known.cycle is not cycle:
                known = Idleness(cycle, now_s)
            idle[key] = known
            if now_s - known.since > self._most_s:
                connection.transport.close()
        self._idle = idle
