"""What the rows of a decoding graph are, in memory of the device that the graph reads.

Shapes: T rows, P pages.
"""

from collections.abc import Sequence as Several

import torch
from torch import Tensor

from serving.cache import padded_pages, pages_for
from serving.rotation import rotation_of
from serving.sampler import Choice
from serving.sequence import Sequence


class Rows:
    """Rows of a batch: each is a sequence, or nobody's, which is the base's at position 0 of nobody's page."""

    def __init__(self, count: int, positions: int, device: torch.device) -> None:
        """At most so many rows, of so many positions."""
        self.width = pages_for(positions)
        self.id_T = row_numbers(count, device)
        self.position_T = row_numbers(count, device)
        self.kind_T = row_numbers(count, device)
        self.number_T = row_numbers(count, device)
        slot_T = row_numbers(count, device)
        self.slot_T = slot_T.int()
        size = (count, self.width)
        self.pages_TP = torch.zeros(size, dtype=torch.int32, device=device)
        self.choice = Choice.blank(count, device)

    def write(self, sequences: Several[Sequence], count: int) -> None:
        """Copy what the first `count` rows are to the device."""
        ids: list[int] = []
        positions: list[int] = []
        kinds: list[int] = []
        numbers: list[int] = []
        slots: list[int] = []
        pages: list[list[int]] = []
        for sequence in sequences:
            answer = sequence.answer
            ids.append(answer[-1])
            positions.append(sequence.computed)
            kinds.append(rotation_of(sequence.resident))
            numbers.append(len(answer))
            slots.append(sequence.slot)
            pages.append(sequence.pages)
        fill(self.id_T, ids, count)
        fill(self.position_T, positions, count)
        fill(self.kind_T, kinds, count)
        fill(self.number_T, numbers, count)
        fill(self.slot_T, slots, count)
        self._write_pages(pages, count)
        self._write_choice(sequences)

    def _write_pages(self, pages: list[list[int]], count: int) -> None:
        """Copy the pages of the first `count` rows to the device."""
        table: list[list[int]] = []
        for sequence_pages in pages:
            row = padded_pages(sequence_pages, self.width)
            table.append(row)
        nobody = padded_pages([], self.width)
        while len(table) < count:
            table.append(nobody)
        pages_TP = torch.tensor(table, dtype=torch.int32)
        self.pages_TP[:count].copy_(pages_TP)

    def _write_choice(self, sequences: Several[Sequence]) -> None:
        """Copy to the device how these sequences' tokens are chosen."""
        requests = [sequence.request for sequence in sequences]
        choice = Choice.of(requests, self.id_T.device)
        self.choice.write(choice)


def row_numbers(count: int, device: torch.device) -> Tensor:
    """A number for each of so many rows, 0 at first."""
    return torch.zeros(count, dtype=torch.int64, device=device)


def fill(target_T: Tensor, values: list[int], count: int) -> None:
    """Copy a number for each row to the device, and 0 for the rows of nobody up to `count`."""
    missing = count - len(values)
    padding = [0] * missing
    value_T = torch.tensor(values + padding, dtype=target_T.dtype)
    first_T = target_T[:count]
    first_T.copy_(value_T)
