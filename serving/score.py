"""Log-probabilities of the tokens of prompts, from the rows of a pass that stand in front of them.

Shapes: T rows of a pass, N of them whose next token is scored, V vocabulary, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from serving.forward import Chosen, Forward
from serving.mix import AdapterBatch, Owner
from serving.passing import Span
from serving.sequence import Sequence

AT_ONCE = 1024  # rows of logits, where there are many


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
    for first in range(0, len(scored), AT_ONCE):
        stop = first + AT_ONCE
        part = scored[first:stop]
        values, are_likeliest = log_probabilities(forward, part, hidden_TD)
        for item, value, is_likeliest in zip(part, values, are_likeliest, strict=True):
            sequence = item.sequence
            sequence.scores.append(value)
            sequence.are_likeliest.append(is_likeliest)


def scored_rows(sequence: Sequence, span: Span) -> list[Scored]:
    """The rows of a span that are followed by a token whose log-probability is asked."""
    if sequence.scored_from is None:
        return []
    prompt = sequence.request.prompt
    first = span.start - sequence.virtual + 1  # the token behind the first row
    stop = first + span.count
    low = max(sequence.scored_from, first)
    high = min(len(prompt), stop)
    scored: list[Scored] = []
    for number in range(low, high):
        row = span.row + number - first
        token = prompt[number]
        item = Scored(sequence, row, token)
        scored.append(item)
    return scored


def log_probabilities(forward: Forward, scored: list[Scored], hidden_TD: Tensor) -> tuple[list[float], list[bool]]:
    """The log-probability of the token behind each of these rows, and whether no other one is likelier.

    It is that of drawing the token at its request's temperature, where that is not 0.
    """
    owners: list[Owner] = []
    rows: list[int] = []
    tokens: list[int] = []
    temperatures: list[float] = []
    for item in scored:
        sequence = item.sequence
        temperatures.append(sequence.request.scored_temperature)
        owners.append(sequence.resident)
        rows.append(item.row)
        tokens.append(item.token)
    device = forward.device
    adapters = AdapterBatch.of(owners)
    adapters = adapters.to(device)
    hidden_ND = hidden_TD[rows]
    logits_NV = forward.decoder.logits(hidden_ND, adapters)
    temperature_N = torch.tensor(temperatures, device=device)
    temperature_N1 = temperature_N[:, None]
    logits_NV = logits_NV.float() / temperature_N1
    log_NV = logits_NV.log_softmax(-1)
    token_N = torch.tensor(tokens, device=device)
    token_N1 = token_N[:, None]
    score_N1 = log_NV.gather(1, token_N1)
    score_N = score_N1.flatten()
    scores: list[float] = score_N.tolist()
    highest_N = log_NV.amax(-1)
    is_likeliest_N = score_N == highest_N
    are_likeliest: list[bool] = is_likeliest_N.tolist()
    return scores, are_likeliest
