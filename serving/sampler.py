"""The next token of each row: the likeliest, or one that is drawn.

A draw adds Gumbel noise to the logits and takes the largest (Gumbel 1954; Maddison et al. 2014, arXiv 1411.0030), and
the noise is a function of (seed, number of the token, its id) alone: neither batch nor device order matters.
Shapes: T rows, V vocabulary.
"""

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from serving.sequence import Request

_MASK = 0xFFFFFFFF


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
        temperatures, limits, masses, seeds = [], [], [], []
        for request in requests:
            temperatures.append(request.temperature)
            limits.append(request.top_k)
            masses.append(request.top_p)
            seeds.append(request.seed & _MASK)
        temperature_T = torch.tensor(temperatures, dtype=torch.float32, device=device)
        top_k_T = torch.tensor(limits, device=device)
        top_p_T = torch.tensor(masses, dtype=torch.float32, device=device)
        seed_T = torch.tensor(seeds, device=device)
        return cls(temperature_T, top_k_T, top_p_T, seed_T)

    @classmethod
    def blank(cls, rows: int, device: torch.device) -> "Choice":
        """Rows that all take the likeliest token, to be overwritten."""
        temperature_T = torch.zeros(rows, device=device)
        top_k_T = torch.zeros(rows, dtype=torch.int64, device=device)
        top_p_T = torch.ones(rows, device=device)
        seed_T = torch.zeros(rows, dtype=torch.int64, device=device)
        return cls(temperature_T, top_k_T, top_p_T, seed_T)

    def write(self, choice: "Choice") -> None:
        """Overwrite the first rows with these."""
        first = self.first(len(choice.seed_T))
        first.temperature_T.copy_(choice.temperature_T)
        first.top_k_T.copy_(choice.top_k_T)
        first.top_p_T.copy_(choice.top_p_T)
        first.seed_T.copy_(choice.seed_T)

    def first(self, rows: int) -> "Choice":
        """Views of so many rows."""
        return Choice(self.temperature_T[:rows], self.top_k_T[:rows], self.top_p_T[:rows], self.seed_T[:rows])


def greedy(requests: Rows[Request]) -> bool:
    """Whether every request takes the likeliest token."""
    return all(request.temperature == 0 for request in requests)


def sample(logits_TV: Tensor, choice: Choice, number_T: Tensor) -> Tensor:
    """A token for each row: the `number`-th of its answer. Rows of temperature 0 get the likeliest."""
    likeliest_T = logits_TV.argmax(-1)
    warm_T = choice.temperature_T > 0
    temperature_T = torch.where(warm_T, choice.temperature_T, 1.0)
    scaled_TV = logits_TV.float() / temperature_T[:, None]
    truncated_TV = _truncated(scaled_TV, choice)
    noise_TV = noise(choice.seed_T, number_T, logits_TV.shape[1])
    drawn_TV = truncated_TV + noise_TV
    return torch.where(warm_T, drawn_TV.argmax(-1), likeliest_T)


def noise(seed_T: Tensor, number_T: Tensor, vocabulary: int) -> Tensor:
    """Gumbel noise [T, V] for the `number`-th tokens of answers with these seeds."""
    number_T = _mixed_bits(number_T + 1)
    row_T = _mixed_bits(seed_T ^ number_T)
    id_V = torch.arange(vocabulary, device=seed_T.device)
    token_V = _mixed_bits(id_V)
    bits_TV = _mixed_bits(token_V[None] ^ row_T[:, None])
    uniform_TV = (bits_TV.double() + 0.5) / 2.0**32
    exponential_TV = -torch.log(uniform_TV)
    return -torch.log(exponential_TV).float()


def _truncated(scaled_TV: Tensor, choice: Choice) -> Tensor:
    """Logits with those outside of top k and top p at minus infinity; the likeliest always stays."""
    ordered_TV, order_TV = scaled_TV.sort(dim=-1, descending=True, stable=True)
    mass_TV = ordered_TV.softmax(-1)
    before_TV = mass_TV.cumsum(-1) - mass_TV
    out_TV = before_TV >= choice.top_p_T[:, None]
    rank_V = torch.arange(scaled_TV.shape[1], device=scaled_TV.device)
    top_k_T1 = choice.top_k_T[:, None]
    out_TV |= (top_k_T1 > 0) & (rank_V >= top_k_T1)
    out_TV[:, 0] = False
    ordered_TV = ordered_TV.masked_fill(out_TV, float("-inf"))
    result_TV = torch.empty_like(scaled_TV)
    return result_TV.scatter_(-1, order_TV, ordered_TV)


def _mixed_bits(x: Tensor) -> Tensor:
    """32 bits, mixed so that each depends on all (the finaliser of MurmurHash3; Appleby, public domain)."""
    x = x & _MASK
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & _MASK
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)
