"""Supervised fine-tuning: the mean cross entropy of the labels of a global batch. Shapes: N labels, V tokens."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from trainer.data.examples import Examples, GlobalBatch, Indices
from trainer.data.layout import IGNORED, MicroBatch
from trainer.data.tokens import Prompt, prompts, tokenise
from trainer.objectives import labels
from trainer.objectives.base import Objective, Shares, Tensors, Totals

CHUNK = 1024  # labels whose logits are held in fp32 at a time


class Supervised(Objective):
    """To write the answers of the data; each document is an example."""

    def read(self, source: str) -> Examples:
        """The rows of a source as documents whose answers are the labels."""
        setup = self.setup
        return Examples.of_each(tokenise(source, setup.tokenizer, setup.reading, setup.folder, setup.progress))

    def prompts(self, source: str) -> list[Prompt]:
        """The rows of a source without their last answer."""
        return prompts(source, self.setup.tokenizer, self.setup.reading)

    def totals(self, batch: GlobalBatch) -> Totals:
        """The number of labels."""
        return {"labels": batch.targets}

    def arrays(self, examples: Examples, micro: MicroBatch) -> dict[str, Indices]:
        """The documents and their labels."""
        return labels.arrays(micro.rows, examples.tokens, self.setup.tokenizer.pad_token_id)

    def loss(self, model: nn.Module, batch: Tensors, totals: Totals, prelude: Tensors) -> Shares:  # noqa: ARG002
        """The cross entropy of the labels of a micro-batch, summed in fp32, over the labels of the global batch."""
        return Shares(summed(labels.logits(model, batch), batch["label"]) / totals["labels"])


def summed(logits_NV: torch.Tensor, label_N: torch.Tensor) -> torch.Tensor:
    """The cross entropy of labels in fp32, summed; zero where all are ignored."""
    if len(label_N) <= CHUNK:
        return _chunk(logits_NV, label_N)
    pairs = zip(logits_NV.split(CHUNK), label_N.split(CHUNK), strict=True)
    return torch.stack([checkpoint(_chunk, *pair, use_reentrant=False) for pair in pairs]).sum()


def _chunk(logits_NV: torch.Tensor, label_N: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits_NV.float(), label_N, ignore_index=IGNORED, reduction="sum")
