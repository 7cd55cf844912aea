"""RUN_DIR/job.yaml: what was submitted, frozen."""

from pathlib import Path

import yaml

from runfolder.job import Job


def load_job(run_dir: Path) -> Job:
    """The frozen spec of a run."""
    record = yaml.safe_load((run_dir / "job.yaml").read_text())
    return Job.model_validate(record["job"])
