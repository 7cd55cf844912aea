"""Which prompts are continued together, and how far: a function of the prompts and the base alone.

So a prompt meets the same neighbours, and gets the same padding, on any number of workers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from methods.options.base import known_positions
from trainer.run import Run

PROMPTS_AT_ONCE = 32
TOKENS_AT_ONCE = 16_384  # that the caches of a group hold at the end, unless a single prompt needs more


@dataclass(frozen=True)
class PromptGroup:
    """Prompts that are continued together, by their numbers, and the most tokens that each of them gets."""

    prompts: tuple[int, ...]
    new_tokens: int

    def cached(self, rows: Sequence[Sequence[int]]) -> int:
        """The tokens that their caches hold at the end, where all prompts have these ids."""
        count = len(self.prompts)
        lengths = [len(rows[number]) for number in self.prompts]
        length = max(lengths) + self.new_tokens
        return count * length


def groups(lengths: Sequence[int], new_tokens: int, positions: int | None) -> list[PromptGroup]:
    """Prompts of these lengths in groups, from the shortest on; one that fills all positions of the base is in none.

    `positions` None means that the base has no limit. All prompts of a group may get the same number of tokens: a
    prompt that has ended is fed padding until the last one of its group has, and needs positions for that.
    """
    by_limit: dict[int, list[int]] = {}
    numbers_of_all = range(len(lengths))
    shortest_first = sorted(numbers_of_all, key=lengths.__getitem__)
    for number in shortest_first:
        limit = new_tokens
        if positions is not None:
            left = positions - lengths[number]
            limit = min(limit, left)
        if limit > 0:
            alike = by_limit.setdefault(limit, [])
            alike.append(number)
    parted = []
    for limit, numbers in by_limit.items():
        for part in _small_parts(numbers, lengths, limit):
            group = PromptGroup(tuple(part), limit)
            parted.append(group)
    return parted


def rounds(made: Sequence[PromptGroup], workers: int) -> Iterator[list[PromptGroup]]:
    """Groups that workers generate from at the same time, one for each; in a last round perhaps not for all.

    Those of a round have one limit: at ZeRO 3 whoever is done takes part until all are, and needs positions for it.
    """
    by_limit: dict[int, list[PromptGroup]] = {}
    for group in made:
        alike = by_limit.setdefault(group.new_tokens, [])
        alike.append(group)
    for alike in by_limit.values():
        for start in range(0, len(alike), workers):
            stop = start + workers
            yield alike[start:stop]


def cache_bytes(config: Any, element: int) -> tuple[int, int]:
    """Bytes that a token takes in the caches of all layers, and of one: a key and a value, of elements so large."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None)
    if size is None:
        size = config.hidden_size // heads
    cached_heads = getattr(config, "num_key_value_heads", None)
    if cached_heads is None:
        cached_heads = heads
    of_layer = 2 * cached_heads * size * element
    in_all = config.num_hidden_layers * of_layer
    return in_all, of_layer


def _small_parts(numbers: Sequence[int], lengths: Sequence[int], new_tokens: int) -> Iterator[list[int]]:
    """The numbers, whose lengths rise, in parts that are small enough once each is padded to its longest."""
    part: list[int] = []
    for number in numbers:
        width = lengths[number] + new_tokens
        count = len(part)
        padded = (count + 1) * width
        too_many = count == PROMPTS_AT_ONCE
        too_long = padded > TOKENS_AT_ONCE
        if part and (too_many or too_long):
            yield part
            part = []
        part.append(number)
    yield part


def positions_left(run: Run) -> int | None:
    """The positions of the base that a document may fill under this method; None where there is no limit."""
    config = run.model.config.get_text_config()
    known = known_positions(config.to_dict())
    if known is None:
        return None
    method = run.job.method
    return known - method.positions_before
