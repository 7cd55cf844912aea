"""The variables that a batch script may export, which is kept whole by slurmctld."""

import json
import re

from clusters.base import SubmissionRefused

# Variables that bash keeps for itself, whatever a script exports, and those by which a job knows what it is.
_NOT_OURS = re.compile(
    "BASHOPTS|BASHPID|BASH_(ARGV0|COMMAND|SUBSHELL|VERSINFO)|DIRSTACK|EPOCH(REALTIME|SECONDS)|EUID|FUNCNAME|GROUPS"
    "|HISTCMD|LINENO|PPID|S?RANDOM|SECONDS|SHELLOPTS|SHLVL|UID|_|SLURM.*"
)
_LONGEST_ENVIRONMENT = 1 << 20  # characters: slurmctld keeps every script, and takes 4 MiB


def check_variables(environment: dict[str, str]) -> None:
    """Raise SubmissionRefused for variables that a job cannot have, and for more of them than a script can hold."""
    for name in environment:
        if _NOT_OURS.fullmatch(name):
            raise SubmissionRefused(f"env: found {name!r}, which is SLURM's or bash's own; allowed: other names")
    size = len(json.dumps(environment))
    if size > _LONGEST_ENVIRONMENT:
        raise SubmissionRefused(f"env: found {size} characters; allowed: {_LONGEST_ENVIRONMENT}")


def first_on_path(folder: str, others: str) -> str:
    """A search path that begins with a folder."""
    folders = [folder]
    for other in others.split(":"):
        if other and other not in folders:
            folders.append(other)
    return ":".join(folders)
