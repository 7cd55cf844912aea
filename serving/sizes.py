"""How large an engine has to be for an evaluation: no larger than its questions need, so that a laptop can run it."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from serving.cache import PAGE
from serving.packed import Packed
from serving.question import Question
from serving.shape import Shape

MOST_ROWS = 256
MOST_RESIDENTS = 64
MOST_TOKENS = 131072
FEWEST_BYTES = 1 << 20
MOST_BYTES = 4 << 30  # of adapters on the device, unless one takes more
CPU_CACHE_BYTES = 2 << 30
LONGEST_CHAT = 4096  # positions
VIRTUAL = 512  # positions that an adapter may have in front


def sizes_for(config: Any, questions: Sequence[Question], adapters: int) -> dict[str, int]:
    """The sizes of an engine, as its arguments, that answers these questions of so many adapters."""
    longest = max(map(length_of, questions)) + VIRTUAL
    shape = Shape.of(config)
    positions = min(longest, shape.positions)
    rows = min(MOST_ROWS, len(questions))
    wanted = rows * positions
    least = positions + 4 * PAGE
    most = most_tokens(shape)
    return {
        "residents": min(MOST_RESIDENTS, max(1, adapters)),
        "rows": rows,
        "positions": positions,
        "tokens": max(least, min(wanted, most)),
    }


def sizes_of_chat(config: Any, adapters: int) -> dict[str, int]:
    """The sizes of an engine for one conversation with the base, and one with each of so many adapters."""
    shape = Shape.of(config)
    positions = min(LONGEST_CHAT, shape.positions)
    rows = adapters + 1
    return {
        "residents": rows,
        "rows": rows,
        "positions": positions,
        "tokens": rows * (positions + VIRTUAL),
    }


def length_of(question: Question) -> int:
    """The positions that a question takes, its answer included."""
    longest = len(question.prompt) + question.new_tokens + 1
    for text in question.texts:
        longest = max(longest, len(text.ids) + 1)
    return longest


def most_tokens(shape: Shape) -> int:
    """How many tokens' keys and values take half of the memory that is free on the GPU, else CPU_CACHE_BYTES."""
    free = CPU_CACHE_BYTES
    element = 4
    if torch.cuda.is_available():
        free_on_gpu, _ = torch.cuda.mem_get_info()
        free = free_on_gpu // 2
        element = 2
    of_token = 2 * shape.layers * shape.key_size * element
    return min(MOST_TOKENS, free // of_token)


def bytes_for(adapters: Iterable[Packed], residents: int) -> int:
    """The memory that so many of these adapters take at once, the largest ones; of a long list they take turns."""
    sizes = [adapter.block.nbytes for adapter in adapters]
    sizes.sort(reverse=True)
    largest = sizes[:residents]
    at_once = min(MOST_BYTES, sum(largest))
    return max([FEWEST_BYTES, at_once, *largest[:1]])
