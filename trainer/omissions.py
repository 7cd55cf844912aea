"""What a run that trained well could not deliver beside its weights, and why."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from runfolder.appended import read_lines
from runfolder.chain import Attempt


def omissions(attempt: Attempt) -> list[str]:
    """A line for each thing that this attempt could not deliver."""
    lines = []
    for event in read_lines(attempt, "events.jsonl"):
        if event["event"] == "missing":
            lines.append(f"{event['what']} is missing: {event['why']}")
    return lines


def omissions_line(attempt: Attempt) -> str:
    """What is missing in one line; empty where all is there."""
    return "; ".join(omissions(attempt))


def note_omission(attempt: Attempt, what: str, why: str) -> None:
    """Keep in the attempt's events that something is missing, and say it in the log.

    Where not even that can be written, as on a full disk, what there is must be delivered all the same.
    """
    with suppress(OSError):
        attempt.event("missing", what=what, why=why)
    with suppress(OSError):
        print(f"{what} is missing: {why}", flush=True)


@contextmanager
def dispensable(attempt: Attempt, what: str) -> Iterator[None]:
    """Within it any error is noted, with its traceback in the log, and the run goes on without `what`."""
    try:
        yield
    except Exception as error:
        with suppress(OSError):
            traceback.print_exc()
        kind = type(error).__name__
        words = f"{kind}: {error}".split()
        text = " ".join(words)
        note_omission(attempt, what, text[:1000])
