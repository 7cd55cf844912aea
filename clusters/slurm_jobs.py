"""Which jobs of a run stand: by what squeue tells of them, and by what they have left in its folder."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from clusters.base import Unreachable, number_of_submission
from clusters.job_start import noted_starts
from clusters.run_files import last_line
from clusters.slurm_answers import QueuedJob, seconds_of
from runfolder.chain import slots
from runfolder.files import Damaged, list_names
from runfolder.requests import last_reopened
from runfolder.site import is_ending

_CLOCKS_S = 60.0  # by which the clocks of a site's machines may differ


def live_jobs(run_id: str, jobs: Sequence[QueuedJob]) -> list[QueuedJob]:
    """The jobs of a run's submissions that have not ended, oldest first."""
    live = []
    for job in jobs:
        if job.state and job.run_id == run_id:
            live.append(job)
    live.sort(key=lambda job: int(job.id))
    return live


def takers(run_dir: Path, name: str) -> list[str]:
    """The id of the job that has begun a submission's work, if any has."""
    return list_names(run_dir / "submissions" / name)


def is_taken_on(run_dir: Path, name: str, jobs: Sequence[QueuedJob]) -> bool:
    """Whether a submission needs no job: one has begun its work, or a job of the run takes that on, now or later.

    One that ended before it began counts for none. SLURM may take a job later than it was asked: of two, one works.
    Raises Unreachable where that is not known yet: a job at its end goes back to the queue, or does not.
    """
    if takers(run_dir, name):
        return True
    ending = None
    for job in live_jobs(run_dir.name, jobs):
        begun = takers(run_dir, job.name)
        is_redundant = bool(begun) and job.id not in begun  # it will find that, and end
        if is_redundant or (job.state != "queued" and _began_before_reopening(run_dir, job.name)):
            continue
        if not job.is_ending:
            return True
        ending = job.id
    if ending:
        what_to_do = f"once squeue -j {ending} has it no more, or in the queue, repeat this"
        raise Unreachable(f"SLURM job {ending} of this run is at its end, which SLURM completes; {what_to_do}")
    return False


def is_at_work(run_dir: Path, job: QueuedJob) -> bool:
    """Whether a job has the newest attempt at its run, which goes on: then there is a controller."""
    if job.state != "running" or job.is_ending:
        return False
    try:
        taken = slots(run_dir)
        if not taken or taken[-1].kind != "attempt" or taken[-1].verdict:
            return False
        began = seconds_of(job.start)
        return began is None or taken[-1].claim["time"] >= began - _CLOCKS_S
    except Damaged:
        return True  # for the controller to say


def next_submission(run_dir: Path, scripts: Path) -> int:
    """The number after those of a run's submissions so far: any trace may have been purged, but not all."""
    names = [path.stem for path in scripts.glob(f"{run_dir.name}-s*")]
    names += list_names(run_dir / "submissions")
    numbers = [0]
    for name in names:
        with suppress(ValueError):  # what is being made
            numbers.append(number_of_submission(name))
    numbers += [submission for submission, _ in noted_starts(run_dir / "starts")]
    return max(numbers) + 1


def before_any_attempt(run_dir: Path, note: Path | None, ending: str) -> list[str]:
    """What shows why a job came to no attempt at its run, if it did not; its output is beside the note of it."""
    if note is None:
        return []
    with suppress(Damaged):
        if list_names(run_dir / "attempts"):
            return []
    line = last_line(note.with_suffix(".log"))
    if line:
        return [f"the last line that it printed: {line}"]
    if ending.startswith("FAILED"):
        root = run_dir.parent.parent
        return [f"it printed nothing: fleetune doctor --test-job tells whether nodes have {root}"]
    return []


def way_on(run_dir: Path) -> str:
    """What to do about a run that has no job."""
    with suppress(Damaged):
        if is_ending(run_dir):
            return "it is to end: fleetune cancel closes it"
    return "fleetune resume submits it again"


def _began_before_reopening(run_dir: Path, name: str) -> bool:
    """Whether the latest start of a submission was before the run was last reopened: it has closed it, and ends."""
    folder = run_dir / "starts"
    own = [start for start in noted_starts(folder) if start[0] == number_of_submission(name)]
    if not own:
        return False
    submission, number = max(own)
    slot = (folder / f"{submission}.{number}").read_text()
    return slot.isdecimal() and int(slot) < last_reopened(run_dir)
