"""A reward model scores a prompt and its answer (Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, section 3.5).

-log s(R_c - R_r - m) + e (R_c + R_r)^2, with m the margin that a row may ask for (Touvron et al. 2023,
https://arxiv.org/abs/2307.09288, section 3.2.2) and e the weight of centring (Eisenstein et al. 2023,
https://arxiv.org/abs/2312.09244): the mean over the pairs of the global batch.

R is linear in the hidden state of an answer's last token, which ends it. The head starts at zero.

Shapes: K positions, D documents, P pairs.
"""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import logsigmoid

from methods.base import Tensors
from runfolder.objectives import RewardOptions
from trainer.data.collate import collate, skipped_in
from trainer.data.examples import Examples, Indices
from trainer.data.layout import MicroBatch
from trainer.objectives import labels
from trainer.objectives.answers import NumbersOfRows
from trainer.objectives.base import Arrays, HostArrays, Shares, TensorsByName, Totals
from trainer.objectives.pairs import OnPairs, PairLosses, figures_of_pairs, mean_shares
from trainer.objectives.reward_buckets import accuracies, of_buckets, of_lengths
from trainer.objectives.reward_output import LOADING, class_of, complete_folder, padding_token
from trainer.objectives.score_head import SCORE_WEIGHT, replace_head, score_head

PlaceInRow = tuple[int, int]  # a row of a micro-batch, and a position in it
PADDING_ALONE: PlaceInRow = (0, 0)  # where padding alone is scored, in a micro-batch without documents


class RewardModel(OnPairs):
    """To score the chosen answer of each pair above the rejected one."""

    scores = True
    notes = LOADING
    _head_name: str  # in the model, from `take` on

    def prepare(self, model: Any) -> None:
        """Replace the base's head, and settle by which token batches will be padded; raises ValueError."""
        setup = self.setup
        class_of(model.config)
        replace_head(model)
        whole = model.config
        text = whole.get_text_config()
        ends = setup.reading.ends
        token = padding_token(setup.tokenizer, ends, whole)
        for config in (whole, text):
            config.pad_token_id = token
            config.num_labels = 1

    def take(self, model: nn.Module) -> None:
        """Train the head whole, whatever the method does."""
        name, head = score_head(model)
        self._head_name = name
        head.requires_grad_(True)
        head.float()

    def document_arrays(self, rows: NumbersOfRows, examples: Examples) -> Arrays:
        """What scores are computed from, of the documents in some rows; of none, padding is scored."""
        tokens = examples.tokens
        tokenizer = self.setup.tokenizer
        shared = examples.shared
        arrays = collate(rows, tokens, tokenizer.pad_token_id, shared)
        for unused in ("labels", "before"):
            arrays.pop(unused, None)
        places = list(ends_of_documents(rows, tokens.lengths, shared))
        if not places:
            places = [PADDING_ALONE]
        place_D2 = np.array(places, np.int64)
        row_D, position_D = place_D2.T
        kept_K, column_D = np.unique(position_D, return_inverse=True)
        numbers = list(chain.from_iterable(rows))
        return {
            **arrays,
            "kept": kept_K,
            "row": np.ascontiguousarray(row_D),
            "column": column_D,
            "labels": tokens.targets[numbers],
        }

    def arrays(self, examples: Examples, micro: MicroBatch) -> HostArrays:
        """The documents of a micro-batch, where among them each pair has its answers, and the pairs' margins."""
        of_documents = super().arrays(examples, micro)
        arrays = dict(of_documents)
        numbers = list(chain.from_iterable(micro.rows))
        margins = examples.tokens.margins
        margins_D = margins[numbers]
        chosen_P = arrays["chosen"]
        arrays["margins"] = margins_D[chosen_P]
        return arrays

    def policy(self, model: nn.Module, batch: TensorsByName) -> torch.Tensor:
        """The scores [D] of a micro-batch's documents, fp64."""
        scores_D1 = labels.logits(model, batch)
        own_D = scores_D1[:, 0]
        scores_D = self.kernels.sequence.whole(own_D, batch)
        return scores_D.double()

    def loss(self, model: nn.Module, batch: TensorsByName, totals: Totals, prelude: TensorsByName) -> Shares:  # noqa: ARG002
        """The losses of a micro-batch's pairs, over the number of pairs in the global batch."""
        shares, _ = self._shares(model, batch, totals)
        return shares

    def judge(self, model: nn.Module, batch: TensorsByName, totals: Totals, prelude: TensorsByName) -> Shares:  # noqa: ARG002
        """The same, and by buckets of margin and length how often the chosen answer has the higher score."""
        shares, figures = self._shares(model, batch, totals)
        of_pairs = {**of_buckets(figures), **of_lengths(figures)}
        pairs = totals["pairs"]
        more = mean_shares(of_pairs, pairs)
        metrics = {**shares.metrics, **more}
        return Shares(shares.loss, metrics)

    def summary(self, metrics: dict[str, float]) -> dict[str, float]:
        """The accuracy within each bucket, and how far scores go with the lengths of answers."""
        return accuracies(metrics)

    def export(self, model: Any, weights: Tensors, folder: Path) -> None:
        """Write what the method leaves with the head in it, and have the tokenizer pad as is fit for it."""
        old = self._head_name
        parent, dot, _ = old.rpartition(".")
        old_weight = f"{old}.weight"
        renamed = dict(weights)
        head = renamed.pop(old_weight)
        new = parent + dot + SCORE_WEIGHT
        renamed[new] = head
        super().export(model, renamed, folder)
        complete_folder(model, head, folder)
        tokenizer = self.setup.tokenizer
        pad_id = model.config.pad_token_id
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)

    def _shares(self, model: nn.Module, batch: TensorsByName, totals: Totals) -> tuple[Shares, TensorsByName]:
        """A micro-batch's shares, and what is known of each of its pairs."""
        options = self.setup.job.objective
        assert isinstance(options, RewardOptions)
        scores_D = self.policy(model, batch)
        labels_D = batch["labels"]
        labels_D = labels_D.double()
        chosen_place_P = batch["chosen"]
        rejected_place_P = batch["rejected"]
        chosen_P = scores_D[chosen_place_P]
        rejected_P = scores_D[rejected_place_P]
        lead_P = chosen_P - rejected_P - batch["margins"]
        off_centre_P = chosen_P + rejected_P
        square_P = off_centre_P**2
        losses_P = options.centring * square_P - logsigmoid(lead_P)
        found = PairLosses(losses_P, chosen_P, rejected_P)
        chosen_labels_P = labels_D[chosen_place_P]
        rejected_labels_P = labels_D[rejected_place_P]
        figures = figures_of_pairs(found, chosen_labels_P, rejected_labels_P, tie=0.0)
        pairs = totals["pairs"]
        # The padding that is scored for no documents is in no pair, but must reach the weights all the same.
        nothing = 0 * scores_D.sum()
        total = losses_P.sum() + nothing
        loss = total / pairs
        metrics = mean_shares(figures, pairs)
        return Shares(loss, metrics), figures


def ends_of_documents(rows: NumbersOfRows, lengths: Indices, shared: Indices | None) -> Iterator[PlaceInRow]:
    """The place of each document's last token."""
    for row, documents in enumerate(rows):
        stop = 0
        skipped_tokens = skipped_in(documents, shared)
        for document, skipped in zip(documents, skipped_tokens, strict=True):
            length = lengths[document]
            stop += int(length) - skipped
            last = stop - 1
            yield row, last
