"""A rank that trains the runs named on its standard input, a line each, and answers each with a line."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from trainer.__main__ import main


def named() -> Iterator[Path]:
    """The runs as they are asked for; asking for the next one means that the last is done."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the trainer prints goes to the log
    for line in sys.stdin:
        yield Path(line.removesuffix("\n"))
        print("done", file=answers, flush=True)


if __name__ == "__main__":
    main(named())
