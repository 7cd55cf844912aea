"""Forward passes over rows of sequences, and what an adapter needs to be ready for them.

Shapes: T rows of a pass, V vocabulary, D width.
"""

from collections.abc import Sequence as Several

import torch
from torch import Tensor

from serving.base import FrozenBase
from serving.cache import Cache, pages_for
from serving.decoder import Decoder
from serving.grouping import MANY, Grouping, products_of_row
from serving.integers import integers, tensor_of
from serving.mix import AdapterBatch, Owner, Owners
from serving.packed import Needs
from serving.passing import Pass, Span, positions_and_places
from serving.plain import Plain
from serving.pool import Pool, Resident
from serving.rotation import Rotations, rotation_of
from serving.sampler import Choice, Manner, NextTokens, choose
from serving.sequence import Sequence

Chosen = Several[tuple[Sequence, Span]]


class Forward:
    """A base with its adapters and its cache, ready to compute."""

    def __init__(self, base: FrozenBase, pool: Pool, cache: Cache, positions: int) -> None:
        """Sequences have at most so many positions."""
        self.base = base
        self.pool = pool
        self.cache = cache
        self.device = base.device
        self.rotations = Rotations(base, positions)
        self.decoder = Decoder(base, self._operations())

    def run_prompts(self, chosen: Chosen) -> Tensor:
        """The normed outputs [T, D] of some rows of prompts."""
        ids = integers()
        for sequence, span in chosen:
            tokens = sequence.prompt_tokens(span.start, span.count)
            ids.extend(tokens)
        id_T = tensor_of(ids)
        return self.run(chosen, id_T)

    def run(self, chosen: Chosen, id_T: Tensor) -> Tensor:
        """The normed outputs [T, D] of some rows of sequences, whose tokens are these."""
        owners: list[Owner] = []
        spans: list[Span] = []
        for sequence, span in chosen:
            owners.append(sequence.resident)
            spans.append(span)
        step = self._pass(owners, spans)
        id_T = id_T.to(self.device)
        x_TD = self.decoder.embed(id_T, step.adapters)
        return self.decoder.forward(x_TD, step)

    def logits(self, owner: Owner, hidden_TD: Tensor) -> Tensor:
        """The logits [T, V] of rows that are all one adapter's, or the base's, from their outputs."""
        rows = len(hidden_TD)
        adapters = AdapterBatch.of([owner], [rows])
        adapters = adapters.to(self.device)
        return self.decoder.logits(hidden_TD, adapters)

    def next_tokens(self, sequences: Several[Sequence], hidden_TD: Tensor) -> list[tuple[int, float]]:
        """The next token of each sequence's answer and its log-probability, from its last row's outputs."""
        owners = [sequence.resident for sequence in sequences]
        adapters = AdapterBatch.of(owners)
        adapters = adapters.to(self.device)
        logits_TV = self.decoder.logits(hidden_TD, adapters)
        chosen = self._chosen_tokens(sequences, logits_TV)
        return chosen.pairs()

    def prepare_resident(self, resident: Resident) -> bool:
        """Make ready what an adapter has beside its block; False where its virtual tokens find no pages."""
        packed = resident.packed
        adapter = packed.adapter
        needed = pages_for(adapter.virtual)
        pages = self.cache.reserve(needed)
        if pages is None:
            return False
        resident.pages = pages
        resident.ready = True
        resident.rotation = self.rotations.kind(packed)
        resident.embed_VD = self._on_device(adapter.embed_VD)
        resident.head_VD = self._on_device(adapter.head_VD)
        if adapter.prefix_L2VHE is not None:
            self.cache.write(pages, adapter.prefix_L2VHE)
        elif adapter.prompt_VD is not None:
            self._fill_prompt(resident, adapter.prompt_VD)
        return True

    def _chosen_tokens(self, sequences: Several[Sequence], logits_TV: Tensor) -> NextTokens:
        """The token that each sequence's request takes from its logits."""
        requests = [sequence.request for sequence in sequences]
        numbers = [len(sequence.answer) for sequence in sequences]
        device = self.device
        number_T = torch.tensor(numbers, device=device)
        manner = Manner.of(requests)
        choice = Choice.of(requests, device)
        return choose(logits_TV, manner, choice, number_T)

    def _on_device(self, tensor: Tensor | None) -> Tensor | None:
        """The same on the device, where it is there."""
        if tensor is None:
            return None
        return tensor.to(self.device, non_blocking=True)

    def _fill_prompt(self, resident: Resident, prompt_VD: Tensor) -> None:
        """Compute the keys and values of an adapter's virtual tokens, from their embeddings."""
        count = len(prompt_VD)
        span = Span(0, count, 0, resident.pages)
        step = self._pass([resident], [span])
        x_VD = prompt_VD.to(self.device)
        self.decoder.forward(x_VD, step)

    def _operations(self) -> Plain:
        """The operations for this device."""
        if not self.base.on_gpu:
            return Plain(self.base, self.pool, self.cache)
        from serving.fast import Fast

        return Fast(self.base, self.pool, self.cache)

    def _pass(self, owners: Owners, spans: list[Span]) -> Pass:
        """A pass over spans of prompts that have these owners."""
        counts = [span.count for span in spans]
        adapters = AdapterBatch.of(owners, counts)
        grouping = Grouping.of(adapters, MANY, largest_rank)
        position_T, place_T = positions_and_places(spans)
        kind_T = rotation_kinds(owners, counts)
        cos_TF, sin_TF = self.rotations.at(kind_T, position_T)
        return Pass(
            adapters=adapters.to(self.device),
            grouping=grouping.to(self.device),
            place_T=place_T.to(self.device),
            cos_TF=cos_TF,
            sin_TF=sin_TF,
            spans=spans,
            products=products_of_row(adapters.needs),
        )


def largest_rank(needs: Needs) -> int:
    """The rank that grouped kernels compute of an adapter over prompts: all of it."""
    return max(needs.narrow, needs.wide)


def rotation_kinds(owners: Owners, counts: list[int]) -> Tensor:
    """The kind of rotary positions that each row's adapter has."""
    kinds: list[int] = []
    for owner in owners:
        kind = rotation_of(owner)
        kinds.append(kind)
    kind_N = torch.tensor(kinds)
    count_N = torch.tensor(counts)
    return kind_N.repeat_interleave(count_N)
