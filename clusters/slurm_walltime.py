"""How long before its walltime a job is warned, and walltimes that leave no time before that."""

import math
import re
from typing import Annotated

from pydantic import BeforeValidator

from clusters.base import SubmissionRefused
from runfolder.evaluation_job import AnyJob
from runfolder.resources import read_duration

_NO_LIMIT = ("0", "UNLIMITED", "INFINITE")
_TIME_FORMS = (  # of --time: sbatch(1)
    re.compile(r"(?P<minutes>\d+)(:(?P<seconds>\d+))?"),
    re.compile(r"(?P<hours>\d+):(?P<minutes>\d+):(?P<seconds>\d+)"),
    re.compile(r"(?P<days>\d+)-(?P<hours>\d+)(:(?P<minutes>\d+)(:(?P<seconds>\d+))?)?"),
)
_WARNING_S = 60  # beside the grace that a job asks for


def warning_s(job: AnyJob) -> int:
    """How many seconds before its walltime a job is warned."""
    return job.resources.grace + _WARNING_S


def walltime_option(job: AnyJob, default: str | None) -> str | None:
    """--time: what the job says, else the site's."""
    if job.resources.walltime is None:
        return default
    return _in_minutes(job.resources.walltime)


def _in_minutes(seconds: int) -> str:
    """--time in minutes, rounded up."""
    minutes = -(-seconds // 60)
    return str(minutes)


def _read_walltime(value: object) -> str | None:
    """--time of a value in the clusters file: seconds or like 8h, as in a job, or in a form of SLURM's own."""
    if value is None:
        return None
    seconds = read_duration(value)
    if isinstance(seconds, int) and seconds > 0:
        return _in_minutes(seconds)
    if isinstance(value, str) and (value in _NO_LIMIT or seconds_in(value)):
        return value
    raise ValueError("allowed: seconds, or like 90s, 30m, 8h, 2d, or like 1-12:00:00, as --time of sbatch")


Walltime = Annotated[str | None, BeforeValidator(_read_walltime)]


def check_walltime(job: AnyJob, default: str | None) -> None:
    """Raise SubmissionRefused for a walltime of which nothing is left before the warning, which would never end."""
    option = walltime_option(job, default)
    seconds = seconds_in(option) if option else None
    shortest = warning_s(job)
    if seconds is None or seconds > shortest:
        return
    field = "resources.walltime"
    if job.resources.walltime is None:
        field = "walltime of the cluster"
    allowed = f"more than {shortest} s, as the job is warned its grace and {_WARNING_S} s before the end"
    raise SubmissionRefused(f"{field}: found {seconds} s; allowed on SLURM: {allowed}")


def seconds_in(option: str) -> int | None:
    """The seconds that SLURM makes of --time, whole minutes; None for no limit, and for what is no time."""
    for form in _TIME_FORMS:
        found = form.fullmatch(option)
        if found:
            given = {unit: int(number) for unit, number in found.groupdict("0").items()}
            minutes_of_seconds = math.ceil(given.get("seconds", 0) / 60)
            hours = given.get("days", 0) * 24 + given.get("hours", 0)
            minutes = hours * 60 + given.get("minutes", 0) + minutes_of_seconds
            return minutes * 60 or None
    return None
