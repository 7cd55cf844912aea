"""Judging held-out rows: the loss per target token, and exact match of what the model writes by itself."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.job import Job
from trainer.data.batches import Batches
from trainer.data.encode import Reading
from trainer.data.tokens import Prompt, Tokens, prompts, tokenise, virtual_ids
from trainer.objectives import sft
from trainer.run import Run
from trainer.world import World

PROMPTS_AT_ONCE = 32
SAMPLES = 5


@dataclass(frozen=True)
class Evaluator:
    """The held-out rows of a job; none when it names no evaluation data."""

    world: World
    tokens: Tokens | None
    batches: Batches | None
    prompts: list[Prompt]
    max_new_tokens: int

    @classmethod
    def create(cls, job: Job, tokenizer: Any, cache: Path, world: World) -> "Evaluator":
        """Read a job's evaluation rows, which get virtual tokens in front; every rank calls it."""
        if job.data.eval is None:
            return cls(world, None, None, [], 0)
        tokens = tokenise(job.data.eval, tokenizer, Reading.of(job), cache)
        rows = job.evaluation.rows
        batches = Batches(
            tokens.lengths[:rows],
            tokens.targets[:rows],
            seed=0,
            seq_len=job.data.seq_len,
            batch_tokens=job.train.batch_tokens,
            packing=job.data.packing,
            micro_batch=job.train.micro_batch,
            epochs=1,
        )
        generate = job.evaluation.max_new_tokens
        asked = prompts(job.data.eval, tokenizer, Reading.of(job))[:rows] if generate else []
        return cls(world, tokens, batches, asked, generate)

    def evaluate(self, run: Run, step: int) -> None:
        """Judge the model after a step and append the figures to metrics.jsonl; every rank calls it."""
        if self.tokens is None:
            return
        run.model.eval()
        with torch.no_grad():
            figures = {"eval_loss": self._loss(run)}
            if self.prompts:
                figures["eval_exact_match"] = self._exact_match(run, step)
        run.model.train()
        if self.world.leads:
            run.attempt.append("metrics.jsonl", {"step": step, "time": time.time(), **figures})
            print(f"step {step}  " + "  ".join(f"{k} {v:.4f}" for k, v in figures.items()), flush=True)

    def _loss(self, run: Run) -> float:
        assert self.tokens is not None and self.batches is not None
        sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        for k in range(self.batches.steps):
            for micro in self.batches.deal(k, self.world.rank, self.world.size):
                arrays = sft.arrays(micro, self.tokens, run.tokenizer.pad_token_id)
                batch = {name: torch.from_numpy(a).to(self.world.device) for name, a in arrays.items()}
                part, weight = sft.loss(run.model, batch)
                sums += torch.stack([part.double(), weight.double()])
        dist.all_reduce(sums)
        return float(sums[0] / sums[1])

    def _exact_match(self, run: Run, step: int) -> float:
        """The share of prompts whose greedy continuation is the answer; prompts are dealt in order of length."""
        order = sorted(range(len(self.prompts)), key=lambda i: len(self.prompts[i].ids))
        chunk = PROMPTS_AT_ONCE * self.world.size
        right = torch.zeros((), device=self.world.device)
        for start in range(0, len(order), chunk):
            mine = order[start : start + chunk][self.world.rank :: self.world.size]
            # Under ZeRO 3 every rank must take part in every forward pass, with or without a prompt of its own.
            written = self._generate(run, [self.prompts[i] for i in mine or order[:1]])
            pairs = list(zip(mine, written, strict=False))
            right += sum(matches(text, self.prompts[i].answer) for i, text in pairs)
            if start == 0 and self.world.leads:
                self._show(run, step, pairs[:SAMPLES])
        dist.all_reduce(right)
        return float(right) / len(order)

    def _generate(self, run: Run, asked: list[Prompt]) -> list[str]:
        rows = [virtual_ids(run.job.method.virtual_tokens) + prompt.ids for prompt in asked]
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), run.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, longest - len(row) :] = torch.as_tensor(row)
            mask[i, longest - len(row) :] = 1
        out = run.model.generate(
            input_ids=ids.to(self.world.device),
            attention_mask=mask.to(self.world.device),
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            repetition_penalty=1.0,  # what some bases ask for is no greedy choice, and fails on virtual tokens
            use_cache=True,
            pad_token_id=run.tokenizer.pad_token_id,
            synced_gpus=run.shards.stage == 3,
        )
        texts: list[str] = run.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
        return texts

    def _show(self, run: Run, step: int, pairs: list[tuple[int, str]]) -> None:
        for i, text in pairs:
            prompt = self.prompts[i]
            asked = run.tokenizer.decode(prompt.ids, skip_special_tokens=True)
            run.attempt.event("sample", step=step, prompt=asked, answer=prompt.answer, written=text)


def matches(written: str, answer: str) -> bool:
    """Whether a text is the answer, spaces at its ends aside; where the answer has `#### x`, whether x is equal."""
    if "####" in answer:
        return _final(written) == _final(answer)
    return written.strip() == answer.strip()


def _final(text: str) -> str | None:
    _, mark, final = text.rpartition("####")
    return final.strip().replace(",", "") if mark else None
