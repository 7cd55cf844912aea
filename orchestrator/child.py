"""A child process that is asked on its stdin and answers on its stdout, line by line."""

import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, NamedTuple

from fleetune_start import unshadowed


class AskedChild(NamedTuple):
    """A child process, its ends of both, and the file of what it says on stderr."""

    process: "subprocess.Popen[str]"
    questions: IO[str]
    answers: IO[str]
    errors: IO[str]


@contextmanager
def asked_child(command: Sequence[str]) -> Iterator[AskedChild]:
    """A child process of ours, which is ended when this is left."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=unshadowed(os.environ),
            text=True,
        )
        try:
            assert process.stdin and process.stdout
            yield AskedChild(process, process.stdin, process.stdout, errors)
        finally:
            process.kill()
            process.wait()
