"""Calls a user's reward function in a process of its own: `python -I reward_child.py FILE FUNCTION SECONDS`.

Each line of stdin is a JSON object with the function's arguments; the line that answers it is {"value": number}, or
{"problem": text}. A value whose answer has a key is first kept in the journal of its step: who has asked may be gone.
The journal is locked for as long as a call takes, so that who comes after waits for its value. The calls are made in
a process below this one: Ray kills the children of a worker that it ends, and what is under way then is to be kept.
What the function prints goes to stderr, and it finds stdin empty, as do programs that it starts. Nothing of Fleetune
is imported here, so that neither hides the other's modules, and what a model wrote is an argument, never code.
"""

import fcntl
import importlib.util
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

_MODULE = "fleetune_reward_of_user"  # what a user's file is called as a module
_GRACE_S = 5.0  # than allowed, after which a call ends this process, should nobody be left to do so
_LONGEST_LOADING_S = 120 + _GRACE_S
_PROBLEM_LENGTH = 300  # characters of what a function raised
_SYNCED_S = 1.0  # between two times at which what is kept is made to survive a crash of the machine


def load_function(file: str, name: str) -> Callable[..., Any]:
    """The function of this name in a file, whose module has a name that nobody else has."""
    spec = importlib.util.spec_from_file_location(_MODULE, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    function: Callable[..., Any] = getattr(module, name)
    return function


def called(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """What comes of a call: a finite number as it is, anything else as a problem."""
    try:
        value = function(**arguments)
    except Exception as error:
        kind = type(error).__name__
        return {"problem": f"raised {kind}{raised_in_line(error)}: {one_line(str(error))}"}
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):  # None, a text, a number without end
        number = math.nan
    if not math.isfinite(number):
        return {"problem": f"gave {one_line(repr(value))}, allowed: a finite number"}
    return {"value": number}


def raised_in_line(error: Exception) -> str:
    """The line of the user's file in which an error came up, or what it called did; empty where there is none."""
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__") == _MODULE:
            found = f" in line {line}"
    return found


def one_line(text: str) -> str:
    """The beginning of a text, in one line that any terminal and file can hold."""
    words = text.split()
    line = " ".join(words)
    shown = ""
    for letter in line[:_PROBLEM_LENGTH]:
        shown += letter if letter.isprintable() else "?"
    return shown


class Journal:
    """A file of values, a line each, that is locked while a call is under way."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._stream = open(path, "ab")  # noqa: PTH123, SIM115 (nothing but what a call takes is imported)
        self._synced = time.monotonic()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Within it, nobody else has the lock; where the file system knows no locks, it is as before."""
        with suppress(OSError):
            fcntl.flock(self._stream, fcntl.LOCK_EX)
        yield
        with suppress(OSError):
            fcntl.flock(self._stream, fcntl.LOCK_UN)

    def keep(self, key: str, value: float) -> None:
        """Append the value of a key."""
        kept = {"key": key, "value": value}
        line = json.dumps(kept) + "\n"
        self._stream.write(line.encode())
        self._stream.flush()
        now = time.monotonic()
        if now - self._synced >= _SYNCED_S:
            os.fsync(self._stream)
            self._synced = now

    def close(self) -> None:
        """Have no more values to keep."""
        self._stream.close()


def main() -> None:
    """Have a child do the work, and end as it does."""
    child = os.fork()
    if not child:
        judge_until_end()
        return
    os.close(0)
    os.close(1)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:  # by a signal
        own = os.getpid()
        os.kill(own, -code)
    sys.exit(code)


def judge_until_end() -> None:
    """Load the function, and answer calls until stdin ends."""
    file, name, seconds = sys.argv[1:]
    longest = float(seconds) + _GRACE_S
    questions = os.fdopen(os.dup(0))
    answers = os.fdopen(os.dup(1), "w")
    with open(os.devnull) as nothing:  # noqa: PTH123 (nothing but what a call takes is imported)
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    signal.setitimer(signal.ITIMER_REAL, _LONGEST_LOADING_S)
    try:
        function = load_function(file, name)
    except Exception as error:
        kind = type(error).__name__
        print(json.dumps({"problem": f"cannot be loaded: {kind}: {one_line(str(error))}"}), file=answers, flush=True)
        return
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(json.dumps({"value": 0.0}), file=answers, flush=True)
    answer_calls(function, longest, questions, answers)


def answer_calls(
    function: Callable[..., Any],
    longest: float,
    questions: TextIO,
    answers: TextIO,
) -> None:
    """Answer calls, a line each; one that takes longer than so many seconds ends this process."""
    journal: Journal | None = None
    for line in questions:
        question = json.loads(line)
        arguments = question["arguments"]
        key = question["key"]
        if key is None:
            found = timed(function, arguments, longest)
        else:
            journal = journal_at(question["journal"], journal)
            with journal.locked():
                found = timed(function, arguments, longest)
                if "value" in found:
                    journal.keep(key, found["value"])
        answer = json.dumps(found)
        print(answer, file=answers, flush=True)


def journal_at(path: str, last: Journal | None) -> Journal:
    """The journal at a path, which may be the one of the last call."""
    if last is not None:
        if last.path == path:
            return last
        last.close()
    return Journal(path)


def timed(function: Callable[..., Any], arguments: dict[str, Any], longest: float) -> dict[str, Any]:
    """What comes of a call, unless it takes so many seconds."""
    signal.setitimer(signal.ITIMER_REAL, longest)
    found = called(function, arguments)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return found


if __name__ == "__main__":
    main()
