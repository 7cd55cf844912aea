"""Forward passes over rows of sequences, and what an adapter needs to be ready for them.

Shapes: T rows of a pass, V vocabulary, D width.
"""

from collections.abc import Callable
from collections.abc import Sequence as Several

import torch
from torch import Tensor

from serving.base import Base
from serving.cache import Cache, pages_for
from serving.decoder import Decoder, Operations
from serving.mix import Mix
from serving.packed import Needs
from serving.passing import Pass, Span, positions_and_places
from serving.plain import Plain
from serving.pool import Pool, Resident
from serving.rotation import Rotations
from serving.sampler import Choice, greedy, sample
from serving.sequence import Sequence
from serving.work import MANY, Work

Chosen = Several[tuple[Sequence, Span]]


class Forward:
    """A base with its adapters and its cache, ready to compute."""

    def __init__(self, base: Base, pool: Pool, cache: Cache, positions: int) -> None:
        """Sequences have at most so many positions."""
        self.base = base
        self.pool = pool
        self.cache = cache
        self.device = base.device
        self.rotations = Rotations(base, positions)
        self.decoder = Decoder(base, self._operations())

    def run(self, chosen: Chosen, id_T: Tensor) -> tuple[Tensor, Mix]:
        """The normed outputs [T, D] of some rows of sequences, and the adapters of these rows."""
        residents = [sequence.resident for sequence, _ in chosen]
        spans = [span for _, span in chosen]
        counts = [span.count for span in spans]
        mix = Mix.of(residents, self.device, counts)
        x_TD = self.decoder.embed(id_T.to(self.device), mix)
        step = self._pass(mix, residents, spans)
        return self.decoder.forward(x_TD, step), mix

    def next_tokens(self, sequences: Several[Sequence], hidden_TD: Tensor) -> list[int]:
        """The next token of each sequence's answer, from its last row's outputs."""
        residents = [sequence.resident for sequence in sequences]
        requests = [sequence.request for sequence in sequences]
        mix = Mix.of(residents, self.device)
        logits_TV = self.decoder.logits(hidden_TD, mix)
        if greedy(requests):
            return logits_TV.argmax(-1).tolist()
        numbers = [len(sequence.answer) for sequence in sequences]
        number_T = torch.tensor(numbers, device=self.device)
        choice = Choice.of(requests, self.device)
        return sample(logits_TV, choice, number_T).tolist()

    def settle(self, resident: Resident) -> bool:
        """Make ready what an adapter has beside its block; False where its virtual tokens find no pages."""
        adapter = resident.packed.adapter
        pages = self.cache.reserve(pages_for(adapter.virtual))
        if pages is None:
            return False
        resident.pages = pages
        resident.ready = True
        resident.rotation = self.rotations.kind(resident.packed)
        resident.embed_VD = self._on_device(adapter.embed_VD)
        resident.head_VD = self._on_device(adapter.head_VD)
        if adapter.prefix_L2VHE is not None:
            self.cache.write(pages, adapter.prefix_L2VHE)
        elif adapter.prompt_VD is not None:
            self._fill_prompt(resident, adapter.prompt_VD)
        return True

    def _on_device(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return tensor.to(self.device, non_blocking=True)

    def _fill_prompt(self, resident: Resident, prompt_VD: Tensor) -> None:
        """Compute the keys and values of an adapter's virtual tokens, from their embeddings."""
        count = resident.packed.adapter.virtual
        mix = Mix.of([resident], self.device, [count])
        span = Span(0, count, 0, resident.pages)
        step = self._pass(mix, [resident], [span])
        self.decoder.forward(prompt_VD.to(self.device), step)

    def _operations(self) -> Operations:
        if not self.base.on_gpu:
            return Plain(self.base, self.pool, self.cache)
        from serving.fast import Fast

        return Fast(self.base, self.pool, self.cache)

    def _pass(self, mix: Mix, residents: list[Resident | None], spans: list[Span]) -> Pass:
        position_T, place_T = positions_and_places(spans)
        kind_T = _rotations(residents, spans)
        cos_TF, sin_TF = self.rotations.at(kind_T, position_T)
        step = Pass(mix, place_T.to(self.device), cos_TF, sin_TF, spans)
        step.before = self._work(mix, lambda needs: max(needs.narrow, needs.wide))
        step.behind = self._work(mix, lambda needs: needs.behind)
        return step

    def _work(self, mix: Mix, rank_of: Callable[[Needs], int]) -> Work | None:
        work = Work.of(mix.tenants, rank_of, MANY)
        if work is None:
            return None
        return work.to(self.device)


def _rotations(residents: list[Resident | None], spans: list[Span]) -> Tensor:
    """The kind of rotary positions that each row's adapter has."""
    kinds = [rotation_of(resident) for resident in residents]
    counts = [span.count for span in spans]
    kind_N = torch.tensor(kinds)
    count_N = torch.tensor(counts)
    return kind_N.repeat_interleave(count_N)


def rotation_of(resident: Resident | None) -> int:
    """The kind of an adapter's rotary positions; 0 for the base."""
    if resident is None:
        return 0
    return resident.rotation
