"""Stages that are done in this process, one after another, as a controller has them done by Ray."""

from collections.abc import Callable
from pathlib import Path

from orchestrator.generation.attempt import generate_attempt
from orchestrator.stages.work import next_of_stages
from runfolder.chain import last_attempt, result
from runfolder.files import Record
from runfolder.generation_job import GenerationJob
from runfolder.outcome import final_word
from runfolder.record import load_any_job
from runfolder.staged_job import StagedJob
from trainer.checkpoint.lineage import claim_from_newest


def do_stage(run_dir: Path, launch: Callable[..., None]) -> None:
    """Have a stage done, and close its run."""
    if result(run_dir) is not None:
        return
    if isinstance(load_any_job(run_dir), GenerationJob):
        attempt = claim_from_newest(run_dir)
        assert attempt is not None and generate_attempt(run_dir, attempt.number)
    else:
        launch(1, run_dir)
    attempt = last_attempt(run_dir)
    attempt.close(final_word("succeeded", "", {"kind": "success", "evidence": ""}, attempt.number))


def do_all_stages(run_dir: Path, launch: Callable[..., None]) -> Record:
    """Have all stages of a submitted job done; gives the result of the job."""
    job = load_any_job(run_dir)
    assert isinstance(job, StagedJob)
    assert next_of_stages(run_dir, job, lambda stage_dir: do_stage(stage_dir, launch)) is None
    ended = result(run_dir)
    assert ended is not None
    return ended
