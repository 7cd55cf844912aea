"""The peak memory of a worker, from a job, its base's config.json and the documents of its longest micro-batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from methods.options.base import BaseConfig
from runfolder.job import Job
from runfolder.objectives import OutsideOptions
from runfolder.resources import Resources
from trainer.dry_run.answers import answering
from trainer.dry_run.kernels import sees_documents
from trainer.dry_run.ledger import Bytes
from trainer.dry_run.line import whole_base
from trainer.dry_run.longest import Lengths, longest_micro_batch
from trainer.dry_run.steps import Passes, TriedPasses
from trainer.dry_run.zero import Weights, shared

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Forecaster:
    """It makes forecasts, and knows what it tried: jobs that differ in how much workers share are tried once."""

    _tried: dict[str, TriedPasses] = field(default_factory=dict)  # by passes and config

    def forecast(
        self,
        job: Job,
        config: BaseConfig,
        documents: Sequence[Lengths],
        precision: str,
        fast: bool,
        of_passes: bool = False,
    ) -> Bytes:
        """The bytes that a worker has allocated in its worst moment, by what they are for.

        With `of_passes` in that of its forward and backward passes alone, which are what a calibration tries.
        """
        if job.objective.generates:
            raise ValueError(f"objective {job.objective.kind} learns from what the model writes, of unknown length")
        if isinstance(job.objective, OutsideOptions):
            raise ValueError(
                f"objective {job.objective.kind} is another package's, which may read what no length tells"
            )
        dtype = DTYPES[precision]
        passes = Passes(job, documents, dtype, fast)
        found = self._at_any_stage(passes, config)
        element = torch.float32.itemsize if job.method.makes_model else dtype.itemsize
        offloads = job.sharding.offloads
        are_whole = False
        if found.base_is_frozen and not found.held:
            are_whole = job.keeps_trained_whole(found.trained, found.frozen)
        sizes = (found.trained, found.frozen, element, found.held)
        weights = Weights(*sizes, offloads, found.of_layer, found.of_head, are_whole)
        stage = job.sharding.zero
        workers = job.resources.world_size
        alone = dict(found.moments)
        if of_passes:
            del alone["step"]
        else:
            at_rest = alone["forward"]
            alone["answers"] = answering(job, config, documents, at_rest, dtype.itemsize)
        moments = []
        for moment in alone.values():
            of_worker = shared(moment, weights, stage, workers)
            moments.append(of_worker)
        return max(moments, key=lambda parts: sum(parts.values()))

    def _at_any_stage(self, passes: Passes, config: BaseConfig) -> TriedPasses:
        """What passes hold on a whole base, found once for jobs that differ in how much how many workers share."""
        job = passes.job
        stage = 3 if job.sharding.zero == 3 else 0
        sharding = job.sharding.model_copy(update={"zero": stage})
        workers = job.resources if sharding.sequence > 1 else Resources()
        same = job.model_copy(update={"sharding": sharding, "resources": workers})
        at_stage = replace(passes, job=same)
        key = repr((at_stage, config))
        if key not in self._tried:
            self._tried[key] = whole_base(at_stage, config)
        return self._tried[key]

    def reply(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What a request {job, config, sample: [[tokens, labels]], precision, fast, tried} gets.

        That is {bytes}, or {problem}. The sample has the lengths of some documents, from which the longest
        micro-batch is dealt. Where that is `tried`, it is the sample, and its passes alone are asked for.
        """
        job = Job.model_validate(request["job"])
        sample = [(tokens, labels) for tokens, labels in request["sample"]]
        try:
            fast = request["fast"]
            config = request["config"]
            precision = request["precision"]
            tried = request["tried"]
            documents = sample
            if not tried:
                in_one_row = fast and sees_documents(job, config)
                documents = longest_micro_batch(job, sample, in_one_row)
            found = self.forecast(job, config, documents, precision, fast, tried)
        except Exception as error:  # whatever a base or method does without values that nobody has tried
            kind = type(error).__name__
            said = str(error).strip()
            first, *_ = said.splitlines() or [""]
            return {"problem": f"{kind}: {first}"}
        return {"bytes": found}
