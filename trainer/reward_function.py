"""A reward that is a user's function: asked in a process of its own, within a time limit, and shown when it fails."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fleetune_start import unshadowed

CHILD = Path(__file__).with_name("reward_child.py")
LOADING_S = 120.0  # that the file may take to be loaded: it may import much
_ENDING_S = 2.0  # that a process may take from the end of its output to its own
_BLOCK = 65536
_SHOWN_OF_SAMPLE = 200  # characters of a sample's texts in an error
Arguments = Mapping[str, Any]


class RewardFailed(ValueError):
    """A user's reward function raised, took too long, gave no finite number, or is no function of its arguments."""


class RewardProcess:
    """The process in which a function is called, one call at a time."""

    def __init__(self, file: str, function: str, seconds: float) -> None:
        """Start it and load the file; raises RewardFailed where that fails."""
        self._name = f"objective.reward {file}:{function}"
        self._seconds = seconds
        command = [sys.executable, "-I", str(CHILD), file, function, str(seconds)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=unshadowed(os.environ),
            start_new_session=True,
        )
        self._unread = b""
        loaded = self._answer(LOADING_S)
        if "value" not in loaded:
            problem = loaded["problem"]
            raise RewardFailed(f"{self._name}: {problem}")

    def value(self, arguments: Arguments, journal: Path | None = None, key: str | None = None) -> float:
        """What the function gives, which its process keeps in a journal under a key, if there is one.

        Raises RewardFailed, with the sample.
        """
        question = {"arguments": arguments, "journal": str(journal), "key": key}
        line = json.dumps(question, default=str) + "\n"
        questions = self._process.stdin
        assert questions is not None
        with suppress(BrokenPipeError):  # it has ended, which its answer tells
            questions.write(line.encode())
            questions.flush()
        found = self._answer(self._seconds)
        if "value" in found:
            return float(found["value"])
        problem = found["problem"]
        raise RewardFailed(f"{self._name}: {problem}; sample: {shown(arguments)}")

    def check_repeats(self, arguments: Arguments) -> None:
        """Raise RewardFailed where the function gives two values for one sample."""
        first = self.value(arguments)
        second = self.value(arguments)
        if first != second:
            raise RewardFailed(
                f"{self._name}: gave {first} and then {second} for one sample, so a run could not be repeated; "
                f"allowed: a function of its arguments; sample: {shown(arguments)}"
            )

    def end(self) -> None:
        """End the process, and what it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _answer(self, seconds: float) -> dict[str, Any]:
        """The next line of the process, as JSON; where there is none in time, the process is ended."""
        answers = self._process.stdout
        assert answers is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._unread:
            left = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([answers], [], [], left)
            if not ready:
                self.end()
                return {"problem": f"took longer than {seconds:g} s (objective.reward_seconds)"}
            block = os.read(answers.fileno(), _BLOCK)
            if not block:
                with suppress(subprocess.TimeoutExpired):  # it is ending by itself, with a status that says why
                    self._process.wait(_ENDING_S)
                self.end()
                status = self._process.returncode
                return {"problem": f"ended its process (status {status})"}
            self._unread += block
        line, _, self._unread = self._unread.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found


def shown(arguments: Arguments) -> str:
    """A sample in one line, its texts cut."""
    parts = []
    for name, value in arguments.items():
        text = repr(value)
        if len(text) > _SHOWN_OF_SAMPLE:
            text = text[:_SHOWN_OF_SAMPLE] + "..."
        parts.append(f"{name} {text}")
    return ", ".join(parts)
