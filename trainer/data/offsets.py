"""Offsets: which characters of a text each of its tokens stands for."""

import copy
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from trainer.data.examples import Indices

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IdList = list[int]
Offsets = list[tuple[int, int]]  # of each id, the characters [start, stop) that it stands for
IdsAndOffsets = tuple[IdList, Offsets]


def starts_and_stops(offsets: Offsets) -> tuple[Indices, Indices]:
    """Where the characters of each token start and stop."""
    characters = np.array(offsets, np.int64)
    pairs = characters.reshape(-1, 2)  # also of no token
    starts, stops = pairs.T
    return starts, stops


def end_of_text(is_text: npt.NDArray[np.bool_]) -> int:
    """The number of tokens up to the last one that stands for a part of the text; all where none does."""
    of_text = np.flatnonzero(is_text)
    if not len(of_text):
        return len(is_text)
    last = of_text[-1]
    return int(last) + 1


def untrimmed(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """The tokenizer, with offsets that count the space in front of a word; the ids are the same."""
    trims = '"trim_offsets":true'
    processor = tokenizer.backend_tokenizer.post_processor
    if not processor:
        return tokenizer
    description = processor.__getstate__().decode()
    if trims not in description:
        return tokenizer
    changed_description = description.replace(trims, '"trim_offsets":false')
    copied = copy.deepcopy(tokenizer)
    backend = copied.backend_tokenizer
    changed = backend.post_processor
    changed.__setstate__(changed_description.encode())
    backend.post_processor = changed
    return copied
