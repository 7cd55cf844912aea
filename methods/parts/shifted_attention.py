"""Shifted sparse attention, S2-Attn (Chen et al. 2023, arXiv 2309.12307, section 3.2), without its leak.

A token at position p of its document attends causally to the tokens s of the same document with

    floor((s + c) / g) = floor((p + c) / g),    c = 0 in the first half of the query heads, floor(g / 2) in the other.

So the ends of the second pattern are groups of half the size. The paper's pseudocode rolls the tokens instead, which
puts the last half group in front of the first one, where its causal mask lets the first tokens see the last.
What a token sees depends on nothing behind it, not even on how long its document goes on. Positions are those of
`position_ids`, which restart in each document and in the padding, so a packed document is as if alone.

Tokens that see each other are a run of neighbours; runs are laid one below the other, padded to the longest, and
attended to as a batch of causal sequences: no mask is made, and the work falls with g.

Shapes: B rows, T positions, N = B T tokens, R runs, L tokens of the longest run, H heads, D head size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from methods.base import Keywords
from methods.parts.attention import ALL_HEADS, WHOLE_POSITIONS, PartOfHeads

NAME = "shifted"  # what `attn_implementation` calls it


@dataclass(frozen=True)
class TokenRuns:
    """Tokens that see each other: `cell_N` is where each of N tokens lies in a table of R x L."""

    cell_N: Tensor
    count: int
    longest: int

    @classmethod
    def cut(cls, position_BT: Tensor, group: int, shift: int) -> "TokenRuns":
        """Cut rows where a document or a group begins."""
        place_in_group_BT = (position_BT + shift) % group
        is_first_BT = place_in_group_BT == 0
        is_first_BT[:, 0] = True
        step = position_BT.diff()
        is_first_BT[:, 1:] |= step != 1
        is_first_N = is_first_BT.flatten()
        index_N = torch.arange(len(is_first_N), device=is_first_N.device)
        run_N = is_first_N.cumsum(0) - 1
        first_index_N = torch.where(is_first_N, index_N, 0)
        run_start_N = first_index_N.cummax(0).values
        place_N = index_N - run_start_N
        last_run_and_place = torch.stack([run_N[-1], place_N.max()])  # together: one wait for the device
        last_run, last_place = last_run_and_place.tolist()
        count = last_run + 1
        longest = last_place + 1
        cell_N = run_N * longest + place_N
        return cls(cell_N, count, longest)

    def lay(self, x_BHTD: Tensor) -> Tensor:
        """The table of runs [R, H, L, D]; places that no token has are zero and behind those that have one."""
        x_BTHD = x_BHTD.transpose(1, 2)
        x_NHD = x_BTHD.flatten(0, 1)
        _, heads, size = x_NHD.shape
        cells = self.count * self.longest
        zeros_SHD = x_NHD.new_zeros(cells, heads, size)
        table_SHD = zeros_SHD.index_copy(0, self.cell_N, x_NHD)
        table_RLHD: Tensor = table_SHD.unflatten(0, (self.count, self.longest))
        return table_RLHD.transpose(1, 2)

    def pick(self, x_RHLD: Tensor, rows: int) -> Tensor:
        """The tokens of a table of runs, in rows again: [B, T, H, D]."""
        x_RLHD = x_RHLD.transpose(1, 2)
        x_SHD = x_RLHD.flatten(0, 1)
        x_NHD = x_SHD.index_select(0, self.cell_N)
        x_BTHD: Tensor = x_NHD.unflatten(0, (rows, -1))
        return x_BTHD


@dataclass(frozen=True)
class Pattern:
    """The runs of the first and of the second half of the heads."""

    halves: tuple[TokenRuns, TokenRuns]

    @classmethod
    def of(cls, position_BT: Tensor, group: int) -> "Pattern":
        """The pattern of rows whose documents are told by their positions."""
        plain = TokenRuns.cut(position_BT, group, 0)
        half = group // 2
        shifted = TokenRuns.cut(position_BT, group, half)
        halves = (plain, shifted)
        return cls(halves)


def attend(
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    pattern: Pattern,
    dropout: float = 0.0,
    scale: float | None = None,
    part: PartOfHeads = ALL_HEADS,
) -> Tensor:
    """Attention [B, T, H, D] of heads, or of a part of them, that all have a key and a value of their own."""
    rows, heads = query_BHTD.shape[:2]
    first = part.places(heads).start
    middle_of_all = part.count * heads // 2
    middle = min(heads, max(0, middle_of_all - first))
    slices = (slice(0, middle), slice(middle, heads))
    halves = []
    for runs, half in zip(pattern.halves, slices, strict=True):
        if half.start == half.stop:
            continue
        query_RHLD = runs.lay(query_BHTD[:, half])
        key_RHLD = runs.lay(key_BHTD[:, half])
        value_RHLD = runs.lay(value_BHTD[:, half])
        attended_RHLD = scaled_dot_product_attention(
            query_RHLD, key_RHLD, value_RHLD, dropout_p=dropout, is_causal=True, scale=scale
        )
        attended_BTHD = runs.pick(attended_RHLD, rows)
        halves.append(attended_BTHD)
    return torch.cat(halves, dim=2)


def forward(
    module: Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    pattern: Pattern | None = None,
    part: PartOfHeads = ALL_HEADS,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: sparse where `sparse_in_training` gave a pattern, else dense."""
    if pattern is None:
        if module.training:
            raise ValueError("this base does not hand its decoder's arguments on to its attention")
        dense: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return dense
    _refuse(pattern, kwargs)
    heads = query.shape[1]
    kv_heads = key.shape[1]
    repeats = heads // kv_heads
    key = repeat_kv(key, repeats)  # before the split: the halves may share a head
    value = repeat_kv(value, repeats)
    attended = attend(query, key, value, pattern, dropout, scaling, part)
    return attended, None


def sparse_in_training(decoder: Module, group: int) -> None:
    """Let every forward pass in training mode be sparse; the pattern is found once and handed to all layers."""

    def prepare(module: Module, args: Any, kwargs: Keywords) -> tuple[Any, Keywords] | None:
        """Put the pattern of a batch among the arguments; leave them alone in evaluation."""
        if not module.training:
            return None
        own_position_BT = kwargs.get("position_ids")
        position_BT = kwargs.get(WHOLE_POSITIONS, own_position_BT)
        if position_BT is None or kwargs.get("attention_mask") is not None:
            raise ValueError("sparse attention needs position_ids, which restart in padding, and no attention_mask")
        # transformers hands a mask of four dimensions on as it is, and so makes none of T x T.
        unread = position_BT.new_zeros(1, 1, 1, 1)
        pattern = Pattern.of(position_BT, group)
        replaced = {"attention_mask": unread, "pattern": pattern}
        return args, kwargs | replaced

    decoder.register_forward_pre_hook(prepare, with_kwargs=True)


def _refuse(pattern: Pattern, kwargs: Keywords) -> None:
    """Raise ValueError where a base's attention does what sparse attention does not."""
    window = kwargs.get("sliding_window")
    plain, shifted = pattern.halves
    longest = max(plain.longest, shifted.longest)
    if window is not None and longest > window:
        raise ValueError(f"method.groups: the base's sliding window of {window} is less than a group; allowed: more")
    for unknown in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(unknown) is not None:
            raise ValueError(f"the base's attention has {unknown}, which sparse attention does not")


AttentionInterface.register(NAME, forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
