"""What an objective is: which examples there are, and what each micro-batch of them adds to a step's loss.

A step goes through these hooks, of which all but `read`, `totals`, `arrays` and `loss` may be left out:

1. `rollout`, where `generates`: the model writes, for the examples of the global batch, what is learned from. It is
   recorded before the update, so that a resumed run learns from the same; `rolled_out` makes the batch of it.
2. `totals`: what the sums over the global batch will be divided by, known before the first backward pass.
3. `prelude`, where `has_prelude`: sums over the whole global batch, without gradient, that the loss needs.
4. `loss`: a micro-batch's share, already divided by the totals. Shares are summed over micro-batches and ranks.

An objective may also change the base before the method sees it (`prepare`, `take`), and what is left at the end
(`export`): a reward model has a head of its own. Held-out rows go through `judge` and `summary`.

Ranks that share rows (`sharding.sequence`) all give the share of the whole rows, of which each then adds its part.
What a model gives of labels, `kernels.sequence` brings together.

So what a step does depends on neither packing nor micro-batches nor ranks. Only the documents of one example are
sure to be in one micro-batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from methods.base import Method, Tensors
from runfolder.chain import Attempt
from runfolder.files import Record
from runfolder.job import Job
from trainer.data.encode import Reading
from trainer.data.examples import Examples, GlobalBatch
from trainer.data.layout import MicroBatch
from trainer.data.tokens import EvaluationPrompt
from trainer.kernels import Kernels

Arrays = dict[str, npt.NDArray[Any]]
HostArrays = Mapping[str, npt.NDArray[np.generic]]
TensorsByName = Mapping[str, torch.Tensor]  # in a prelude and in metrics: 0-d
Totals = Mapping[str, float]  # by name; sums over the examples of a global batch, so those of two batches add up


@dataclass(frozen=True)
class ObjectiveSetup:
    """What an objective knows of its run: among it how rows become tokens, and in which folder those are kept.

    `progress` is called now and then while rows are read. `attempt` is None in a dry run, which writes nothing.
    """

    job: Job
    tokenizer: Any
    reading: Reading
    folder: Path
    progress: Callable[[int], None]
    attempt: Attempt | None = None


@dataclass(frozen=True)
class Shares:
    """What a micro-batch adds to the loss of its step and to metrics that are logged beside it; each 0-d.

    The names of the metrics are the same for every micro-batch, also for one without examples. `each` [examples] are
    the parts of the loss that are of one example each, in the order of the micro-batch, where an objective has them.
    """

    loss: torch.Tensor
    metrics: TensorsByName = field(default_factory=dict)
    each: torch.Tensor | None = None

    def of_one(self, ranks: int) -> "Shares":
        """What one of so many ranks adds that share rows, and have all computed the same."""
        if ranks == 1:
            return self
        loss = self.loss / ranks
        metrics = {}
        for name, share in self.metrics.items():
            metrics[name] = share / ranks
        each = self.each
        if each is not None:
            each = each / ranks
        return Shares(loss, metrics, each)


class Objective(ABC):
    """What is learned from the examples of a source."""

    generates: ClassVar[bool] = False  # whether the model itself writes what is learned from
    has_prelude: ClassVar[bool] = False  # whether the loss needs sums over the whole global batch
    needs_reference: ClassVar[bool] = False  # whether `arrays` reads what the policy before the first step gave
    scores: ClassVar[bool] = False  # whether what is trained gives a text a number, instead of writing one

    method: Method[
        Any
    ]  # of the run, there before its model is; `method.reference(model)` is for `prelude` and `loss`

    notes: Sequence[str] = ()  # lines of the model card: how to use what is left

    kernels = Kernels()  # of the run, from its first step on

    def __init__(self, setup: ObjectiveSetup) -> None:
        self.setup = setup

    @abstractmethod
    def read(self, source: str) -> Examples:
        """The examples of a file or hub dataset, as tokens; every rank calls it. Raises RowError."""

    def prompts(self, source: str) -> list[EvaluationPrompt]:  # noqa: ARG002
        """What the model is asked in evaluations, to see whether it writes the answer; nothing here."""
        return []

    def prepare(self, model: Any) -> None:  # noqa: B027
        """Change the base before its method is attached; nothing unless overridden. Raises ValueError."""

    def take(self, model: nn.Module) -> None:  # noqa: B027
        """Have trained, in fp32, what `prepare` has added to a model that has its method now."""

    def export(self, model: Any, weights: Tensors, folder: Path) -> None:
        """Write what the method leaves, from whole weights by name, and what is the objective's own."""
        write = self.method.export
        write(model, weights, folder)

    def rollout(self, model: nn.Module, batch: GlobalBatch, step: int) -> Arrays:
        """What the model writes for a batch; every rank calls it, and gets the same. Steps count from 1; 0: held out.

        The model is in evaluation mode, without gradient. It draws by (seed, step, example) alone, never by rank.
        Where the step was recorded, it is not called.
        """
        raise NotImplementedError

    def rollout_step(self, step: int) -> int:
        """The step whose rollout, and whose examples, a step learns from: its own, or one before it."""
        return step

    def complete_rollout(self, model: nn.Module, rollout: Arrays, passes: Iterable[TensorsByName]) -> None:  # noqa: B027
        """Add to a rollout what the model says of it before the update, in this rank's passes; a collective."""

    def rolled_out(self, batch: GlobalBatch, rollout: Arrays) -> GlobalBatch:
        """The batch whose documents the model wrote; a pure function."""
        raise NotImplementedError

    def samples(self, rollout: Arrays) -> list[Record]:  # noqa: ARG002
        """What people are shown of a rollout, an answer each, as plain data: `prompt`, `written`, `reward`, ..."""
        return []

    @abstractmethod
    def totals(self, batch: GlobalBatch) -> Totals:
        """What the sums over a global batch are divided by; a pure function."""

    @abstractmethod
    def arrays(self, examples: Examples, micro: MicroBatch) -> HostArrays:
        """What `loss` and `prelude` read of a micro-batch, made on the host, perhaps in another thread.

        A micro-batch without examples is a row of padding, so that all ranks run as many forward passes.
        """

    def log_likelihoods(self, model: nn.Module, batch: TensorsByName) -> TensorsByName:
        """Where `needs_reference`: of each `document` [D] of a micro-batch, by its number, its `log_likelihood` [D].

        It is called without gradient before the first step; from then on `tokens.reference` has what it gave.
        """
        raise NotImplementedError

    def prelude(self, model: nn.Module, batch: TensorsByName, totals: Totals) -> TensorsByName:
        """A micro-batch's shares of what `loss` needs to know of the whole global batch; without gradient."""
        raise NotImplementedError

    @abstractmethod
    def loss(self, model: nn.Module, batch: TensorsByName, totals: Totals, prelude: TensorsByName) -> Shares:
        """A micro-batch's shares of the step's loss and metrics: its sums, divided by the totals.

        One without examples gives zero, with zero gradients for all that others reach, so that collectives stay in
        step. `prelude` has the sums over all shares of the global batch, fp64; nothing where there is no prelude.
        """

    def check_step(self, step: int, metrics: Mapping[str, float]) -> None:  # noqa: B027
        """Refuse a step by what is logged of it, before its update; called where `generates`. Raises ValueError."""

    def judge(self, model: nn.Module, batch: TensorsByName, totals: Totals, prelude: TensorsByName) -> Shares:
        """A micro-batch's shares of what is said of held-out rows: those of `loss`, unless more is measured.

        `batch` has, beside what `arrays` made, `document_labels` [documents]: how many labels each document has.
        """
        shares = self.loss
        return shares(model, batch, totals, prelude)

    def summary(self, metrics: dict[str, float]) -> dict[str, float]:
        """What is said of held-out rows, from the sums of what `judge` gave, over the totals."""
        return metrics


def added(totals: Iterable[Totals]) -> dict[str, float]:
    """The totals of several batches together."""
    sums: dict[str, float] = {}
    for of_batch in totals:
        for name, value in of_batch.items():
            so_far = sums.get(name, 0)
            sums[name] = so_far + value
    return sums
