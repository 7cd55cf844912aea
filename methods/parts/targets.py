"""Which modules and weights of a base a method works on, from their names and shapes alone."""

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

Dimensions = tuple[int, ...]  # of a weight
MatrixShape = tuple[int, int]  # (out_features, in_features)
Linears = Mapping[str, MatrixShape]  # by module name
Matrices = dict[str, MatrixShape]  # the same, of modules that need not be linear layers
Others = Mapping[str, Dimensions]  # every other weight: parameter name -> shape
Target = Literal["all-linear"] | tuple[str, ...]
_EMBEDDINGS = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe|lm_head)\.weight$")
# Files have a matrix for each expert; a model in memory has one block of all, and a router that is no linear layer.
_MIXTURE = re.compile(r"(^|\.)((experts|router)\.|gate\.weight$)")


def is_linear(name: str, shape: Sequence[int]) -> bool:
    """Whether a weight is a linear layer's: a matrix of no embedding, output head, router or mixture's expert."""
    if not _is_module(name, shape):
        return False
    return name.endswith(".weight") and not _EMBEDDINGS.search(name)


def is_named(module: str, pattern: str) -> bool:
    """Whether a module has this name, or ends with it after a dot; a pattern may hold * and ?."""
    dotted = f".{module}"
    ending = f"*.{pattern}"
    return fnmatchcase(dotted, ending)


def is_any_named(module: str, patterns: Iterable[str]) -> bool:
    """Whether a module has one of these names, or ends with one after a dot."""
    matches = (is_named(module, pattern) for pattern in patterns)
    return any(matches)


def choose_targets(target: Target, exclude: Sequence[str], linears: Linears, others: Others) -> Matrices:
    """The matrices [out, in] that a target means, less those excluded; raises ValueError where a name finds none."""
    candidates = dict(linears)
    if target == "all-linear":
        chosen = dict(linears)
    else:
        candidates |= _modules(others)
        chosen = {}
        for pattern in target:
            chosen |= _matching(pattern, candidates)
    for pattern in exclude:
        for name in _matching(pattern, candidates):
            chosen.pop(name, None)
    if not chosen:
        raise ValueError("found a target of which everything is excluded; allowed: at least one module")
    return chosen


def outputs(matrices: Linears) -> int:
    """The number of output features of all these matrices together."""
    counts = (out_features for out_features, _ in matrices.values())
    return sum(counts)


def inputs(matrices: Linears) -> int:
    """The number of input features of all these matrices together."""
    counts = (in_features for _, in_features in matrices.values())
    return sum(counts)


def _is_module(name: str, shape: Sequence[int]) -> bool:
    """Whether a weight is a matrix outside of mixtures of experts."""
    if len(shape) != 2:
        return False
    return not _MIXTURE.search(name)


def _modules(others: Others) -> Matrices:
    """The modules, like embeddings and head, whose weight is one of these and a matrix."""
    modules: Matrices = {}
    for name, shape in others.items():
        if _is_module(name, shape):
            module = name.removesuffix(".weight")
            rows, columns = shape
            modules[module] = (rows, columns)
    return modules


def _matching(pattern: str, candidates: Linears) -> Matrices:
    """The candidates that a pattern names; raises ValueError where there is none."""
    matches: Matrices = {}
    for name, shape in candidates.items():
        if is_named(name, pattern):
            matches[name] = shape
    if matches:
        return matches
    endings = set()
    for name in candidates:
        _, _, ending = name.rpartition(".")
        endings.add(ending)
    allowed = ", ".join(sorted(endings))
    raise ValueError(f"found {pattern!r}, which the base does not have; allowed: {allowed}")
