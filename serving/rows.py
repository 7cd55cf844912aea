"""What the rows of a decoding graph are, in memory of the device that the graph reads.

Shapes: T rows, P pages.
"""

from collections.abc import Sequence as Several

import torch
from torch import Tensor

from serving.cache import padded_pages, pages_for
from serving.rotation import rotation_of
from serving.sampler import Choice, Manner
from serving.sequence import Sequence

Numbers = list[int]


class Rows:
    """Rows of a batch: each is a sequence, or nobody's, which is the base's at position 0 of nobody's page."""

    def __init__(self, count: int, positions: int, device: torch.device) -> None:
        """At most so many rows, of so many positions."""
        self.width = pages_for(positions)
        numbers_size = (5, count)
        pages_size = (count, self.width)
        number_5T = torch.zeros(numbers_size, dtype=torch.int64, device=device)
        pages_TP = torch.zeros(pages_size, dtype=torch.int32, device=device)
        id_T, position_T, kind_T, number_T, adapter_T = number_5T
        self.id_T = id_T
        self.position_T = position_T
        self.kind_T = kind_T
        self.number_T = number_T
        self.adapter_T = adapter_T.int()
        self.pages_TP = pages_TP
        self._pages: dict[Sequence, Tensor] = {}  # [P] on the host, of the sequences that were written last
        self.score_T = torch.zeros(count, device=device)  # of the tokens in `id_T`
        self.choice = Choice.blank(count, device)

    def write(self, sequences: Several[Sequence], count: int) -> None:
        """Copy what the first `count` rows are to the device."""
        ids: Numbers = []
        positions: Numbers = []
        kinds: Numbers = []
        numbers: Numbers = []
        indices: Numbers = []
        for sequence in sequences:
            answer = sequence.answer
            last = answer[-1]
            kind = rotation_of(sequence.resident)
            ids.append(last)
            positions.append(sequence.computed)
            kinds.append(kind)
            numbers.append(len(answer))
            indices.append(sequence.adapter_index)
        fill(self.id_T, ids, count)
        fill(self.position_T, positions, count)
        fill(self.kind_T, kinds, count)
        fill(self.number_T, numbers, count)
        fill(self.adapter_T, indices, count)
        self._write_pages(sequences, count)
        self._write_choice(sequences)

    def _write_pages(self, sequences: Several[Sequence], count: int) -> None:
        """Copy the pages of the first `count` rows to the device."""
        known: dict[Sequence, Tensor] = {}
        for sequence in sequences:
            page_P = self._pages.get(sequence)
            if page_P is None:
                page_P = self._padded(sequence.pages)
            known[sequence] = page_P
        self._pages = known
        rows = list(known.values())
        missing = count - len(rows)
        rows += [self._padded([])] * missing
        pages_TP = torch.stack(rows)
        first_TP = self.pages_TP[:count]
        first_TP.copy_(pages_TP)

    def _padded(self, pages: Numbers) -> Tensor:
        """The row [P] of these pages, on the host."""
        row = padded_pages(pages, self.width)
        return torch.tensor(row, dtype=torch.int32)

    def _write_choice(self, sequences: Several[Sequence]) -> None:
        """Copy to the device how these sequences' tokens are chosen, where that is read."""
        requests = [sequence.request for sequence in sequences]
        manner = Manner.of(requests)
        if not manner.reads_choice:
            return
        device = self.id_T.device
        choice = Choice.of(requests, device)
        self.choice.write(choice)


def fill(target_T: Tensor, values: Numbers, count: int) -> None:
    """Copy a number for each row to the device, and 0 for the rows of nobody up to `count`."""
    missing = count - len(values)
    padding = [0] * missing
    padded = values + padding
    value_T = torch.tensor(padded, dtype=target_T.dtype)
    first_T = target_T[:count]
    first_T.copy_(value_T)
