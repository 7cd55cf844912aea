"""Judging held-out rows: the loss per target token, and exact match of what the model writes by itself."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from methods.options.base import positions
from trainer.data.batches import Batches, layout_of
from trainer.data.examples import GlobalBatch
from trainer.data.tokens import Prompt, virtual_ids
from trainer.ends import until_end
from trainer.generation import Group, groups, rounds
from trainer.objectives.base import Totals
from trainer.run import Run
from trainer.step import add, micro_batches, prepared, reduced
from trainer.world import World

SAMPLES = 5


@dataclass(frozen=True)
class Evaluator:
    """The held-out rows of a job; none when it names no evaluation data."""

    world: World
    batches: Batches | None
    prompts: list[Prompt]
    max_new_tokens: int

    @classmethod
    def create(cls, run: Run) -> "Evaluator":
        """Read a job's evaluation rows; every rank calls it."""
        job = run.job
        if job.data.eval is None:
            return cls(run.world, None, [], 0)
        rows = job.evaluation.rows
        examples = run.objective.read(job.data.eval).first(rows)
        batches = Batches(examples, layout_of(job), seed=0, batch_tokens=job.train.batch_tokens, epochs=1)
        generate = job.evaluation.max_new_tokens
        asked = run.objective.prompts(job.data.eval)[:rows] if generate else []
        return cls(run.world, batches, asked, generate)

    def evaluate(self, run: Run, step: int) -> None:
        """Judge the model after a step and append the figures to metrics.jsonl; every rank calls it."""
        if self.batches is None:
            return
        run.model.eval()
        with torch.no_grad():
            figures = self._figures(run, self.batches)
            if self.prompts:
                figures["eval_exact_match"] = self._exact_match(run, step)
        run.model.train()
        if self.world.leads:
            run.attempt.append("metrics.jsonl", {"step": step, "time": time.time(), **figures})
            print(f"step {step}  " + "  ".join(f"{k} {v:.4f}" for k, v in figures.items()), flush=True)

    def _figures(self, run: Run, batches: Batches) -> dict[str, float]:
        """The objective's loss over all held-out rows, and what it logs beside it."""
        held_out = [self._written(run, batches.batch(k)) for k in range(batches.steps)]
        totals = added(run.objective.totals(batch) for batch in held_out)
        # One of the totals divides the sums at their end, in fp64, instead of every share.
        unit = next(iter(totals.values()))
        totals = {name: total / unit for name, total in totals.items()}
        sums: dict[str, torch.Tensor] = {}
        for batch in held_out:
            run.attempt.alive()
            passes, known = prepared(run, micro_batches(run, batch), run.objective.totals(batch))
            for one in passes:
                shares = run.objective.loss(run.model, one, totals, known)
                add(sums, {**shares.figures, "loss": shares.loss})
        return {f"eval_{name}": float(value / unit) for name, value in reduced(sums).items()}

    def _written(self, run: Run, batch: GlobalBatch) -> GlobalBatch:
        """A held-out batch, or what the model writes for it where the objective learns from that."""
        if not run.objective.generates:
            return batch
        return run.objective.rolled_out(batch, run.objective.rollout(run.model, batch, 0))

    def _exact_match(self, run: Run, step: int) -> float:
        """The share of all prompts whose greedy continuation is the answer; one without room for any has none."""
        asked = [virtual_ids(run.job.method.virtual_tokens) + prompt.ids for prompt in self.prompts]
        positions = positions_left(run)
        made = groups([len(ids) for ids in asked], self.max_new_tokens, positions)
        if self.world.leads:
            self._tell_limits(run, step, made, positions)
        right = torch.zeros((), device=self.world.device)
        for number, group_of_rank in enumerate(rounds(made, self.world.size)):
            idle = self.world.rank >= len(group_of_rank)
            # Under ZeRO 3 every rank must take part in every forward pass, with or without a prompt of its own.
            mine = group_of_rank[0 if idle else self.world.rank]
            written = self._generate(run, [asked[i] for i in mine.prompts], mine.new_tokens)
            pairs = [] if idle else list(zip(mine.prompts, written, strict=True))
            right += sum(matches(text, self.prompts[i].answer) for i, text in pairs)
            if number == 0 and self.world.leads:
                self._show(run, step, pairs[:SAMPLES])
        dist.all_reduce(right)
        return float(right) / len(self.prompts)

    def _tell_limits(self, run: Run, step: int, made: list[Group], positions: int | None) -> None:
        """Say of how many prompts the base's positions leave too little, or nothing."""
        without = len(self.prompts) - sum(len(group.prompts) for group in made)
        short = sum(len(group.prompts) for group in made if group.new_tokens < self.max_new_tokens)
        if without or short:
            run.attempt.event("prompts_limited", step=step, without_room=without, with_less_room=short)
            print(
                f"evaluation: of {len(self.prompts)} prompts {without} fill the base's {positions} positions and "
                f"count as not matched; {short} get fewer than {self.max_new_tokens} new tokens",
                flush=True,
            )

    def _generate(self, run: Run, rows: list[list[int]], new_tokens: int) -> list[str]:
        """What the model writes after each row of ids, greedily, without the token that ends it."""
        run.attempt.alive()
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), run.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, longest - len(row) :] = torch.as_tensor(row)
            mask[i, longest - len(row) :] = 1
        ends = run.ends
        with greedily(run.model, new_tokens, ends, run.tokenizer.pad_token_id):
            out = run.model.generate(
                input_ids=ids.to(self.world.device),
                attention_mask=mask.to(self.world.device),
                use_cache=True,
                synced_gpus=run.shards.stage == 3,
            )
        answers = [until_end(row, ends) for row in out[:, longest:].tolist()]
        texts: list[str] = run.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return texts

    def _show(self, run: Run, step: int, pairs: list[tuple[int, str]]) -> None:
        for i, text in pairs:
            prompt = self.prompts[i]
            asked = run.tokenizer.decode(prompt.ids, skip_special_tokens=True)
            run.attempt.event("sample", step=step, prompt=asked, answer=prompt.answer, written=text)


def added(totals: Iterable[Totals]) -> dict[str, float]:
    """The totals of several batches together."""
    sums: dict[str, float] = {}
    for each in totals:
        for name, value in each.items():
            sums[name] = sums.get(name, 0) + value
    return sums


def positions_left(run: Run) -> int | None:
    """The positions of the base that a document may fill under this method; None where there is no limit."""
    known = positions(run.model.config.get_text_config().to_dict())
    return None if known is None else known - run.job.method.positions_before


@contextmanager
def greedily(model: Any, new_tokens: int, ends: Sequence[int], pad: int) -> Iterator[None]:
    """Within it, a model generates the likeliest token each time, until one of `ends`.

    What the base's own generation config asks for beside is put aside: a penalty, say, is no greedy choice.
    """
    from transformers import GenerationConfig

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = base.generation_config
    base.generation_config = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=list(ends), pad_token_id=pad
    )
    try:
        yield
    finally:
        base.generation_config = own


def matches(written: str, answer: str) -> bool:
    """Whether a text is the answer, spaces at its ends aside; where the answer has `#### x`, whether x is equal."""
    if "####" in answer:
        return _final(written) == _final(answer)
    return written.strip() == answer.strip()


def _final(text: str) -> str | None:
    _, mark, final = text.rpartition("####")
    return final.strip().replace(",", "") if mark else None
