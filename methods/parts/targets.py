"""Which modules and weights of a base a method works on, from their names and shapes alone."""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

Linears = Mapping[str, tuple[int, int]]  # module name -> (out_features, in_features)
Others = Mapping[str, tuple[int, ...]]  # every other weight: parameter name -> shape
Target = Literal["all-linear"] | tuple[str, ...]
_EMBEDDINGS = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe|lm_head)\.weight$")
# Files have a matrix for each expert; a model in memory has one block of all, and a router that is no linear layer.
_MIXTURE = re.compile(r"(^|\.)((experts|router)\.|gate\.weight$)")


def is_linear(name: str, shape: Sequence[int]) -> bool:
    """Whether a weight is a linear layer's: a matrix of no embedding, output head, router or mixture's expert."""
    return _is_module(name, shape) and name.endswith(".weight") and not _EMBEDDINGS.search(name)


def is_named(module: str, pattern: str) -> bool:
    """Whether a module has this name, or ends with it after a dot; a pattern may hold * and ?."""
    return fnmatchcase(f".{module}", f"*.{pattern}")


def choose(target: Target, exclude: Sequence[str], linears: Linears, others: Others) -> dict[str, tuple[int, int]]:
    """The matrices [out, in] that a target means, less those excluded; raises ValueError where a name finds none."""
    candidates = dict(linears)
    if target != "all-linear":
        found = {name: shape for name, shape in others.items() if _is_module(name, shape)}
        candidates |= {name.removesuffix(".weight"): (shape[0], shape[1]) for name, shape in found.items()}
    chosen: dict[str, tuple[int, int]] = dict(linears) if target == "all-linear" else {}
    for pattern in () if target == "all-linear" else target:
        chosen |= _find(pattern, candidates)
    for pattern in exclude:
        for name in _find(pattern, candidates):
            chosen.pop(name, None)
    if not chosen:
        raise ValueError("found a target of which everything is excluded; allowed: at least one module")
    return chosen


def _is_module(name: str, shape: Sequence[int]) -> bool:
    return len(shape) == 2 and not _MIXTURE.search(name)


def _find(pattern: str, candidates: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    found = {name: shape for name, shape in candidates.items() if is_named(name, pattern)}
    if not found:
        names = sorted({name.rpartition(".")[2] for name in candidates})
        raise ValueError(f"found {pattern!r}, which the base does not have; allowed: {', '.join(names)}")
    return found
