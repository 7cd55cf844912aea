"""Forward passes over rows of sequences, and what an adapter needs to be ready for them.

Shapes: T rows of a pass, V vocabulary, D width.
"""

from collections.abc import Sequence as Several

import torch
from torch import Tensor

from serving.base import Base
from serving.cache import Cache, pages_for
from serving.decoder import Decoder, Operations
from serving.mix import Mix
from serving.passing import Pass, Span, laid
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
        self.base, self.pool, self.cache = base, pool, cache
        self.device = base.device
        self.rotations = Rotations(base, positions)
        self.decoder = Decoder(base, self._operations())

    def run(self, chosen: Chosen, id_T: Tensor) -> tuple[Tensor, Mix]:
        """The normed outputs [T, D] of some rows of sequences, and the adapters of these rows."""
        counts = [span.count for _, span in chosen]
        mix = Mix.of([sequence.resident for sequence, _ in chosen], self.device, counts)
        x_TD = self.decoder.embed(id_T.to(self.device), mix)
        return self.decoder.forward(x_TD, self._pass(mix, [(s.resident, span) for s, span in chosen])), mix

    def next_tokens(self, sequences: Several[Sequence], hidden_TD: Tensor) -> list[int]:
        """The next token of each sequence's answer, from its last row's outputs."""
        mix = Mix.of([sequence.resident for sequence in sequences], self.device)
        logits_TV = self.decoder.logits(hidden_TD, mix)
        requests = [sequence.request for sequence in sequences]
        if greedy(requests):
            return logits_TV.argmax(-1).tolist()
        number_T = torch.tensor([len(sequence.answer) for sequence in sequences], device=self.device)
        return sample(logits_TV, Choice.of(requests, self.device), number_T).tolist()

    def settle(self, resident: Resident) -> bool:
        """Make ready what an adapter has beside its block; False where its virtual tokens find no pages."""
        adapter, device = resident.packed.adapter, self.device
        pages = self.cache.reserve(pages_for(adapter.virtual))
        if pages is None:
            return False
        resident.pages, resident.ready = pages, True
        resident.rotation = self.rotations.kind(resident.packed)
        resident.embed_VD, resident.head_VD = (
            None if own is None else own.to(device, non_blocking=True) for own in (adapter.embed_VD, adapter.head_VD)
        )
        if adapter.prefix_L2VHE is not None:
            self.cache.write(pages, adapter.prefix_L2VHE)
        elif adapter.prompt_VD is not None:
            mix = Mix.of([resident], device, [adapter.virtual])
            step = self._pass(mix, [(resident, Span(0, adapter.virtual, 0, pages))])
            self.decoder.forward(adapter.prompt_VD.to(device), step)
        return True

    def _operations(self) -> Operations:
        if self.device.type != "cuda":
            return Plain(self.base, self.pool, self.cache)
        from serving.fast import Fast

        return Fast(self.base, self.pool, self.cache)

    def _pass(self, mix: Mix, chosen: list[tuple[Resident | None, Span]]) -> Pass:
        spans = [span for _, span in chosen]
        position_T, place_T = laid(spans)
        kind_N = torch.tensor([0 if resident is None else resident.rotation for resident, _ in chosen])
        kind_T = kind_N.repeat_interleave(torch.tensor([span.count for span in spans]))
        step = Pass(mix, place_T.to(self.device), *self.rotations.at(kind_T, position_T), spans)
        works = (
            Work.of(mix.tenants, lambda n: max(n.narrow, n.wide), MANY),
            Work.of(mix.tenants, lambda n: n.behind, MANY),
        )
        step.before, step.behind = (None if work is None else work.to(self.device) for work in works)
        return step
