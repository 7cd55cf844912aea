"""The next token of each row, the likeliest or one that is drawn, and its log-probability.

A draw adds Gumbel noise to the logits and takes the largest (Gumbel 1954; Maddison et al. 2014, arXiv 1411.0030), and
the noise is a function of (seed, number of the token, its id) alone: neither batch nor device order matters.
Shapes: T rows, V vocabulary.
"""

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from serving.sequence import Request

_MASK = 0xFFFFFFFF


class NextTokens(NamedTuple):
    """A token for each row, and its log-probability at the row's temperature; zeros where no row asks for it."""

    token_T: Tensor
    score_T: Tensor

    def pairs(self) -> list[tuple[int, float]]:
        """The token and the log-probability of each row, as numbers."""
        tokens: list[int] = self.token_T.tolist()
        scores: list[float] = self.score_T.tolist()
        pairs = zip(tokens, scores, strict=True)
        return list(pairs)


@dataclass(frozen=True)
class Manner:
    """What choosing the tokens of a batch takes: graphs are captured for each."""

    is_greedy: bool  # every row takes the likeliest token
    truncates: bool  # some row draws among the likeliest tokens alone
    scores: bool  # some row's log-probability is asked

    @property
    def reads_choice(self) -> bool:
        """Whether temperatures, limits or seeds of rows are read."""
        return self.scores or not self.is_greedy

    @classmethod
    def of(cls, requests: Rows[Request]) -> "Manner":
        """What these requests take."""
        greedy = [request.is_greedy for request in requests]
        truncated = [request.is_truncated for request in requests]
        scored = [request.scores_answer for request in requests]
        is_greedy = all(greedy)
        truncates = any(truncated) and not is_greedy
        return cls(is_greedy, truncates, any(scored))


@dataclass
class Choice:
    """How each row's token is chosen; on the device."""

    temperature_T: Tensor
    top_k_T: Tensor
    top_p_T: Tensor
    seed_T: Tensor

    @classmethod
    def of(cls, requests: Rows[Request], device: torch.device) -> "Choice":
        """How these requests want their tokens chosen."""
        temperatures: list[float] = []
        limits: list[int] = []
        masses: list[float] = []
        seeds: list[int] = []
        for request in requests:
            temperatures.append(request.temperature)
            limits.append(request.top_k)
            masses.append(request.top_p)
            seed = request.seed & _MASK
            seeds.append(seed)
        return cls(
            temperature_T=torch.tensor(temperatures, dtype=torch.float32, device=device),
            top_k_T=torch.tensor(limits, device=device),
            top_p_T=torch.tensor(masses, dtype=torch.float32, device=device),
            seed_T=torch.tensor(seeds, device=device),
        )

    @classmethod
    def blank(cls, rows: int, device: torch.device) -> "Choice":
        """Rows that all take the likeliest token, to be overwritten."""
        nobody = Request(())
        requests = [nobody] * rows
        return cls.of(requests, device)

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self.seed_T)

    def write(self, choice: "Choice") -> None:
        """Overwrite the first rows with these."""
        first = self.first(choice.rows)
        first.temperature_T.copy_(choice.temperature_T)
        first.top_k_T.copy_(choice.top_k_T)
        first.top_p_T.copy_(choice.top_p_T)
        first.seed_T.copy_(choice.seed_T)

    def first(self, rows: int) -> "Choice":
        """Views of so many rows."""
        temperature_T = self.temperature_T[:rows]
        top_k_T = self.top_k_T[:rows]
        top_p_T = self.top_p_T[:rows]
        seed_T = self.seed_T[:rows]
        return Choice(temperature_T, top_k_T, top_p_T, seed_T)


def choose(logits_TV: Tensor, manner: Manner, choice: Choice, number_T: Tensor) -> NextTokens:
    """The `number`-th token of each row's answer. Rows of temperature 0 get the likeliest."""
    is_drawn = not manner.is_greedy and not manner.truncates
    if is_drawn and logits_TV.is_cuda:
        from serving.draw import draw

        return draw(logits_TV, choice.temperature_T, choice.seed_T, number_T)
    token_T = logits_TV.argmax(-1)
    if not manner.is_greedy:
        drawn_T = _drawn_tokens(logits_TV, manner, choice, number_T)
        token_T = torch.where(choice.temperature_T > 0, drawn_T, token_T)
    if not manner.scores:
        return NextTokens(token_T, torch.zeros_like(token_T, dtype=torch.float32))
    return NextTokens(token_T, log_probability(logits_TV, token_T, choice.temperature_T))


def log_probability(logits_TV: Tensor, token_T: Tensor, temperature_T: Tensor) -> Tensor:
    """The log-probability [T] of each row's token at the row's temperature, where that is not 0, in fp32."""
    scaled_TV = _scaled(logits_TV, temperature_T)
    token_T1 = token_T[:, None]
    chosen_T1 = scaled_TV.gather(1, token_T1)
    chosen_T = chosen_T1[:, 0]
    return chosen_T - scaled_TV.logsumexp(-1)


def _scaled(logits_TV: Tensor, temperature_T: Tensor) -> Tensor:
    """The logits in fp32, divided by each row's temperature, where that is not 0."""
    divisor_T = torch.where(temperature_T > 0, temperature_T, 1.0)
    divisor_T1 = divisor_T[:, None]
    return logits_TV.float() / divisor_T1


def _drawn_tokens(logits_TV: Tensor, manner: Manner, choice: Choice, number_T: Tensor) -> Tensor:
    """A token drawn for each row."""
    _, vocabulary = logits_TV.shape
    scaled_TV = _scaled(logits_TV, choice.temperature_T)
    if manner.truncates:
        scaled_TV = _truncated(scaled_TV, choice)
    noise_TV = noise(choice.seed_T, number_T, vocabulary)
    drawn_TV = scaled_TV + noise_TV
    return drawn_TV.argmax(-1)


def noise(seed_T: Tensor, number_T: Tensor, vocabulary: int) -> Tensor:
    """Gumbel noise [T, V] for the `number`-th tokens of answers with these seeds."""
    device = seed_T.device
    number_T = _mixed_bits(number_T + 1)
    row_T = _mixed_bits(seed_T ^ number_T)
    row_T1 = row_T[:, None]
    id_V = torch.arange(vocabulary, device=device)
    token_V = _mixed_bits(id_V)
    bits_TV = _mixed_bits(row_T1 ^ token_V)
    middle_TV = bits_TV.double() + 0.5
    uniform_TV = middle_TV / 2.0**32
    exponential_TV = -torch.log(uniform_TV)
    noise_TV = -torch.log(exponential_TV)
    return noise_TV.float()


def _truncated(scaled_TV: Tensor, choice: Choice) -> Tensor:
    """Logits with those outside of top k and top p at minus infinity; the likeliest always stays."""
    ordered_TV, order_TV = scaled_TV.sort(dim=-1, descending=True, stable=True)
    mass_TV = ordered_TV.softmax(-1)
    mass_up_to_TV = mass_TV.cumsum(-1)
    mass_before_TV = mass_up_to_TV - mass_TV
    top_p_T1 = choice.top_p_T[:, None]
    is_out_TV = mass_before_TV >= top_p_T1
    _, vocabulary = scaled_TV.shape
    device = scaled_TV.device
    rank_V = torch.arange(vocabulary, device=device)
    top_k_T1 = choice.top_k_T[:, None]
    is_limited_T1 = top_k_T1 > 0
    is_behind_TV = rank_V >= top_k_T1
    is_out_TV |= is_behind_TV & is_limited_T1
    is_out_TV[:, 0] = False
    ordered_TV = ordered_TV.masked_fill(is_out_TV, float("-inf"))
    result_TV = torch.empty_like(scaled_TV)
    result_TV.scatter_(-1, order_TV, ordered_TV)
    return result_TV


def _mixed_bits(x: Tensor) -> Tensor:
    """32 bits, mixed so that each depends on all (the finaliser of MurmurHash3; Appleby, public domain)."""
    x = x & _MASK
    x = x ^ (x >> 16)
    x = x * 0x85EBCA6B
    x = x & _MASK
    x = x ^ (x >> 13)
    x = x * 0xC2B2AE35
    x = x & _MASK
    return x ^ (x >> 16)
