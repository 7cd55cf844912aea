"""Log-probabilities of the tokens of prompts, from the rows of a pass that stand in front of them.

Shapes: T rows of a pass, N of them whose next token is scored, V vocabulary, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from serving.forward import Chosen, Forward
from serving.mix import Mix
from serving.passing import Span
from serving.sequence import Sequence

ROWS = 1024  # of logits at a time, where there are many


class Scored(NamedTuple):
    """A row of a pass, and the token behind it in the prompt, whose log-probability is asked."""

    sequence: Sequence
    row: int
    token: int


def score(forward: Forward, chosen: Chosen, hidden_TD: Tensor) -> None:
    """Note in each sequence what the rows say of the tokens behind them, where that is asked."""
    scored: list[Scored] = []
    for sequence, span in chosen:
        scored += scored_rows(sequence, span)
    for first in range(0, len(scored), ROWS):
        part = scored[first : first + ROWS]
        scores = log_probabilities(forward, part, hidden_TD)
        for item, value in zip(part, scores, strict=True):
            item.sequence.scores.append(value)


def scored_rows(sequence: Sequence, span: Span) -> list[Scored]:
    """The rows of a span that are followed by a token whose log-probability is asked."""
    if sequence.scored_from is None:
        return []
    prompt = sequence.request.prompt
    first = span.start - sequence.virtual
    low = max(sequence.scored_from, first + 1)
    high = min(len(prompt), first + span.count + 1)
    scored = []
    for number in range(low, high):
        row = span.row + number - 1 - first
        scored.append(Scored(sequence, row, prompt[number]))
    return scored


def log_probabilities(forward: Forward, scored: list[Scored], hidden_TD: Tensor) -> list[float]:
    """The log-probability of the token behind each of these rows."""
    residents = [item.sequence.resident for item in scored]
    rows = [item.row for item in scored]
    tokens = [item.token for item in scored]
    mix = Mix.of(residents, forward.device)
    logits_NV = forward.decoder.logits(hidden_TD[rows], mix).float()
    token_N = torch.tensor(tokens, device=logits_NV.device)
    log_NV = logits_NV.log_softmax(-1)
    score_N1 = log_NV.gather(1, token_N[:, None])
    return score_N1[:, 0].tolist()
