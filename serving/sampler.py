"""The next token of each row: the likeliest, or one that is drawn.

A draw adds Gumbel noise to the logits and takes the largest (Gumbel 1954; Maddison et al. 2014, arXiv 1411.0030), and
the noise is a function of (seed, number of the token, its id) alone: neither batch nor device order matters.
Shapes: T rows, V vocabulary.
"""

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch

from serving.sequence import Request

_MASK = 0xFFFFFFFF


@dataclass
class Choice:
    """How each row's token is chosen; on the device."""

    temperature_T: torch.Tensor
    top_k_T: torch.Tensor
    top_p_T: torch.Tensor
    seed_T: torch.Tensor

    @classmethod
    def of(cls, requests: Rows[Request], device: torch.device) -> "Choice":
        """How these requests want it."""
        return cls(
            torch.tensor([r.temperature for r in requests], dtype=torch.float32, device=device),
            torch.tensor([r.top_k for r in requests], device=device),
            torch.tensor([r.top_p for r in requests], dtype=torch.float32, device=device),
            torch.tensor([r.seed & _MASK for r in requests], device=device),
        )


def greedy(requests: Rows[Request]) -> bool:
    """Whether every request takes the likeliest token."""
    return all(request.temperature == 0 for request in requests)


def sample(logits_TV: torch.Tensor, choice: Choice, number_T: torch.Tensor) -> torch.Tensor:
    """A token for each row: the `number`-th of its answer. Rows of temperature 0 get the likeliest."""
    likeliest_T = logits_TV.argmax(-1)
    warm_T = choice.temperature_T > 0
    scaled_TV = logits_TV.float() / torch.where(warm_T, choice.temperature_T, 1.0)[:, None]
    kept_TV = _kept(scaled_TV, choice)
    drawn_T = (kept_TV + noise(choice.seed_T, number_T, logits_TV.shape[1])).argmax(-1)
    return torch.where(warm_T, drawn_T, likeliest_T)


def noise(seed_T: torch.Tensor, number_T: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Gumbel noise [T, V]."""
    row_T = _scrambled(seed_T ^ _scrambled(number_T + 1))
    id_V = torch.arange(vocabulary, device=seed_T.device)
    bits_TV = _scrambled(_scrambled(id_V)[None] ^ row_T[:, None])
    uniform_TV = (bits_TV.double() + 0.5) / 2.0**32
    return -torch.log(-torch.log(uniform_TV)).float()


def _kept(scaled_TV: torch.Tensor, choice: Choice) -> torch.Tensor:
    """Logits with those outside of top k and top p at minus infinity; the likeliest always stays."""
    ordered_TV, order_TV = scaled_TV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(scaled_TV.shape[1], device=scaled_TV.device)
    mass_TV = ordered_TV.softmax(-1)
    before_TV = mass_TV.cumsum(-1) - mass_TV
    out_TV = before_TV >= choice.top_p_T[:, None]
    out_TV |= (choice.top_k_T[:, None] > 0) & (rank_V >= choice.top_k_T[:, None])
    out_TV[:, 0] = False
    ordered_TV = ordered_TV.masked_fill(out_TV, float("-inf"))
    return torch.empty_like(scaled_TV).scatter_(-1, order_TV, ordered_TV)


def _scrambled(x: torch.Tensor) -> torch.Tensor:
    """32 bits, mixed so that each depends on all (the finaliser of MurmurHash3; Appleby, public domain)."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)
