"""Results of held-out rows: the losses of examples and the answers, of all ranks, by the rows that they are of."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from runfolder.row_results import RowResult
from trainer.answers import matches
from trainer.data.examples import Examples, GlobalBatch
from trainer.data.layout import MicroBatch
from trainer.data.row_digests import row_digests
from trainer.data.tokens import EvaluationPrompt
from trainer.objectives.base import Objective
from trainer.run import Run
from trainer.step import BatchTensors, micro_batch_tensors, to_device
from trainer.world import World

SumsByRow = dict[int, float]  # by the number of the row


class Answer(NamedTuple):
    """What the model wrote for a prompt, which is named by its number."""

    prompt: int
    text: str


@dataclass
class ExampleLosses:
    """What each document's example adds to the loss of an evaluation, on this rank: [documents], at its first one."""

    sums_D: torch.Tensor
    are_known: bool = True

    @classmethod
    def of(cls, examples: Examples, device: torch.device) -> "ExampleLosses":
        """Nothing yet of the examples of a source."""
        documents = len(examples.tokens.lengths)
        sums_D = torch.zeros(documents, dtype=torch.float64, device=device)
        return cls(sums_D)

    def add(self, micro: MicroBatch, each: torch.Tensor | None) -> None:
        """Take in what the examples of a micro-batch add; None: that this objective does not say it."""
        if each is None:
            self.are_known = False
            return
        documents = list(chain.from_iterable(micro.rows))
        first_documents = []
        for places in micro.examples:
            first = places[0]
            first_documents.append(documents[first])
        count = len(first_documents)
        if count:
            values = each[:count]  # a micro-batch without documents has a stand-in
            self.sums_D[first_documents] = values.double()

    def reduced(self) -> "ExampleLosses":
        """Those of all ranks; a collective. Each document is computed on one of them, or in parts that add up."""
        dist.all_reduce(self.sums_D)
        return self


def judged_tensors(run: Run, examples: Examples, micro: MicroBatch) -> BatchTensors:
    """What `judge` reads of a micro-batch: what the objective made, and how many labels each document has."""
    batch = micro_batch_tensors(run, examples, micro)
    numbers = list(chain.from_iterable(micro.rows))
    counts_D = np.ones(1, np.int64)  # of the label that stands in for none
    if numbers:
        counts_D = examples.tokens.targets[numbers]
    batch["document_labels"] = to_device(counts_D, run.world.device)
    return batch


def all_answers(world: World, answers: list[Answer]) -> list[Answer]:
    """The answers of all ranks, by the number of the prompt; a collective."""
    parts: list[Any] = [None] * world.size
    dist.all_gather_object(parts, answers)
    return sorted(chain.from_iterable(parts))


@dataclass(frozen=True)
class JudgedRows:
    """What an evaluation found: the losses of the examples, and the answers to the prompts."""

    examples: Examples
    prompts: list[EvaluationPrompt]
    losses: ExampleLosses
    answers: list[Answer]
    are_test: bool = False

    def results(self, run: Run) -> Iterator[RowResult]:
        """What was found of each row that was judged, in the order of the file."""
        losses, weights = self._by_row(run.objective)
        asked = {}
        for prompt in self.prompts:
            asked[prompt.row] = prompt
        written = {}
        for answer in self.answers:
            prompt = self.prompts[answer.prompt]
            written[prompt.row] = answer.text
        numbers = weights.keys() | asked.keys()
        source = run.job.data.eval
        assert source is not None
        digests = row_digests(source, numbers)
        for number in sorted(numbers):
            prompt_of_row = asked.get(number)
            text = written.get(number)
            correct = None
            if prompt_of_row is not None:
                correct = _is_right(prompt_of_row, text)
            yield RowResult(
                number,
                digests[number],
                loss=losses.get(number),
                weight=weights.get(number),
                correct=correct,
                answer=text,
                test=self.are_test,
            )

    def _by_row(self, objective: Objective) -> tuple[SumsByRow, SumsByRow]:
        """The losses of rows, where they are known, and their weights."""
        losses: SumsByRow = {}
        weights: SumsByRow = {}
        rows = self.examples.tokens.rows
        sums_D = self.losses.sums_D.tolist()
        count = len(self.examples)
        for example in range(count):
            chosen = np.array([example])
            alone = GlobalBatch(self.examples, chosen)
            totals = objective.totals(alone)
            documents = self.examples.documents(example)
            first = documents[0]
            row = int(rows[first])
            weight, *_ = totals.values()
            loss = sums_D[first]
            weights.setdefault(row, 0.0)
            losses.setdefault(row, 0.0)
            weights[row] += weight
            losses[row] += loss
        if self.losses.are_known:
            return losses, weights
        return {}, weights


def share_correct(results: Sequence[RowResult]) -> float:
    """Of the rows that were asked, the share with the right answer."""
    asked = 0
    right = 0
    for result in results:
        if result.correct is not None:
            asked += 1
            right += result.correct
    return right / asked


def _is_right(prompt: EvaluationPrompt, written: str | None) -> bool:
    """Whether an answer is that of the data; a prompt that fills all positions has none."""
    if written is None:
        return False
    return matches(written, prompt.answer)
