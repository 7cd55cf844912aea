"""Judging held-out rows: the loss per target token, and exact match of what the model writes by itself."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import starmap

import numpy as np
import torch

from methods.options.base import known_positions
from runfolder.row_results import write_row_results
from trainer.data.batches import Batches, layout_of
from trainer.data.examples import Examples, GlobalBatch
from trainer.data.tokens import EvaluationPrompt, virtual_ids
from trainer.end_tokens import until_end
from trainer.generation import PromptGroup, groups, rounds
from trainer.greedy import TokenRows, greedily, left_padded
from trainer.objectives.base import TensorsByName, Totals
from trainer.progress import counted
from trainer.reference import know_reference
from trainer.row_results import Answer, ExampleLosses, JudgedRows, all_answers, judged_tensors, share_correct
from trainer.run import Run
from trainer.step import NamedSums, add_shares, dealt_to_rank, prepared, reduced
from trainer.world import World

SAMPLES = 5
StopCriterion = Callable[..., torch.Tensor]  # from ids and scores to whether each row ends


@dataclass(frozen=True)
class Evaluator:
    """The held-out rows of a job; none when it names no evaluation data."""

    world: World
    examples: Examples | None
    batches: Batches | None
    prompts: list[EvaluationPrompt]
    max_new_tokens: int

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
        layout = layout_of(job)
        batches = Batches(examples, layout, seed=0, batch_tokens=job.train.batch_tokens, epochs=1)
        new_tokens = job.evaluation.max_new_tokens
        prompts: list[EvaluationPrompt] = []
        if new_tokens:
            prompts = objective.prompts(source)
        return cls(run.world, examples, batches, prompts[:rows], new_tokens)

    def evaluate(self, run: Run, step: int) -> None:
        """Judge the model after a step and append the metrics to metrics.jsonl; every rank calls it.

        Raises Stopped where there is no time left for that; the next attempt does it then.
        """
        batches = self.batches
        examples = self.examples
        if batches is None or examples is None:
            return
        model = run.model
        device = self.world.device
        losses = ExampleLosses.of(examples, device)
        answers: list[Answer] = []
        model.eval()
        began = time.time()
        try:
            with torch.no_grad():
                metrics = self._metrics(run, step, batches, losses)
                if self.prompts:
                    answers = self._written(run, step)
        finally:
            model.train()
        judged = JudgedRows(examples, self.prompts, losses, answers)
        if self.world.leads:
            self._report(run, step, metrics, judged, began)

    def _report(self, run: Run, step: int, metrics: dict[str, float], judged: JudgedRows, began: float) -> None:
        """Keep what was found of each row, then append the metrics, so that these are never there without it."""
        attempt = run.attempt
        found = list(judged.results(run))
        write_row_results(attempt, step, found)
        if self.prompts:
            metrics["eval_exact_match"] = share_correct(found)
        row = {"step": step, "time": time.time(), **metrics}
        attempt.append("metrics.jsonl", row)
        attempt.event("evaluated", step=step, seconds=row["time"] - began)
        words = [f"step {step}"]
        for name, value in metrics.items():
            words.append(f"{name} {value:.4f}")
        line = "  ".join(words)
        print(line, flush=True)

    def _metrics(self, run: Run, step: int, batches: Batches, losses: ExampleLosses) -> dict[str, float]:
        """The objective's loss over all held-out rows, and what it logs beside it; `losses` takes those of each."""
        attempt = run.attempt
        objective = run.objective
        held_out = self._held_out(run, step, batches)
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

    def _held_out(self, run: Run, step: int, batches: Batches) -> list[GlobalBatch]:
        """The held-out batches; what the model writes for them where the objective learns from that."""
        objective = run.objective
        numbers = range(batches.steps)
        held_out = list(map(batches.batch, numbers))
        if not objective.generates:
            return held_out
        written = []
        for batch in counted(run.attempt, self.world, step, "rows written", held_out, _row_count):
            run.stops.leave_if_warned(step)
            rollout = objective.rollout(run.model, batch, 0)
            written.append(objective.rolled_out(batch, rollout))
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
            shares = objective.judge(model, micro_batch, divisors, known)
            each = shares.each
            if objective.generates:  # of other documents than those of the source
                each = None
            losses.add(micro, each)
            yield {**shares.metrics, "loss": shares.loss}

    def _written(self, run: Run, step: int) -> list[Answer]:
        """The greedy continuation of all prompts, on every rank; one that fills all positions has none."""
        world = self.world
        rows = self.prompt_rows(run)
        continued = self.prompt_groups(run, rows)
        if world.leads:
            self._tell_limits(run, step, continued)
        written: list[Answer] = []
        dealt = list(rounds(continued, world.size))
        told = counted(run.attempt, world, step, "answers", dealt, _prompts_of)
        for number, round_ in enumerate(told):
            run.stops.leave_if_warned(step)
            answers = self._answers(run, round_, rows)
            written += answers
            is_first = number == 0
            if is_first and world.leads:
                samples = answers[:SAMPLES]
                self._show(run, step, samples)
        return all_answers(world, written)

    def prompt_rows(self, run: Run) -> TokenRows:
        """The ids of each prompt, with virtual ones in front."""
        method = run.job.method
        virtual = virtual_ids(method.virtual_tokens)
        return [virtual + prompt.ids for prompt in self.prompts]

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
        texts = self.generate(run, prompts, group.new_tokens)
        if idle:
            return []
        numbered = zip(group.prompts, texts, strict=True)
        return list(starmap(Answer, numbered))

    def _tell_limits(self, run: Run, step: int, continued: list[PromptGroup]) -> None:
        """Say of how many prompts the base's positions leave too little, or nothing."""
        fitting = short = 0
        for group in continued:
            count = len(group.prompts)
            fitting += count
            if group.new_tokens < self.max_new_tokens:
                short += count
        asked = len(self.prompts)
        without = asked - fitting
        if without or short:
            positions = positions_left(run)
            run.attempt.event("prompts_limited", step=step, without_room=without, with_less_room=short)
            print(
                f"evaluation: of {asked} prompts {without} fill the base's {positions} positions and "
                f"count as not matched; {short} get fewer than {self.max_new_tokens} new tokens",
                flush=True,
            )

    def generate(self, run: Run, rows: TokenRows, new_tokens: int, stop: StopCriterion | None = None) -> list[str]:
        """What the model writes after each row of ids, greedily, without the token that ends it.

        `stop` says after each token whether rows are to end there.
        """
        run.attempt.note_progress()
        tokenizer = run.tokenizer
        pad = tokenizer.pad_token_id
        ids, mask = left_padded(rows, pad)
        ends = run.ends
        device = self.world.device
        with greedily(run.model, new_tokens, ends, pad):
            out = run.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                use_cache=True,
                synced_gpus=run.sharded.stage == 3,
                stopping_criteria=[stop] if stop else None,
            )
        width = ids.shape[1]
        continued = out[:, width:]
        continuations = continued.tolist()
        answers = [until_end(row, ends) for row in continuations]
        texts: list[str] = tokenizer.batch_decode(answers, skip_special_tokens=True)
        return texts

    def _show(self, run: Run, step: int, answers: list[Answer]) -> None:
        """Keep what the model wrote for some prompts in the attempt's events."""
        tokenizer = run.tokenizer
        for answer in answers:
            prompt = self.prompts[answer.prompt]
            sample = {
                "prompt": tokenizer.decode(prompt.ids, skip_special_tokens=True),
                "answer": prompt.answer,
                "written": answer.text,
            }
            run.attempt.event("sample", step=step, **sample)


def _row_count(batch: GlobalBatch) -> int:
    """The number of rows of a batch."""
    return len(batch.chosen)


def _prompts_of(round_: list[PromptGroup]) -> int:
    """The number of prompts of a round."""
    return sum(len(group.prompts) for group in round_)


def added(totals: Iterable[Totals]) -> dict[str, float]:
    """The totals of several batches together."""
    sums: dict[str, float] = {}
    for of_batch in totals:
        for name, value in of_batch.items():
            so_far = sums.get(name, 0)
            sums[name] = so_far + value
    return sums


def positions_left(run: Run) -> int | None:
    """The positions of the base that a document may fill under this method; None where there is no limit."""
    config = run.model.config.get_text_config()
    known = known_positions(config.to_dict())
    if known is None:
        return None
    method = run.job.method
    return known - method.positions_before
