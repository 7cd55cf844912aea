"""The folder by which the nodes of an allocation find each other, below FLEETUNE_HOME, which they share.

Where its owner, who keeps the allocation, is killed, it stays, with Ray's token in it. It is removed by any later
start that knows the owner for dead: as a process of its own host, or as SLURM has the job no more. So a node that is
cut off and lives on keeps its folder until its job has ended.
"""

import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from clusters.base import Unreachable
from clusters.holder import current_holder, parse_holder
from clusters.slurm_commands import ask_slurm

_OWNER = "owner"
_FOLDER_OF_JOB = re.compile(r"\.ray-(\d+)-\w+")  # of SLURM's job


def make_node_folder(home: Path) -> Path:
    """A new folder of this process's job; first those of dead owners are removed."""
    _remove_folders_of_the_dead(home)
    folder = Path(tempfile.mkdtemp(prefix=f".ray-{os.environ['SLURM_JOB_ID']}-", dir=home))
    (folder / _OWNER).write_bytes(current_holder().dump())
    return folder


def remove_folders_of_job(home: Path, job_id: str) -> None:
    """Remove what the starts of a job left, once its run has ended."""
    for folder in home.glob(f".ray-{job_id}-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _remove_folders_of_the_dead(home: Path) -> None:
    """Remove the folders of dead owners."""
    elsewhere = {}
    for folder in home.glob(".ray-*"):
        is_dead = _is_dead_here(folder)
        found = _FOLDER_OF_JOB.fullmatch(folder.name)
        if is_dead:
            shutil.rmtree(folder, ignore_errors=True)
        elif is_dead is None and found:
            elsewhere[folder] = found[1]
    if not elsewhere:
        return
    with suppress(Unreachable):
        live = ask_slurm(["squeue", "--me", "--noheader", "--format=%A"]).split()
        for folder, job_id in elsewhere.items():
            if job_id not in live:
                shutil.rmtree(folder, ignore_errors=True)


def _is_dead_here(folder: Path) -> bool | None:
    """Whether the owner of a folder is dead; None where that is not for this host to know."""
    with suppress(OSError):  # it has none yet, or was just removed
        owner = parse_holder((folder / _OWNER).read_bytes())
        if owner and owner.here:
            return not owner.lives
    return None
