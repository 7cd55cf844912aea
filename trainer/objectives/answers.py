"""Answers as documents: what objectives on preferences share, two documents to an example.

Shapes: D documents.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from runfolder.objectives import shares_prompts
from trainer.data.collate import shared_by_pairs
from trainer.data.examples import Examples
from trainer.data.tokens import tokenise
from trainer.objectives.base import Arrays, Objective, TensorsByName
from trainer.objectives.likelihood import likelihood_arrays, log_likelihoods

NumbersOfRows = Sequence[Sequence[int]]


class AnswerObjective(Objective):
    """What is learned from answers by their log-likelihoods; documents 2 i and 2 i + 1 are of one example."""

    def read(self, source: str) -> Examples:
        """The rows of a source, two documents each."""
        setup = self.setup
        tokens = tokenise(source, setup.tokenizer, setup.reading, setup.folder, setup.progress)
        examples = Examples.of_each(tokens, 2)
        if shares_prompts(setup.job.objective):
            shared = shared_by_pairs(tokens)
            return replace(examples, shared=shared)
        return examples

    def document_arrays(self, rows: NumbersOfRows, examples: Examples) -> Arrays:
        """What log-likelihoods are computed from, of the documents in some rows."""
        tokenizer = self.setup.tokenizer
        pad_id = tokenizer.pad_token_id
        return likelihood_arrays(rows, examples.tokens, pad_id, examples.shared)

    def policy(self, model: nn.Module, batch: TensorsByName) -> torch.Tensor:
        """The log-likelihoods [D] of a micro-batch's documents."""
        return log_likelihoods(model, batch, self.kernels)

    def log_likelihoods(self, model: nn.Module, batch: TensorsByName) -> TensorsByName:
        """The same with the documents' numbers; what the reference is made of."""
        policy_D = self.policy(model, batch)
        numbers_D = batch["document"]
        return {"document": numbers_D, "log_likelihood": policy_D}
