"""Judging held-out rows: the loss per target token, and exact match of what the model writes by itself."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import starmap

import numpy as np
import torch
from torch import nn

from runfolder.row_results import RowResult
from trainer.data.batches import Batches, layout_of
from trainer.data.examples import Examples, GlobalBatch
from trainer.data.tokens import EvaluationPrompt, virtual_ids
from trainer.generation import PromptGroup, groups, positions_left, rounds
from trainer.greedy import TokenRows
from trainer.objectives.base import TensorsByName, Totals, added
from trainer.progress import counted
from trainer.reference import know_reference
from trainer.reported import report_evaluation
from trainer.row_results import Answer, ExampleLosses, JudgedRows, all_answers, judged_tensors, share_correct
from trainer.run import Run
from trainer.samples import show_samples, tell_limits
from trainer.step import NamedSums, add_shares, dealt_to_rank, prepared, reduced
from trainer.world import World
from trainer.writing import write_greedily

SAMPLES = 5


@dataclass(frozen=True)
class Evaluator:
    """The held-out rows of a job; none when it names no evaluation data.

    `test` has those that are judged after the last step alone, and by which nothing is chosen; `retain` those of
    `data.retain`, which are judged before the first step and after the last one.
    """

    world: World
    examples: Examples | None
    batches: Batches | None
    prompts: list[EvaluationPrompt]
    max_new_tokens: int
    test: "Evaluator | None" = None
    retain: "Evaluator | None" = None
    is_test: bool = False

    @classmethod
    def create(cls, run: Run) -> "Evaluator":
        """Read a job's evaluation rows; every rank calls it."""
        job = run.job
        objective = run.objective
        source = job.data.eval
        if source is None:
            return cls(run.world, None, None, [], 0)
        rows = job.evaluation.rows
        held_out = objective.read(source)
        examples = held_out.first(rows)
        know_reference(run, examples, np.arange(len(examples)))
        prompts: list[EvaluationPrompt] = []
        if job.evaluation.max_new_tokens:
            prompts = objective.prompts(source)[:rows]
        whole = cls._of(run, examples, prompts)
        if job.data.retain is not None:
            text = objective.read(job.data.retain)
            retain = cls._of(run, text, [])
            whole = replace(whole, retain=retain)
        tested = len(examples) * job.evaluation.test
        if tested < 1:
            return whole
        return whole._divided(run, math.floor(tested))

    @classmethod
    def _of(cls, run: Run, examples: Examples, prompts: list[EvaluationPrompt]) -> "Evaluator":
        """The evaluator of some examples and prompts."""
        job = run.job
        layout = layout_of(job)
        tokens = job.train.batch_tokens
        batches = Batches(examples, layout, seed=0, batch_tokens=tokens, epochs=1)
        longest = job.evaluation.max_new_tokens
        return cls(run.world, examples, batches, prompts, longest)

    def _divided(self, run: Run, tested: int) -> "Evaluator":
        """The same without the last so many examples, which become its test rows."""
        examples = self.examples
        assert examples is not None
        kept = len(examples) - tested
        rows = examples.tokens.rows
        first_tested, *_ = examples.documents(kept)
        first_row = int(rows[first_tested])
        before: list[EvaluationPrompt] = []
        behind: list[EvaluationPrompt] = []
        for prompt in self.prompts:
            if prompt.row < first_row:
                before.append(prompt)
            else:
                behind.append(prompt)
        first = examples.first(kept)
        last = examples.after(kept)
        chosen_by = self._of(run, first, before)
        test = self._of(run, last, behind)
        test = replace(test, is_test=True)
        return replace(chosen_by, test=test, retain=self.retain)

    def evaluate(self, run: Run, step: int) -> None:
        """Judge the model after a step and append the metrics to metrics.jsonl; every rank calls it.

        Raises Stopped where there is no time left for that; the next attempt does it then.
        """
        if self.batches is None:
            return
        began = time.time()
        metrics, found = self.judge(run, step)
        is_last = step == run.batches.steps
        if self.test is not None and is_last:
            tested, found_of_test = self.test.judge(run, step)
            found += found_of_test
            for name, value in tested.items():
                key = name.replace("eval_", "eval_test_", 1)
                metrics[key] = value
        if self.retain is not None and (is_last or step == 0):
            of_text = self.retain.loss(run, step)
            metrics["eval_retain_loss"] = of_text
        if self.world.leads:
            report_evaluation(run, step, metrics, found, began)

    def judge(self, run: Run, step: int) -> tuple[dict[str, float], list[RowResult]]:
        """The metrics of the model as it is, and on rank 0 what was found of each row; a collective."""
        examples = self.examples
        assert examples is not None
        losses = ExampleLosses.of(examples, self.world.device)
        answers: list[Answer] = []
        with _judging(run.model):
            metrics = self._metrics(run, step, losses)
            if self.prompts:
                answers = self._written(run, step)
        if not self.world.leads:
            return metrics, []
        judged = JudgedRows(examples, self.prompts, losses, answers, self.is_test)
        found = list(judged.results(run))
        if self.prompts:
            metrics["eval_exact_match"] = share_correct(found)
        return metrics, found

    def loss(self, run: Run, step: int) -> float:
        """The loss of the model as it is, without what was found of each row; a collective."""
        assert self.examples is not None
        losses = ExampleLosses.of(self.examples, self.world.device)
        with _judging(run.model):
            metrics = self._metrics(run, step, losses)
        return metrics["eval_loss"]

    def _metrics(self, run: Run, step: int, losses: ExampleLosses) -> dict[str, float]:
        """The objective's loss over all held-out rows, and what it logs beside it; `losses` takes those of each."""
        attempt = run.attempt
        objective = run.objective
        held_out = self._held_out(run, step)
        totals = added(map(objective.totals, held_out))
        # One of the totals divides the sums at their end, in fp64, instead of every share.
        unit = next(iter(totals.values()))
        relative = {}
        for name, total in totals.items():
            relative[name] = total / unit
        sums: NamedSums = {}
        for batch in counted(attempt, self.world, step, "rows", held_out, _row_count):
            attempt.note_progress()
            run.stops.leave_if_warned(step)
            for shares in self._shares(run, batch, relative, losses):
                add_shares(sums, shares)
        summed = reduced(sums)
        losses.reduced()
        means = {}
        for name, value in summed.items():
            mean_of_all = value / unit
            means[name] = float(mean_of_all)
        said = objective.summary(means)
        metrics = {}
        for name, said_value in said.items():
            key = f"eval_{name}"
            metrics[key] = said_value
        return metrics

    def _held_out(self, run: Run, step: int) -> list[GlobalBatch]:
        """The held-out batches; what the model writes for them where the objective learns from that."""
        batches = self.batches
        assert batches is not None
        objective = run.objective
        numbers = range(batches.steps)
        held_out = list(map(batches.batch, numbers))
        if not objective.generates:
            return held_out
        written = []
        for batch in counted(run.attempt, self.world, step, "rows written", held_out, _row_count):
            run.stops.leave_if_warned(step)
            rollout = objective.rollout(run.model, batch, 0)
            with_answers = objective.rolled_out(batch, rollout)
            written.append(with_answers)
        return written

    def _shares(
        self, run: Run, batch: GlobalBatch, divisors: Totals, losses: ExampleLosses
    ) -> Iterator[TensorsByName]:
        """What each of this rank's micro-batches adds to the sums, by name: loss and metrics, over the divisors."""
        model = run.model
        objective = run.objective
        totals = objective.totals(batch)
        dealt = dealt_to_rank(run, batch)
        judged = partial(judged_tensors, run, batch.examples)
        stream = map(judged, dealt)
        passes, known = prepared(run, stream, totals)
        for micro, micro_batch in zip(dealt, passes, strict=True):
            of_rows = objective.judge(model, micro_batch, divisors, known)
            shares = of_rows.of_one(self.world.sequence.size)
            each = shares.each
            if objective.generates:  # of other documents than those of the source
                each = None
            losses.add(micro, each)
            of_all = dict(shares.metrics)
            of_all["loss"] = shares.loss
            yield of_all

    def _written(self, run: Run, step: int) -> list[Answer]:
        """The greedy continuation of all prompts, on every rank; one that fills all positions has none."""
        world = self.world
        rows = self.prompt_rows(run)
        continued = self.prompt_groups(run, rows)
        if world.leads:
            tell_limits(run, step, continued, len(self.prompts), self.max_new_tokens)
        written: list[Answer] = []
        dealt = list(rounds(continued, world.size))
        told = counted(run.attempt, world, step, "answers", dealt, _prompts_of)
        for number, round_ in enumerate(told):
            run.stops.leave_if_warned(step)
            answers = self._answers(run, round_, rows)
            written += answers
            is_first = number == 0
            if is_first and world.leads:
                show_samples(run, step, answers[:SAMPLES], self.prompts)
        return all_answers(world, written)

    def prompt_rows(self, run: Run) -> TokenRows:
        """The ids of each prompt, with virtual ones in front."""
        method = run.job.method
        virtual = virtual_ids(method.virtual_tokens)
        rows = []
        for prompt in self.prompts:
            row = virtual + prompt.ids
            rows.append(row)
        return rows

    def prompt_groups(self, run: Run, rows: TokenRows) -> list[PromptGroup]:
        """Which prompts are continued together, and how far."""
        lengths = [len(row) for row in rows]
        positions = positions_left(run)
        return groups(lengths, self.max_new_tokens, positions)

    def _answers(self, run: Run, round_: list[PromptGroup], rows: TokenRows) -> list[Answer]:
        """What the model writes in a round for this rank's group."""
        rank = self.world.rank
        idle = rank >= len(round_)
        # Under ZeRO 3 every rank must take part in every forward pass, with or without a prompt of its own.
        number = 0 if idle else rank
        group = round_[number]
        prompts = [rows[i] for i in group.prompts]
        texts = write_greedily(run, prompts, group.new_tokens)
        if idle:
            return []
        numbered = zip(group.prompts, texts, strict=True)
        return list(starmap(Answer, numbered))


@contextmanager
def _judging(model: nn.Module) -> Iterator[None]:
    """Have a model as it is judged, without gradients and dropout; then as it is trained."""
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()


def _row_count(batch: GlobalBatch) -> int:
    """The number of rows of a batch."""
    return len(batch.chosen)


def _prompts_of(round_: list[PromptGroup]) -> int:
    """The number of prompts of a round."""
    counts = [len(group.prompts) for group in round_]
    return sum(counts)
