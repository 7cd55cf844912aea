"""The peak memory of a worker, by a dry run of the trainer in a process of its own, which needs torch and no GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from contextlib import suppress
from typing import Any

from fleetune_start import unshadowed
from methods.options.base import BaseConfig
from runfolder.job import Job
from trainer.data.survey import Sample

TRIAL = [sys.executable, "-P", "-m", "trainer.dry_run"]  # the child, which answers requests line by line
_IMPORTED = ("torch", "transformers", "peft", "numpy", "pyarrow")

BytesByPart = dict[str, int]  # bytes by what they are for


class DryRunFailed(Exception):
    """A dry run that came to no end, and why, in one line."""


def can_dry_run() -> bool:
    """Whether what a dry run imports is installed here."""
    found = map(importlib.util.find_spec, _IMPORTED)
    return all(found)


class DryRunProcess:
    """A process that answers requests for dry runs; leaving it as a context manager ends the process."""

    _child: "subprocess.Popen[str] | None" = None

    def start(self) -> None:
        """Have it import what dry runs need, which takes seconds, while something else is done."""
        if self._child is not None:
            return
        self._child = subprocess.Popen(
            TRIAL,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=unshadowed(os.environ),
            text=True,
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request; raises DryRunFailed where the process ends without one."""
        self.start()
        child = self._child
        assert child and child.stdin and child.stdout
        line = json.dumps(request)
        with suppress(BrokenPipeError):
            child.stdin.write(f"{line}\n")
            child.stdin.flush()
        said = child.stdout.readline()
        if not said:
            self.stop()
            raise DryRunFailed("its process ended")
        answer: dict[str, Any] = json.loads(said)
        return answer

    def stop(self) -> None:
        """End the process, if there is one."""
        child = self._child
        if child is None:
            return
        self._child = None
        child.kill()  # it has nothing to write any more, and its end takes a while
        with suppress(BrokenPipeError):
            child.communicate()

    def __enter__(self) -> "DryRunProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class DryRunner:
    """Dry runs of jobs on one base, for some of whose examples `sample` has the tokens and labels."""

    def __init__(self, process: DryRunProcess, config: BaseConfig, sample: Sample | None) -> None:
        self._process = process
        self._config = dict(config)
        self._sample = sample

    def parts(self, job: Job, precision: str, fast: bool, tried: bool = False) -> BytesByPart:
        """What a worker has allocated in its worst moment; raises DryRunFailed.

        `tried`: the sample is the longest micro-batch, of which forward and backward passes alone count.
        """
        sample = self._sample
        if sample is None:  # rows that nobody has looked at may all be full
            sample = ((job.data.seq_len, job.data.seq_len - 1),)
        request = {
            "job": job.dump(),
            "config": self._config,
            "sample": sample,
            "precision": precision,
            "fast": fast,
            "tried": tried,
        }
        answer = self._process.ask(request)
        if "problem" in answer:
            raise DryRunFailed(answer["problem"])
        parts: BytesByPart = answer["bytes"]
        return parts
