"""Supervised fine-tuning: the mean cross entropy of the labels of a global batch. Shapes: N labels, V tokens."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from trainer.data.examples import Examples, GlobalBatch, Indices
from trainer.data.layout import IGNORED, MicroBatch
from trainer.data.tokens import EvaluationPrompt, read_prompts, tokenise
from trainer.objectives import labels
from trainer.objectives.base import Objective, Shares, TensorsByName, Totals
from trainer.objectives.likelihood import CHUNK, label_losses, summed_by_document


class Supervised(Objective):
    """To write the answers of the data; each document is an example."""

    def read(self, source: str) -> Examples:
        """The rows of a source as documents whose answers are the labels."""
        setup = self.setup
        reading = setup.reading
        tokenizer = setup.tokenizer
        tokens = tokenise(source, tokenizer, reading, setup.folder, setup.progress)
        return Examples.of_each(tokens)

    def prompts(self, source: str) -> list[EvaluationPrompt]:
        """The rows of a source without their last answer."""
        setup = self.setup
        return read_prompts(source, setup.tokenizer, setup.reading)

    def totals(self, batch: GlobalBatch) -> Totals:
        """The number of labels in a global batch."""
        return {"labels": batch.targets}

    def arrays(self, examples: Examples, micro: MicroBatch) -> dict[str, Indices]:
        """The documents of a micro-batch and their labels."""
        tokens = examples.tokens
        tokenizer = self.setup.tokenizer
        pad_id = tokenizer.pad_token_id
        return labels.label_arrays(micro.rows, tokens, pad_id)

    def loss(self, model: nn.Module, batch: TensorsByName, totals: Totals, prelude: TensorsByName) -> Shares:  # noqa: ARG002
        """The cross entropy of the labels of a micro-batch, summed in fp32, over the labels of the global batch."""
        count = totals["labels"]
        if self.kernels.head:
            total = labels.total_loss(model, batch, self.kernels.head)
        else:
            logits_NV = labels.logits(model, batch)
            total = summed(logits_NV, batch["label"])
        of_rows = self.kernels.sequence.summed(total)
        return Shares(of_rows / count)

    def judge(self, model: nn.Module, batch: TensorsByName, totals: Totals, prelude: TensorsByName) -> Shares:  # noqa: ARG002
        """The same of held-out rows, and the summed cross entropy of each document; summed in fp64."""
        losses_N = label_losses(model, batch, self.kernels)
        counts_D = batch["document_labels"]
        sums_D = summed_by_document(losses_N, counts_D)
        losses_D = sums_D / totals["labels"]
        loss = losses_D.sum()
        return Shares(loss, each=losses_D)


def summed(logits_NV: torch.Tensor, label_N: torch.Tensor) -> torch.Tensor:
    """The cross entropy of labels in fp32, summed; zero where all are ignored."""
    if len(label_N) <= CHUNK:
        return _chunk_loss(logits_NV, label_N)
    logits_chunks = logits_NV.split(CHUNK)
    label_chunks = label_N.split(CHUNK)
    chunks = zip(logits_chunks, label_chunks, strict=True)
    losses = []
    for logits, label in chunks:
        loss = checkpoint(_chunk_loss, logits, label, use_reentrant=False)
        losses.append(loss)
    stacked = torch.stack(losses)
    return stacked.sum()


def _chunk_loss(logits_NV: torch.Tensor, label_N: torch.Tensor) -> torch.Tensor:
    """The summed cross entropy of a chunk, whose logits are held in fp32 only here."""
    fp32_NV = logits_NV.float()
    return cross_entropy(fp32_NV, label_N, ignore_index=IGNORED, reduction="sum")
