"""Integers in one block of memory, of which a tensor is made without looking at each of them."""

from array import array
from collections.abc import Iterable
from typing import TypeAlias

import torch
from torch import Tensor

Integers: TypeAlias = "array[int]"  # of 64 bits each; in quotes, as Python 3.11 has no such type when it runs


def integers(values: Iterable[int] = ()) -> Integers:
    """These integers, to which more can be added until a tensor is made of them."""
    return array("q", values)


def tensor_of(values: Integers) -> Tensor:
    """The tensor of some integers, in their memory; there must be at least one."""
    return torch.frombuffer(values, dtype=torch.int64)
