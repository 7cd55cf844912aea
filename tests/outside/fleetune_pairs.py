"""Objectives of another package: of a pair of documents the first one is to become the likelier; and a slow one.

The first uses all that an objective may: examples of two documents, two totals, a prelude, the reference, metrics
and (in the second class) what the model writes. With h the log-likelihood of the first document less that of the
second, and z and z_0 the means of h over the global batch for the policy and for the reference, its loss is the mean
of softplus(-(h - z / 2 - z_0 / 2)) over pairs, plus the mean cross entropy of all labels.
Shapes: N labels, D documents, P pairs.
"""

import os
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy, softplus

from trainer.data.examples import Examples, GlobalBatch
from trainer.data.layout import IGNORED, MicroBatch
from trainer.data.shards import Counts, join_examples
from trainer.data.tokens import Tokens, tokenise
from trainer.objectives import labels
from trainer.objectives.base import Arrays, Objective, Shares, TensorsByName, Totals
from trainer.objectives.sft import Supervised


class Pairs(Objective):
    """Rows 2 i and 2 i + 1 are a pair."""

    has_prelude = True

    def read(self, source: str) -> Examples:
        setup = self.setup
        return Examples.of_each(tokenise(source, setup.tokenizer, setup.reading, setup.folder, setup.progress), 2)

    def totals(self, batch: GlobalBatch) -> Totals:
        return {"pairs": len(batch.chosen), "labels": batch.targets}

    def arrays(self, examples: Examples, micro: MicroBatch) -> Arrays:
        made = labels.label_arrays(micro.rows, examples.tokens, self.setup.tokenizer.pad_token_id)
        lengths = [[len(examples.tokens.document(i).ids) for i in row] for row in micro.rows]
        before = np.cumsum([0, *map(len, lengths)])
        document = [
            before[row] + np.searchsorted(np.cumsum(lengths[row]), position, side="right") if micro.rows else 0
            for row, position in zip(made["row"], made["kept"][made["column"]] + 1, strict=True)
        ]
        first, second = np.array(micro.examples, np.int64).reshape(-1, 2).T
        return made | {
            "document": np.array(document, np.int64),
            "documents": np.zeros(max(1, before[-1]), np.float32),
            "first": np.ascontiguousarray(first),
            "second": np.ascontiguousarray(second),
        }

    def prelude(self, model: Any, batch: TensorsByName, totals: Totals) -> TensorsByName:
        policy, _ = margins(model, batch)
        with self.method.reference(model):
            reference, _ = margins(model, batch)
        return {"policy": policy.sum() / totals["pairs"], "reference": reference.sum() / totals["pairs"]}

    def loss(self, model: Any, batch: TensorsByName, totals: Totals, prelude: TensorsByName) -> Shares:
        h_P, entropy = margins(model, batch)
        known = (prelude["policy"] / 2 + prelude["reference"] / 2).float()
        losses_P = softplus(-(h_P - known))
        metrics = {"margin": h_P.sum() / totals["pairs"], "likelier": (h_P > 0).float().sum() / totals["pairs"]}
        return Shares(losses_P.sum() / totals["pairs"] + entropy / totals["labels"], metrics)


def margins(model: Any, batch: TensorsByName) -> tuple[torch.Tensor, torch.Tensor]:
    """h of every pair [P], and the summed cross entropy of all labels."""
    logits_NV = labels.logits(model, batch).float()
    entropy_N = cross_entropy(logits_NV, batch["label"], ignore_index=IGNORED, reduction="none")
    entropy_D = batch["documents"].index_add(0, batch["document"], entropy_N)
    return entropy_D[batch["second"]] - entropy_D[batch["first"]], entropy_N.sum()


class WrittenPairs(Pairs):
    """The same of answers that are drawn anew, and never twice the same."""

    generates = True

    def rollout(self, model: Any, batch: GlobalBatch, step: int) -> Arrays:  # noqa: ARG002
        seed = [os.urandom(8)]
        dist.broadcast_object_list(seed)
        rng = np.random.default_rng(list(seed[0]))
        documents = [batch.examples.tokens.document(i) for i in batch.documents()]
        target = np.concatenate([document.target for document in documents])
        ids = np.concatenate([document.ids for document in documents])
        return {
            "ids": np.where(target, rng.integers(3, 300, len(ids)), ids).astype(np.int32),
            "target": target,
            "ends": np.cumsum([len(document.ids) for document in documents]),
        }

    def rolled_out(self, batch: GlobalBatch, rollout: Arrays) -> GlobalBatch:
        ends = rollout["ends"][:-1]
        written = list(zip(np.split(rollout["ids"], ends), np.split(rollout["target"], ends), strict=True))
        tokens = Tokens([join_examples(written, range(len(written)), Counts())])
        return GlobalBatch(Examples.of_each(tokens, 2), np.arange(len(batch.chosen)))


class Slow(Supervised):
    """Supervised fine-tuning whose steps take two seconds and more."""

    def totals(self, batch: GlobalBatch) -> Totals:
        time.sleep(2)
        return super().totals(batch)


class Steady(Supervised):
    """Supervised fine-tuning whose steps take half a second and more."""

    def totals(self, batch: GlobalBatch) -> Totals:
        time.sleep(0.5)
        return super().totals(batch)


class SlowlyJudged(Supervised):
    """Supervised fine-tuning that takes half a second for each micro-batch that it judges."""

    def judge(self, model: Any, batch: TensorsByName, totals: Totals, prelude: TensorsByName) -> Shares:
        time.sleep(0.5)
        return super().judge(model, batch, totals, prelude)


class Hungry(Supervised):
    """Supervised fine-tuning on a device that has room for 128 positions with their gradients."""

    def loss(self, model: Any, batch: TensorsByName, totals: Totals, prelude: TensorsByName) -> Shares:
        if torch.is_grad_enabled() and batch["input_ids"].numel() > 128:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().loss(model, batch, totals, prelude)
