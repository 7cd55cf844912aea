"""What a dry run says on the worker itself: the memory that was foretold, and which changes of the job would fit."""

import threading
from typing import Any

import torch

from runfolder.job import Job
from trainer.base import load_config
from trainer.data.longest import LongestPass
from trainer.data.survey import lengths_sample
from trainer.dry_run.fit import DRY_RUN_MARGIN, Forecast, changes_that_fit
from trainer.dry_run.process import BytesByPart, DryRunFailed, DryRunner, DryRunProcess
from trainer.embeddings import vocabulary
from trainer.kernels.fast import is_fast
from trainer.run import Run


def foretell(run: Run, longest: LongestPass) -> threading.Thread | None:
    """Have a dry run of the longest micro-batch made beside the run, and kept in its events; of GPUs alone."""
    if not run.world.leads or run.world.device.type != "cuda":
        return None
    thread = threading.Thread(target=keep_forecast, args=(run, longest), daemon=True)
    thread.start()
    return thread


def keep_forecast(run: Run, longest: LongestPass) -> None:
    """Make a dry run of a micro-batch, and keep what it says, or why it says nothing, in the attempt's events."""
    tokens = longest.batch.examples.tokens
    documents = []
    for row in longest.micro.rows:
        for number in row:
            length = int(tokens.lengths[number])
            labels = int(tokens.targets[number])
            documents.append((length, labels))
    job = run.job
    sample = tuple(documents)
    config = config_of_run(run)
    precision, fast = _numerics(run, job)
    try:
        with DryRunProcess() as process:
            runner = DryRunner(process, config, sample)
            parts = runner.parts(job, precision, fast, tried=True)
    except DryRunFailed as error:
        run.attempt.event("not_foretold", why=str(error))
        return
    allocated = sum(parts.values())
    run.attempt.event("foretold", bytes=allocated, parts=parts)


def fitting_changes(run: Run, device: int | None) -> str:
    """Which change of the job would fit into so many bytes, in words, where its own longest micro-batch did not."""
    if device is None:
        return "train.micro_batch: 1 and train.gradient_checkpointing: true take less"
    job = run.job
    sample = lengths_sample(run.tokens)
    config = config_of_run(run)
    with DryRunProcess() as process:
        runner = DryRunner(process, config, sample)

        def parts(changed: Job) -> BytesByPart:
            precision, fast = _numerics(run, changed)
            return runner.parts(changed, precision, fast)

        try:
            of_job = parts(job)
        except DryRunFailed as error:
            return f"what would fit is not known: {error}"
        foretold = sum(of_job.values())
        factor = max(1.0, device / foretold)  # it took all that there is, and more
        now = Forecast(of_job, "dry run", DRY_RUN_MARGIN, factor)

        def found(changed: Job) -> Forecast:
            foretold = parts(changed)
            return Forecast(foretold, "dry run", DRY_RUN_MARGIN, factor)

        tried = changes_that_fit(job, found, device, now)
    if not tried:
        return "no change is known that would fit"
    last = tried[-1]
    gib = last.needed / 2**30
    if last.fits:
        return f"it would with {last.text} (about {gib:.1f} GiB)"
    return f"not even with {last.text} (about {gib:.1f} GiB)"


def config_of_run(run: Run) -> dict[str, Any]:
    """The base's config as plain data, with as many embeddings as the model has."""
    config = load_config(run.job.base)
    plain: dict[str, Any] = config.to_dict()
    plain["vocab_size"] = vocabulary(run.model.config)
    return plain


def _numerics(run: Run, job: Job) -> tuple[str, bool]:
    """The precision of a job here, and whether its kernels would be fast on a GPU."""
    precision = "fp32"
    if run.dtype == torch.bfloat16:
        precision = "bf16"
    fast = is_fast(job, torch.device("cuda"))
    return precision, fast
