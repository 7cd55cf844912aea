"""A reward model, Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, section 3.5: a score R of a prompt and answer.

-log s(R_c - R_r - m) + e (R_c + R_r)^2, with m the margin that a row may ask for (Touvron et al. 2023,
https://arxiv.org/abs/2307.09288, section 3.2.2) and e the weight of centring (Eisenstein et al. 2023,
https://arxiv.org/abs/2312.09244): the mean over the pairs of the global batch.

R is linear in the hidden state of an answer's last token, which ends it. The head starts at zero.

Shapes: D documents, P pairs, A answers.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import logsigmoid

from runfolder.objectives import RewardOptions
from trainer.data.examples import Examples
from trainer.data.layout import MicroBatch, collate
from trainer.objectives import labels
from trainer.objectives.answers import NumbersOfRows
from trainer.objectives.base import Arrays, HostArrays, Shares, TensorsByName, Totals, Weights
from trainer.objectives.pairs import OnPairs, PairLosses, figures_of_pairs, mean_shares
from trainer.objectives.reward_buckets import accuracies, of_buckets, of_lengths
from trainer.objectives.reward_output import HEAD, class_of, complete_folder, padding_token
from trainer.objectives.score_head import replace_head, score_head


class RewardModel(OnPairs):
    """To score the chosen answer of each pair above the rejected one."""

    scores = True
    _head_name: str  # in the model, from `take` on

    def prepare(self, model: Any) -> None:
        """Replace the base's head, and settle by which token batches will be padded."""
        class_of(model.config)
        replace_head(model)
        token = padding_token(self.setup.tokenizer, self.setup.reading.ends, model.config)
        model.config.get_text_config().pad_token_id = token
        model.config.pad_token_id = token
        model.config.num_labels = 1

    def take(self, model: nn.Module) -> None:
        """Train the head whole, whatever the method does."""
        self._head_name, head = score_head(model)
        head.requires_grad_(True)
        head.float()

    def document_arrays(self, rows: NumbersOfRows, examples: Examples) -> Arrays:
        """What scores are computed from, of the documents in some rows; one of padding stands in for none."""
        tokens = examples.tokens
        pad_id = self.setup.tokenizer.pad_token_id
        batch = collate(rows, tokens, pad_id)
        row_D, end_D = np.array(list(ends(rows, tokens.lengths)) or [(0, 0)], np.int64).T
        kept_K, column_D = np.unique(end_D, return_inverse=True)
        numbers = [number for row in rows for number in row]
        return {
            "input_ids": batch["input_ids"],
            "position_ids": batch["position_ids"],
            "kept": kept_K,
            "row": np.ascontiguousarray(row_D),
            "column": column_D,
            "labels": tokens.targets[numbers],
        }

    def arrays(self, examples: Examples, micro: MicroBatch) -> HostArrays:
        """The documents of a micro-batch, where among them each pair has its answers, and the pairs' margins."""
        arrays = dict(super().arrays(examples, micro))
        numbers = [number for row in micro.rows for number in row]
        margins_D = examples.tokens.margins[numbers]
        arrays["margins"] = margins_D[arrays["chosen"]]
        return arrays

    def policy(self, model: nn.Module, batch: TensorsByName) -> torch.Tensor:
        """The scores [D] of a micro-batch's documents, fp64."""
        scores_D1 = labels.logits(model, batch)
        return scores_D1[:, 0].double()

    def loss(self, model: nn.Module, batch: TensorsByName, totals: Totals, prelude: TensorsByName) -> Shares:  # noqa: ARG002
        """The losses of a micro-batch's pairs, over the number of pairs in the global batch."""
        shares, _ = self._shares(model, batch, totals)
        return shares

    def judge(self, model: nn.Module, batch: TensorsByName, totals: Totals, prelude: TensorsByName) -> Shares:  # noqa: ARG002
        """The same, and by buckets of margin and length how often the chosen answer has the higher score."""
        shares, figures = self._shares(model, batch, totals)
        of_pairs = {**of_buckets(figures), **of_lengths(figures)}
        more = mean_shares(of_pairs, totals["pairs"])
        return Shares(shares.loss, {**shares.metrics, **more})

    def summary(self, metrics: dict[str, float]) -> dict[str, float]:
        """The accuracy within each bucket, and how far scores go with the lengths of answers."""
        return accuracies(metrics)

    def exported(self, weights: Weights) -> Weights:
        """The weights under the names of the class of transformers that scores sequences."""
        old = f"{self._head_name}.weight"
        parent, dot, _ = self._head_name.rpartition(".")
        renamed = dict(weights)
        if old in weights:  # on rank 0
            renamed[parent + dot + HEAD] = renamed.pop(old)
        return renamed

    def complete(self, model: Any, weights: Weights, folder: Path) -> None:
        """Put the head, and what transformers must know of it, into the folder; and the token that pads."""
        tokenizer = self.setup.tokenizer
        pad_id = model.config.pad_token_id
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
        complete_folder(model.config, weights, folder)

    def _shares(self, model: nn.Module, batch: TensorsByName, totals: Totals) -> tuple[Shares, TensorsByName]:
        """A micro-batch's shares, and what is known of each of its pairs."""
        options = self.setup.job.objective
        assert isinstance(options, RewardOptions)
        scores_D = self.policy(model, batch)
        chosen_P = scores_D[batch["chosen"]]
        rejected_P = scores_D[batch["rejected"]]
        lead_P = chosen_P - rejected_P - batch["margins"]
        losses_P = options.centring * (chosen_P + rejected_P) ** 2 - logsigmoid(lead_P)
        nothing = 0 * scores_D.sum()  # what stands in for no documents must reach the weights all the same
        loss = losses_P.sum() / totals["pairs"] + nothing
        labels_D = batch["labels"].double()
        found = PairLosses(losses_P, chosen_P, rejected_P)
        figures = figures_of_pairs(found, labels_D[batch["chosen"]], labels_D[batch["rejected"]], tie=0.0)
        return Shares(loss, mean_shares(figures, totals["pairs"])), figures


def ends(rows: NumbersOfRows, lengths: Any) -> Iterator[tuple[int, int]]:
    """The row and the place of each document's last token."""
    for number, documents in enumerate(rows):
        place = -1
        for document in documents:
            place += int(lengths[document])
            yield number, place
