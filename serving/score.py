"""Log-probabilities of the tokens of prompts, from the rows of a pass that stand in front of them.

Shapes: T rows of a pass, N of them whose next token is scored, V vocabulary, D width.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from serving.forward import Chosen, Forward
from serving.mix import AdapterBatch, Owner
from serving.passing import Span
from serving.sampler import log_probability
from serving.sequence import Sequence

AT_ONCE = 1024  # rows of logits, where there are many


class Scored(NamedTuple):
    """Rows of a pass, one behind the other, and the tokens behind them in a prompt, whose scores are asked."""

    sequence: Sequence
    row: int  # the first
    tokens: tuple[int, ...]


def score(forward: Forward, chosen: Chosen, hidden_TD: Tensor) -> None:
    """Note in each sequence what the rows say of the tokens behind them, where that is asked."""
    scored: list[Scored] = []
    for sequence, span in chosen:
        rows = scored_rows(sequence, span)
        if rows.tokens:
            scored.append(rows)
    for part in in_parts(scored, AT_ONCE):
        values, are_likeliest = log_probabilities(forward, part, hidden_TD)
        first = 0
        for sequence, _, tokens in part:
            stop = first + len(tokens)
            sequence.scores += values[first:stop]
            sequence.are_likeliest += are_likeliest[first:stop]
            first = stop


def scored_rows(sequence: Sequence, span: Span) -> Scored:
    """The rows of a span behind which a token's log-probability is asked; without tokens where none is."""
    if sequence.scored_from is None:
        return Scored(sequence, span.row, ())
    prompt = sequence.request.prompt
    first = span.start - sequence.virtual + 1  # the token behind the first row
    stop = first + span.count
    low = max(sequence.scored_from, first)
    high = min(len(prompt), stop)
    row = span.row + low - first
    tokens = prompt[low:high]
    return Scored(sequence, row, tokens)


def in_parts(scored: list[Scored], size: int) -> Iterator[list[Scored]]:
    """The same rows in lists of at most so many rows each."""
    part: list[Scored] = []
    space = size
    for sequence, row, tokens in scored:
        while tokens:
            taken = tokens[:space]
            part.append(Scored(sequence, row, taken))
            count = len(taken)
            tokens = tokens[count:]
            row += count
            space -= count
            if space == 0:
                yield part
                part = []
                space = size
    if part:
        yield part


def log_probabilities(forward: Forward, scored: list[Scored], hidden_TD: Tensor) -> tuple[list[float], list[bool]]:
    """The log-probability of the token behind each of these rows, and whether no other one is likelier.

    It is that of drawing the token at its request's temperature, where that is not 0.
    """
    owners: list[Owner] = []
    counts: list[int] = []
    rows: list[int] = []
    tokens: list[int] = []
    temperatures: list[float] = []
    for sequence, row, of_sequence in scored:
        count = len(of_sequence)
        owners.append(sequence.resident)
        counts.append(count)
        rows += range(row, row + count)
        tokens += of_sequence
        temperatures += [sequence.request.temperature] * count
    device = forward.device
    adapters = AdapterBatch.of(owners, counts)
    adapters = adapters.to(device)
    row_N = torch.tensor(rows, device=device)
    hidden_ND = hidden_TD[row_N]
    logits_NV = forward.decoder.logits(hidden_ND, adapters)
    temperature_N = torch.tensor(temperatures, device=device)
    token_N = torch.tensor(tokens, device=device)
    score_N = log_probability(logits_NV, token_N, temperature_N)
    token_N1 = token_N[:, None]
    logit_N1 = logits_NV.gather(1, token_N1)
    is_likeliest_N = logit_N1.flatten() == logits_NV.amax(-1)
    scores: list[float] = score_N.tolist()
    are_likeliest: list[bool] = is_likeliest_N.tolist()
    return scores, are_likeliest
