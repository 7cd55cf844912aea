"""What of the cluster on this machine is alive, in words for a person: pairs of a label and a text."""

from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.terminal.status_text import Fact


def state_lines(state: Mapping[str, Any]) -> Iterator[Fact]:
    """What there is to say of `Local.state()`."""
    yield "supervisor", _process(state["supervisor"], "does not run; the next submission starts it")
    head = _process(state["head"], "does not run; the supervisor starts it for a run")
    if state["address"]:
        head += f", at {state['address']}"
    yield "Ray's head", head
    if state["trouble"]:
        yield "trouble", state["trouble"]
    capacity = state["capacity"]
    yield "workers", f"{capacity.free} of {capacity.total} {capacity.kind} free"
    yield "controllers", _by_run(state["controllers"], "none")
    yield "queued", "\n".join(state["queued"]) or "no run waits"
    if state["damaged"]:
        yield "damaged", _by_run(state["damaged"], "")


def _process(pid: int | None, otherwise: str) -> str:
    """That a process runs, by its id; where there is none, what to say instead."""
    return f"runs as process {pid}" if pid else otherwise


def _by_run(by_run: Mapping[str, int | str], otherwise: str) -> str:
    """A line for each run, with what there is of it: the process of its controller, or what is damaged."""
    lines = []
    for run_id, what in by_run.items():
        fact = f"process {what}" if isinstance(what, int) else what
        lines.append(f"{run_id}: {fact}")
    return "\n".join(lines) or otherwise
