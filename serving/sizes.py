"""How large an engine has to be for an evaluation: no larger than its questions need, so that a laptop can run it."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from serving.cache import PAGE
from serving.question import Question
from serving.shape import Shape

MOST_ROWS = 256
MOST_RESIDENTS = 64
MOST_TOKENS = 131072
MOST_BYTES = 4 << 30
CPU_CACHE_BYTES = 2 << 30
LONGEST_CHAT = 4096  # positions
VIRTUAL = 512  # positions that an adapter may have in front
SPARE_BYTES = 16 << 20


class InFolder(Protocol):
    """What lies in a folder, if it is anywhere."""

    @property
    def folder(self) -> Path | None:
        """The folder, if there is one."""


def sizes_for(config: Any, questions: Sequence[Question], adapters: Iterable[InFolder]) -> dict[str, int]:
    """The sizes of an engine, as its arguments, that answers these questions of these adapters."""
    longest = max(map(length_of, questions)) + VIRTUAL
    shape = Shape.of(config)
    positions = min(longest, shape.positions)
    rows = min(MOST_ROWS, len(questions))
    wanted = rows * positions
    least = positions + 4 * PAGE
    most = most_tokens(shape)
    folders = []
    for adapter in adapters:
        if adapter.folder is not None:
            folders.append(adapter.folder)
    return {
        "residents": min(MOST_RESIDENTS, max(1, len(folders))),
        "rows": rows,
        "positions": positions,
        "tokens": max(least, min(wanted, most)),
        "adapter_bytes": bytes_for(folders),
    }


def sizes_of_chat(config: Any, folders: Sequence[Path]) -> dict[str, int]:
    """The sizes of an engine for one conversation with the base, and one with the adapter of each folder."""
    shape = Shape.of(config)
    positions = min(LONGEST_CHAT, shape.positions)
    rows = len(folders) + 1
    return {
        "residents": rows,
        "rows": rows,
        "positions": positions,
        "tokens": rows * (positions + VIRTUAL),
        "adapter_bytes": bytes_for(folders),
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


def bytes_for(folders: Iterable[Path]) -> int:
    """The memory that the adapters of these folders take, with some to spare; a long list of them takes turns."""
    weights = sum(map(bytes_of, folders))
    wanted = 2 * weights + SPARE_BYTES
    return min(MOST_BYTES, wanted)


def bytes_of(folder: Path) -> int:
    """The size of the files of weights in an adapter's folder."""
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    return sum(sizes)
