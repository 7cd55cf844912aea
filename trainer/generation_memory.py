"""The memory that the caches of answers take at their end, held while only the first tokens are written."""

from typing import Any

import torch

from trainer.generation import PromptGroup, cache_bytes
from trainer.run import Run

TRIED = 3  # tokens that are written: by the prompts' own pass, then beside the memory that is held


class CacheToCome:
    """What generation asks after each token whether to stop: holds memory after the first, and stops after a few.

    It is as much as the cache has yet to grow by, and a copy of one layer's, as a layer's cache is copied to grow.
    """

    def __init__(self, run: Run, group: PromptGroup) -> None:
        config = run.model.config.get_text_config()
        self._of_token = cache_bytes(config, run.dtype.itemsize)
        self._new_tokens = group.new_tokens
        self._asked = 0
        self._held: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # noqa: ARG002
        """Whether each row is to end here."""
        self._asked += 1
        rows, length = input_ids.shape
        device = input_ids.device
        if self._asked == 1:
            size = self._grown(rows, length)
            self._held = torch.empty(size, dtype=torch.uint8, device=device)
        ends = self._asked == TRIED
        return torch.full((rows,), ends, device=device)

    def _grown(self, rows: int, length: int) -> int:
        """The bytes to come of so many rows, which have this length after their first new token."""
        in_all, in_one_layer = self._of_token
        to_come = self._new_tokens - 1
        last = length + to_come
        grown = rows * to_come * in_all
        copied = rows * last * in_one_layer
        return grown + copied
