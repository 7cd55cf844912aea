"""The peak memory of a worker, by a dry run of the trainer in a process of its own, which needs torch and no GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


class DryRunner:
    """A process that answers what jobs on a base would hold."""

    def __init__(self, child: "subprocess.Popen[str]", config: BaseConfig, sample: Sample | None) -> None:
        self._child = child
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
        answer = self._ask(request)
        if "problem" in answer:
            raise DryRunFailed(answer["problem"])
        parts: BytesByPart = answer["bytes"]
        return parts

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        child = self._child
        assert child.stdin and child.stdout
        line = json.dumps(request)
        with suppress(BrokenPipeError):
            child.stdin.write(f"{line}\n")
            child.stdin.flush()
        said = child.stdout.readline()
        if not said:
            raise DryRunFailed("its process ended")
        answer: dict[str, Any] = json.loads(said)
        return answer


@contextmanager
def dry_runner(config: BaseConfig, sample: Sample | None) -> Iterator[DryRunner]:
    """Within it, dry runs on a base of this config.json can be asked for.

    `sample` has the tokens and labels of some examples.
    """
    child = subprocess.Popen(
        TRIAL,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=unshadowed(os.environ),
        text=True,
    )
    with child:
        yield DryRunner(child, config, sample)
        child.kill()  # it has nothing to write any more, and its end takes a while
