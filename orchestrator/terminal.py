"""What commands print besides their tables: JSON, warnings, what was submitted, how far a look at rows has come."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from orchestrator.submit import Submission

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def announce(done: "Submission") -> None:
    """Print the run id of a submission, and what it warns of."""
    clear_count()
    for warning in done.warnings:
        warn(warning)
    if done.adopted:
        print("this run was submitted before; going on with it", file=sys.stderr)
    print(done.run_id, flush=True)


def warn(warning: str) -> None:
    """Print a warning where it does not mix with what is asked for."""
    print(f"warning: {warning}", file=sys.stderr)


def announce_json(done: "Submission") -> None:
    """Print a submission as JSON."""
    found = {"run_id": done.run_id, "run_dir": str(done.run_dir), "adopted": done.adopted}
    print_json({**found, "warnings": done.warnings})


def count_rows(source: str, done: int) -> None:
    """Show how far a look at the data has come, where somebody watches."""
    if sys.stderr.isatty():
        print(f"\x1b[2K{Path(source).name}: {done:,} rows", end="\r", file=sys.stderr, flush=True)


def clear_count() -> None:
    """Take away what `count_rows` has shown."""
    if sys.stderr.isatty():
        print("\x1b[2K", end="", file=sys.stderr, flush=True)


def print_json(found: Any) -> None:
    """Print plain data."""
    print(json.dumps(found, indent=1), flush=True)
