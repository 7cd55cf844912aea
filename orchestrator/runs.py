"""Run ids, and where the run folders of this user are."""

import os
import re
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.errors import InputError
from runfolder.files import Damaged
from runfolder.folders import home
from runfolder.record import load_record

RUN_ID = re.compile(r"[a-z]([-a-z0-9]{0,30}[a-z0-9])?-[0-9a-hjkmnp-tv-z]{10}")
_DIGITS = "0123456789abcdefghjkmnpqrstvwxyz"  # base 32 in the order of ASCII, so that ids sort by time
_EPOCH_MS = 1_735_689_600_000  # 2025-01-01; 40 bits of milliseconds last for 34 years


def runs_folder() -> Path:
    """Where the run folders are."""
    return home() / "runs"


def new_id(name: str) -> str:
    """`<name>-<10 characters>`: eight of time, in milliseconds, and two of chance."""
    value = ((time.time_ns() // 1_000_000 - _EPOCH_MS) << 10) | secrets.randbits(10)
    return f"{name}-{''.join(_DIGITS[(value >> shift) & 31] for shift in range(45, -1, -5))}"


def name_of(run_id: str) -> str:
    """The job's name in a run id."""
    return run_id[:-11]


def run_ids() -> list[str]:
    """All runs, oldest first."""
    folder = runs_folder()
    names = os.listdir(folder) if folder.is_dir() else []  # noqa: PTH208 (ten times faster than iterdir)
    runs = [name for name in names if RUN_ID.fullmatch(name) and (folder / name / "job.yaml").exists()]
    return sorted(runs, key=lambda run_id: run_id[-10:])


def find(reference: str) -> Path:
    """The folder of a run: by its id, by a job's name (its latest run), or by a prefix of one id."""
    known = run_ids()
    if reference in known:
        return runs_folder() / reference
    named = [run_id for run_id in known if name_of(run_id) == reference]
    if named:
        return runs_folder() / named[-1]
    starting = [run_id for run_id in known if run_id.startswith(reference)]
    if len(starting) == 1:
        return runs_folder() / starting[0]
    if starting:
        raise InputError(f"run {reference!r}: found {len(starting)} runs, like {', '.join(starting[-3:])}; give more")
    latest = f"the latest are {', '.join(known[-3:])}" if known else f"there are none in {runs_folder()}"
    raise InputError(f"run {reference!r}: no such run; {latest}")


def read_record(run_dir: Path) -> Mapping[str, Any]:
    """RUN_DIR/job.yaml as plain data: run_id, cluster, submitted, versions, digests, git, job; raises Damaged."""
    record = load_record(run_dir)
    if missing := [key for key in ("cluster", "submitted") if key not in record]:
        raise Damaged(f"{run_dir / 'job.yaml'}: {', '.join(missing)} missing")
    return record
