"""Stages that are done in this process, one after another, as a controller has them done by Ray."""

from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.generation.attempt import generate_attempt
from orchestrator.stages.work import next_of_stages
from runfolder.chain import last_attempt, result
from runfolder.files import Record
from runfolder.generation_job import GenerationJob
from runfolder.outcome import final_word
from runfolder.record import load_any_job
from runfolder.staged_job import StagedJob
from trainer.checkpoint.lineage import claim_from_newest

Advance = Callable[[Path], int | None]


@pytest.fixture
def advance(launch: Callable[..., None]) -> Advance:
    """Have a stage done, and close its run."""

    def do(run_dir: Path) -> int | None:
        if result(run_dir) is not None:
            return None
        if isinstance(load_any_job(run_dir), GenerationJob):
            attempt = claim_from_newest(run_dir)
            assert attempt is not None and generate_attempt(run_dir, attempt.number)
        else:
            launch(1, run_dir)
        attempt = last_attempt(run_dir)
        attempt.close(final_word("succeeded", "", {"kind": "success", "evidence": ""}, attempt.number))
        return None

    return do


@pytest.fixture
def all_stages(advance: Advance) -> Callable[[Path], Record]:
    """Have all stages of a submitted job done; gives the result of the job."""

    def do(run_dir: Path) -> Record:
        job = load_any_job(run_dir)
        assert isinstance(job, StagedJob)
        assert next_of_stages(run_dir, job, advance) is None
        ended = result(run_dir)
        assert ended is not None
        return ended

    return do
