"""RUN_DIR/submissions/NAME, on Kubernetes: a line for each try to make that submission, with its digest.

It is written before the API is asked. So who finds an open run without a RayJob knows whether somebody tried to make
one, how often, and whether this installation would submit it as that one was.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clusters.base import number_of_submission
from clusters.job_start import latest_noted
from runfolder.files import list_names


@dataclass(frozen=True)
class Tried:
    """How often submissions of a run were tried, and number and digest of the last one; 0 and nothing where none."""

    times: int
    number: int = 0
    digest: str = ""


def note_try(run_dir: Path, name: str, digest: str) -> None:
    """Note that a submission is tried; nobody looks for that of a run without its folder."""
    if not run_dir.exists():
        return
    folder = run_dir / "submissions"
    folder.mkdir(exist_ok=True)
    path = folder / name
    with path.open("a") as stream:
        stream.write(f"{digest}\n")


def tried_submissions(run_dir: Path) -> Tried:
    """What was tried of a run; what has started was tried, whoever noted that."""
    folder = run_dir / "submissions"
    started, _ = latest_noted(run_dir / "starts")
    digests: list[str] = []
    number = 0
    for name in sorted(list_names(folder), key=number_of_submission):
        path = folder / name
        number = number_of_submission(name)
        text = path.read_text()
        digests += text.splitlines()
    times = max(len(digests), started)
    if not digests:
        return Tried(times)
    return Tried(times, number, digests[-1])


def answer_of_submissions(root: Path, request: Mapping[str, Any]) -> Any:
    """What another machine asks of the submissions of runs whose folders are below `root`, as plain data."""
    if request["verb"] == "tried":
        tried = {}
        for run_id in request["run_ids"]:
            found = tried_submissions(root / run_id)
            tried[run_id] = vars(found)
        return tried
    run_dir = root / request["run_id"]
    if request["verb"] == "note_try":
        return note_try(run_dir, request["name"], request["digest"])
    submission, _ = latest_noted(run_dir / "starts")
    return submission
