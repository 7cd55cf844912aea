"""What a dry run says on the worker itself: the memory that was foretold, and which changes of the job would fit."""

import threading
from typing import Any

import torch

from runfolder.job import Job
from trainer.base import load_config
from trainer.data.longest import LongestPass
from trainer.data.survey import lengths_sample
from trainer.dry_run.fit import DRY_RUN, DRY_RUN_MARGIN, Forecast, changes_that_fit
from trainer.dry_run.process import BytesByPart, DryRunFailed, DryRunner, DryRunProcess
from trainer.embeddings import vocabulary
from trainer.kernels.fast import is_fast
from trainer.run import Run


def foretell(run: Run, longest: LongestPass) -> "Foretelling | None":
    """Have a dry run of the longest micro-batch made beside the run, and kept in its events; of GPUs alone."""
    if not run.world.leads or run.world.device.type != "cuda":
        return None
    return Foretelling(run, longest)


class Foretelling:
    """Dry runs in a process beside a run: of its longest micro-batch, and where that does not fit of what would."""

    def __init__(self, run: Run, longest: LongestPass) -> None:
        self._run = run
        self._parts: BytesByPart | None = None
        self._process = DryRunProcess()
        self._process.start()
        self._is_known = threading.Event()
        self._is_tried = threading.Event()
        self._thread = threading.Thread(target=self._keep, args=(longest,), daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Say that the micro-batch was tried; the process ends when what is foretold of it is kept."""
        self._is_tried.set()

    def join(self, seconds: float) -> None:
        """Wait until that is so, for so long at most."""
        self._thread.join(seconds)

    def changes(self, device: int) -> str:
        """Which change of the job would fit into so many bytes, in words, where the micro-batch did not."""
        self._is_known.wait()
        return changes_by(self._run, self._process, device, self._parts)

    def _keep(self, longest: LongestPass) -> None:
        """Make a dry run of the micro-batch, and keep what it says, or why it says nothing, among events."""
        run = self._run
        with self._process as process:
            try:
                self._parts = parts_of_longest(run, process, longest)
            except DryRunFailed as error:
                run.attempt.event("not_foretold", why=str(error))
            else:
                allocated = sum(self._parts.values())
                run.attempt.event("foretold", bytes=allocated, parts=self._parts)
            self._is_known.set()
            self._is_tried.wait()


def parts_of_longest(run: Run, process: DryRunProcess, longest: LongestPass) -> BytesByPart:
    """What a micro-batch takes by a dry run, forward and backward; raises DryRunFailed."""
    tokens = longest.batch.examples.tokens
    documents = []
    for row in longest.micro.rows:
        for number in row:
            length = int(tokens.lengths[number])
            labels = int(tokens.targets[number])
            documents.append((length, labels))
    config = config_of_run(run)
    runner = DryRunner(process, config, tuple(documents))
    precision, fast = _numerics(run, run.job)
    return runner.parts(run.job, precision, fast, tried=True)


def fitting_changes(run: Run, device: int | None, foretelling: Foretelling | None) -> str:
    """Which change of the job would fit into so many bytes, in words, where its own longest micro-batch did not.

    Dry runs are made in the process of `foretelling`, where there is one.
    """
    if device is None:
        return "train.micro_batch: 1 and train.gradient_checkpointing: true take less"
    if foretelling:
        return foretelling.changes(device)
    with DryRunProcess() as process:
        return changes_by(run, process, device)


def changes_by(run: Run, process: DryRunProcess, device: int, foretold: BytesByPart | None = None) -> str:
    """Which change would fit by dry runs of a process; what is foretold of the job itself may be known."""
    job = run.job
    sample = lengths_sample(run.tokens)
    config = config_of_run(run)
    runner = DryRunner(process, config, sample)

    def parts(changed: Job) -> BytesByPart:
        precision, fast = _numerics(run, changed)
        return runner.parts(changed, precision, fast)

    try:
        of_job = foretold or parts(job)
    except DryRunFailed as error:
        return f"what would fit is not known: {error}"
    bytes_of_job = sum(of_job.values())
    factor = max(1.0, device / bytes_of_job)  # it took all that there is, and more
    now = Forecast(of_job, DRY_RUN, DRY_RUN_MARGIN, factor)

    def found(changed: Job) -> Forecast:
        of_change = parts(changed)
        return Forecast(of_change, DRY_RUN, DRY_RUN_MARGIN, factor)

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
