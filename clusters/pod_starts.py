"""What the pods of a run leave in its folder for each other: which cluster of Ray works, and which pods must end.

KubeRay may make a new cluster while pods of the one before still end: each start of a submission takes the next name
in RUN_DIR/starts, with the name of its cluster in it, and the latest works. A pod that must end leaves its name in
RUN_DIR/leaving.
"""

import os
from pathlib import Path

from clusters.base import number_of_submission
from clusters.job_start import JobStart, latest_noted
from runfolder.files import list_names, refresh

HINDERED_STARTS = 3  # of a submission, in a row, in which no controller made an attempt: then somebody has to look


def is_pod() -> bool:
    """Whether this process is in a pod that Fleetune has made."""
    return bool(os.environ.get("FLEETUNE_POD"))


def own_cluster() -> str:
    """The cluster of Ray that this pod is of."""
    return os.environ["FLEETUNE_RAY_CLUSTER"]


def begin_start(run_dir: Path, name: str) -> JobStart:
    """Note another start of a submission, by this pod's cluster; earlier ones find that it is later."""
    folder = run_dir / "starts"
    folder.mkdir(exist_ok=True)
    submission = number_of_submission(name)
    number = 0
    while True:
        try:
            with (folder / f"{submission}.{number}").open("x") as stream:
                stream.write(own_cluster())
        except FileExistsError:
            number += 1
        else:
            return JobStart(run_dir, submission, number)


def works_now(run_dir: Path) -> bool:
    """Whether the latest start of a run is one of this pod's cluster."""
    folder = run_dir / "starts"
    if not folder.exists():
        return False
    refresh(folder)
    submission, number = latest_noted(folder)
    path = folder / f"{submission}.{number}"
    return path.exists() and path.read_text() == own_cluster()


def note_leaving(run_dir: Path) -> None:
    """Let the entrypoint know that this pod must end."""
    folder = run_dir / "leaving"
    folder.mkdir(exist_ok=True)
    pod = os.environ["FLEETUNE_POD"]
    (folder / f"{own_cluster()}.{pod}").touch()


def leaving_pods(run_dir: Path) -> set[str]:
    """The pods of this cluster that must end, or have."""
    folder = run_dir / "leaving"
    if folder.exists():
        refresh(folder)
    prefix = f"{own_cluster()}."
    return {name.removeprefix(prefix) for name in list_names(folder) if name.startswith(prefix)}
