"""SLURM's commands, as they are run on this machine."""

import subprocess

from clusters.base import Unreachable
from clusters.slurm_environment import slurm_environment

_TIMEOUT_S = 60.0
_ERROR_LINES = 3  # of an error: a site's own words come before SLURM's
Ran = subprocess.CompletedProcess[str]


class NoAnswer(Unreachable):
    """A command of SLURM did not end in time: slurmctld may have heard it, and may hear the next one."""


def call_slurm(command: list[str], text: str = "", timeout_s: float = _TIMEOUT_S) -> Ran:
    """Run a command of SLURM, with a text as its input.

    Raises NoAnswer where it does not end, and Unreachable where it cannot be started: it is not here.
    """
    try:
        return subprocess.run(
            command,
            input=text,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env=slurm_environment(),
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"SLURM: {command[0]}: no answer within {timeout_s:.0f} s") from None
    except OSError as error:
        raise Unreachable(f"SLURM: {command[0]}: {error.strerror}") from None


def printed(ran: Ran) -> str:
    """What a command of SLURM printed; raises Unreachable where it failed, as a repetition may not."""
    if ran.returncode == 0:
        return ran.stdout
    name = ran.args[0]
    lines = ran.stderr.strip().splitlines()
    said = []
    for line in lines[-_ERROR_LINES:] or [f"exit code {ran.returncode}"]:
        without_name = line.removeprefix(f"{name}: ")
        said.append(without_name.removeprefix("error: "))
    raise Unreachable(f"SLURM: {name}: {'; '.join(said)}")


def ask_slurm(command: list[str]) -> str:
    """What a command of SLURM prints; raises Unreachable."""
    return printed(call_slurm(command))
