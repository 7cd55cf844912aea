"""What commands print besides their tables: JSON, warnings, what was submitted, how far a look at rows has come."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.terminal.wrapped import wrapped_lines

if TYPE_CHECKING:
    from orchestrator.submit import Submission

_COLUMNS = 80  # of a terminal that does not say how many it has
_LATER_INDENT = "  "  # of the later lines of a text that is longer than one
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def announce_submission(submission: "Submission") -> None:
    """Print the run id of a submission, and what it warns of."""
    clear_count()
    for warning in submission.warnings:
        warn(warning)
    if submission.why:
        tell(f"cluster {submission.cluster} was chosen ({submission.why})")
    if submission.adopted:
        tell("this run was submitted before; going on with it")
    print(submission.run_id, flush=True)


def warn(warning: str) -> None:
    """Print a warning where it does not mix with what is asked for."""
    tell(f"warning: {warning}")


def tell(text: str) -> None:
    """Print a text for people on standard error; where that is a terminal, no line ends within a word."""
    if sys.stderr.isatty():
        size = os.get_terminal_size(sys.stderr.fileno())
        lines = wrapped_lines(text, size.columns or _COLUMNS, _LATER_INDENT)
        text = "\n".join(lines)
    print(text, file=sys.stderr, flush=True)


def announce_json(submission: "Submission") -> None:
    """Print a submission as JSON, with what it warns of."""
    print_json(
        {
            "run_id": submission.run_id,
            "run_dir": str(submission.run_dir),
            "cluster": submission.cluster,
            "adopted": submission.adopted,
            "warnings": submission.warnings,
        }
    )


def count_rows(source: str, rows: int) -> None:
    """Show how far a look at the data has come, where somebody watches."""
    if sys.stderr.isatty():
        name = Path(source).name
        line = f"\x1b[2K{name}: {rows:,} rows"
        print(line, end="\r", file=sys.stderr, flush=True)


def count_bytes(file: str, done: int, total: int) -> None:
    """Show how far a file has come on its way to another machine, where somebody watches."""
    if not sys.stderr.isatty():
        return
    share = 100 * done // max(1, total)
    done_mb = done / 1e6
    total_mb = total / 1e6
    line = f"{file}: {done_mb:,.1f} of {total_mb:,.1f} MB, {share} %"
    _replace_line(line)


def count_answers(done: int, total: int) -> None:
    """Show how many questions of an evaluation are answered, where somebody watches."""
    if sys.stderr.isatty():
        _replace_line(f"{done:,} of {total:,} questions answered")


def count_methods(method: str, number: int, of: int) -> None:
    """Show which method is planned of how many, where somebody watches."""
    if sys.stderr.isatty():
        _replace_line(f"planning {method}, {number} of {of} methods")


def _replace_line(text: str) -> None:
    """Write a line over the one before, on a terminal's standard error."""
    line = f"\x1b[2K{text}"
    print(line, end="\r", file=sys.stderr, flush=True)


def count_delivered(cluster: str, runs: int) -> None:
    """Show how many runs of a cluster MLflow was brought, where somebody watches."""
    if sys.stderr.isatty():
        line = f"\x1b[2K{cluster}: {runs:,} runs brought to MLflow"
        print(line, end="\r", file=sys.stderr, flush=True)


def warn_of_undelivered(undelivered: Mapping[str, str]) -> None:
    """Print what of runs and clusters is not in MLflow, and why."""
    clear_count()
    for name, why in undelivered.items():
        warn(f"{name} is not, or not wholly, in MLflow: {why}")


def clear_count() -> None:
    """Take away what `count_rows` has shown."""
    if sys.stderr.isatty():
        print("\x1b[2K", end="", file=sys.stderr, flush=True)


def print_json(data: Any) -> None:
    """Print plain data as JSON on standard output."""
    text = json.dumps(data, indent=1)
    print(text, flush=True)
