"""Commands that are run to see what they say, with what was wrong where they do not end well."""

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_SRUN = re.compile(r"srun: error: \S+: task \S+: Exited")  # after what the program itself said


@dataclass(frozen=True)
class Probe:
    """What a command printed; `problem` is why it did not end well, in one line."""

    output: str
    problem: str = ""


def probe(
    command: Sequence[str], timeout_s: float, environment: Mapping[str, str] | None = None, error_lines: int = 1
) -> Probe:
    """Run a command for at most so long, in this environment, None: that of this process.

    Its problem has at most so many of the last lines of its errors.
    """
    try:
        ended = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env=environment,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return Probe("", f"{command[0]} did not answer within {timeout_s:.0f} s")
    except OSError as error:
        return Probe("", f"{command[0]}: {error.strerror}")
    problem = ""
    if ended.returncode:
        lines = [line.strip() for line in ended.stderr.splitlines() if line.strip() and not _SRUN.match(line)]
        problem = "; ".join(lines[-error_lines:]) or f"{command[0]}: exit code {ended.returncode}"
    return Probe(ended.stdout, problem)
