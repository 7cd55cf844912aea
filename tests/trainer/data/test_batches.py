"""Batches: the examples of step k whatever the layout, and losses that packing does not change."""

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise, product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from llamas import random_llama

from trainer.data.batches import Batches
from trainer.data.collate import collate
from trainer.data.examples import Examples, GlobalBatch
from trainer.data.layout import IGNORED, Layout, MicroBatch
from trainer.data.tokens import Document
from trainer.objectives import labels, sft

SEQ_LEN = 48
LAYOUTS = list(product((1, 2, 3, 4), (False, True), (1, 2, 5)))  # world, packing, micro-batch


@dataclass(frozen=True)
class Texts:
    """Random examples of 2 to SEQ_LEN tokens, in the place of `Tokens`."""

    all: list[Document]

    @classmethod
    def create(cls, count: int, seed: int = 0) -> "Texts":
        rng = np.random.default_rng(seed)
        texts = []
        for length in rng.integers(2, SEQ_LEN + 1, count):
            target = np.arange(length) >= rng.integers(1, length)
            texts.append(Document(rng.integers(3, 320, length).astype(np.int32), target))
        return cls(texts)

    def document(self, index: int) -> Document:
        return self.all[index]

    @property
    def lengths(self) -> Any:
        return np.array([len(text.ids) for text in self.all])

    @property
    def targets(self) -> Any:
        return np.array([text.target.sum() for text in self.all])

    def batches(self, *, packing: bool = True, micro_batch: int = 2, **options: Any) -> Batches:
        length = options if "epochs" in options else {"steps": 12, **options}
        parts = {"seed": 0, "batch_tokens": 300, **length}
        layout = Layout(parts.pop("seq_len", SEQ_LEN), packing, micro_batch)
        return Batches(Examples.of_each(self, parts.pop("documents", 1)), layout, **parts)


def flat(micro_batches: list[MicroBatch]) -> list[int]:
    return [document for micro in micro_batches for row in micro.rows for document in row]


def gradients(texts: Texts, micro_batches: list[MicroBatch]) -> tuple[float, int, torch.Tensor]:
    """Loss, weight and gradient of all micro-batches together."""
    model, total, weight = random_llama(), 0.0, 0
    for micro in micro_batches:
        batch = {name: torch.from_numpy(array) for name, array in labels.label_arrays(micro.rows, texts, 2).items()}
        part = sft.summed(labels.logits(model, batch), batch["label"])
        part.backward()
        total, weight = total + part.item(), weight + int((batch["label"] != IGNORED).sum())
    return total, weight, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def reference(texts: Texts, examples: Any) -> tuple[float, int, torch.Tensor]:
    """The same, one example at a time and all logits at once."""
    model, total, weight = random_llama(), 0.0, 0
    for example in (texts.document(int(i)) for i in examples):
        ids = torch.from_numpy(example.ids.astype(np.int64))
        logits = model(input_ids=ids[None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        part = loss[torch.from_numpy(example.target)[1:]].sum()
        part.backward()
        total, weight = total + part.item(), weight + int(example.target.sum())
    return total, weight, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_a_batch_is_filled_up_to_its_tokens() -> None:
    texts = Texts.create(100)
    batches = texts.batches(steps=40)
    stream = np.concatenate([batches.examples(k) for k in range(40)])
    for k, following in pairwise(range(40)):
        size = texts.lengths[batches.examples(k)].sum()
        assert batches.batch(k).tokens == size <= 300
        assert size + texts.lengths[batches.examples(following)[0]] > 300
        assert batches.batch(k).targets == texts.targets[batches.examples(k)].sum()
    assert len(stream) > 300
    epochs = [stream[i : i + 100].tolist() for i in range(0, 300, 100)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_at_least_one_example() -> None:
    batches = Texts.create(10).batches(batch_tokens=1, steps=25)
    assert [len(batches.examples(k)) for k in range(batches.steps)] == [1] * 25


def test_a_batch_larger_than_the_data_goes_around() -> None:
    batches = Texts.create(3).batches(batch_tokens=1000, steps=2)
    counts = Counter(batches.examples(0).tolist())
    assert set(counts) == {0, 1, 2}
    assert max(counts.values()) - min(counts.values()) <= 1 < max(counts.values())


@pytest.mark.parametrize("epochs", [0.001, 0.5, 1, 2.25])
def test_epochs(epochs: float) -> None:
    batches = Texts.create(100).batches(epochs=epochs)
    sizes = [len(batches.examples(k)) for k in range(batches.steps)]
    assert sum(sizes) == max(1, round(100 * epochs))
    assert min(sizes) > 0


def test_steps_or_epochs() -> None:
    for length in ({"steps": 1, "epochs": 1.0}, {"steps": None}):
        with pytest.raises(ValueError, match="either steps or epochs"):
            Texts.create(3).batches(**length)


def test_examples_depend_on_seed_and_step_alone() -> None:
    texts = Texts.create(100)
    first = texts.batches()
    for options in ({"packing": False}, {"micro_batch": 7}, {"seq_len": 96}, {"steps": 30}, {"epochs": 9.0}):
        other = texts.batches(**options)
        for k in (11, 3, 7):  # in any order
            assert other.examples(k).tolist() == first.examples(k).tolist()
    assert texts.batches(seed=1).examples(0).tolist() != first.examples(0).tolist()


@pytest.mark.parametrize(("world", "packing", "micro_batch"), LAYOUTS)
def test_every_layout_deals_the_same_examples(world: int, packing: bool, micro_batch: int) -> None:
    texts = Texts.create(100)
    batches = texts.batches(packing=packing, micro_batch=micro_batch)
    for k in range(batches.steps):
        dealt = [batches.deal(k, rank, world) for rank in range(world)]
        assert Counter(example for part in dealt for example in flat(part)) == Counter(batches.examples(k).tolist())
        assert len({len(part) for part in dealt}) == 1
        rows = [row for part in dealt for micro in part for row in micro.rows]
        assert all(sum(texts.lengths[row]) <= SEQ_LEN for row in rows)
        assert packing or all(len(row) == 1 for row in rows)
        assert all(len(micro.rows) <= micro_batch for part in dealt for micro in part)
        assert dealt == [batches.deal(k, rank, world) for rank in range(world)]


@pytest.mark.parametrize("documents", [2, 3])
def test_the_documents_of_an_example_stay_in_one_micro_batch(documents: int) -> None:
    texts = Texts.create(61)  # one is left over
    for world, packing, micro_batch in LAYOUTS:
        batches = texts.batches(packing=packing, micro_batch=micro_batch, documents=documents, batch_tokens=900)
        assert batches.batch(1).tokens == sum(texts.lengths[list(batches.batch(1).documents())])
        for k in (0, 11):
            dealt = [batches.deal(k, rank, world) for rank in range(world)]
            micros = [micro for part in dealt for micro in part]
            owned = [[flat([micro])[place] for place in example] for micro in micros for example in micro.examples]
            chosen = [list(batches.batch(k).examples.documents(int(i))) for i in batches.examples(k)]
            assert sorted(owned) == sorted(chosen)
            assert all(len(flat([micro])) == sum(map(len, micro.examples)) for micro in micros)
            assert len({len(part) for part in dealt}) == 1
            assert all(sum(texts.lengths[row]) <= SEQ_LEN for micro in micros for row in micro.rows)
            assert all(len(micro.rows) <= max(micro_batch, documents) for micro in micros)
            if packing:
                assert len(flat(micros)) > 1.1 * sum(len(micro.rows) for micro in micros)


def test_an_example_that_is_there_twice_is_two() -> None:
    texts = Texts.create(4)
    layout = Layout(SEQ_LEN, packing=True, micro_batch=9)
    (micro,) = layout.deal(GlobalBatch(Examples.of_each(texts, 2), np.array([1, 0, 1])), 0, 1)
    owned = [[flat([micro])[place] for place in example] for example in micro.examples]
    assert sorted(owned) == [[0, 1], [2, 3], [2, 3]]
    assert sorted(place for example in micro.examples for place in example) == list(range(6))


def test_packing_is_tight_and_ranks_have_about_the_same() -> None:
    texts = Texts.create(1000)
    batches = texts.batches(batch_tokens=4000)
    dealt = [batches.deal(0, rank, 4) for rank in range(4)]
    rows = [row for part in dealt for micro in part for row in micro.rows]
    assert batches.batch(0).tokens > 0.9 * len(rows) * SEQ_LEN
    tokens = [texts.lengths[flat(part)].sum() for part in dealt]
    assert max(tokens) - min(tokens) <= SEQ_LEN


def test_ranks_without_examples_run_empty_micro_batches() -> None:
    texts = Texts.create(2)
    batches = texts.batches(epochs=1.0, packing=False, micro_batch=1)
    dealt = [batches.deal(0, rank, 4) for rank in range(4)]
    assert [len(flat(part)) for part in dealt] == [1, 1, 0, 0]
    assert dealt[3] == [MicroBatch([], [])]
    loss, weight, gradient = gradients(texts, dealt[3])
    assert (loss, weight) == (0.0, 0)
    assert not gradient.any()
    assert len(gradient) == len(gradients(texts, dealt[0])[2])


def test_collate() -> None:
    example = Document(np.array([7, 8, 9], np.int32), np.array([False, True, False]))
    texts = Texts([example, Document(np.arange(10, 16, dtype=np.int32), np.array([False] + [True] * 5))])
    batch = collate([[0, 1], [0]], texts, 2)
    assert batch["input_ids"].tolist() == [
        [7, 8, 9, 10, 11, 12, 13, 14, 15, *[2] * 7],
        [7, 8, 9, *[2] * 13],
    ]
    assert batch["position_ids"].tolist() == [
        [0, 1, 2, 0, 1, 2, 3, 4, 5, *range(7)],
        [0, 1, 2, *range(13)],
    ]
    assert batch["labels"].tolist() == [
        [-100, 8, -100, -100, 11, 12, 13, 14, 15, *[-100] * 7],
        [-100, 8, *[-100] * 14],
    ]
    assert set(batch) == {"input_ids", "position_ids", "labels"}
    assert collate([], texts, 2)["input_ids"].tolist() == [[2] * 8]


@pytest.mark.parametrize(("world", "packing", "micro_batch"), LAYOUTS)
def test_every_layout_gives_the_same_loss_and_gradient(
    world: int, packing: bool, micro_batch: int, expected: tuple[float, int, torch.Tensor]
) -> None:
    texts = Texts.create(40)
    batches = texts.batches(packing=packing, micro_batch=micro_batch)
    dealt = [micro for rank in range(world) for micro in batches.deal(0, rank, world)]
    loss, weight, gradient = gradients(texts, dealt)
    assert weight == expected[1] == batches.batch(0).targets
    assert loss == pytest.approx(expected[0], rel=1e-6)
    assert torch.linalg.norm(gradient - expected[2]) < 1e-6 * torch.linalg.norm(expected[2])


@pytest.fixture(scope="module")
def expected() -> tuple[float, int, torch.Tensor]:
    texts = Texts.create(40)
    return reference(texts, texts.batches().examples(0))


def test_documents_do_not_see_each_other() -> None:
    model, texts = random_llama(), Texts.create(6)
    texts.all.sort(key=lambda text: len(text.ids))

    def logits(texts: Texts) -> torch.Tensor:
        batch = collate([[0, 1, 2], [3]], texts, 2)
        inputs = {name: torch.from_numpy(batch[name]) for name in ("input_ids", "position_ids")}
        return model(**inputs, use_cache=False).logits.detach()

    before = logits(texts)
    first, second = len(texts.document(0).ids), len(texts.document(1).ids)
    changed = Document(np.full(second, 5, np.int32), texts.document(1).target)
    after = logits(Texts([texts.document(0), changed, *texts.all[2:]]))
    same = (before == after).all(-1)
    assert same[0, :first].all() and same[0, first + second :].all() and same[1].all()
    assert not same[0, first : first + second].any()


def test_chunks_of_the_cross_entropy_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = Texts.create(40)
    dealt = texts.batches().deal(0, 0, 1)
    loss, weight, gradient = gradients(texts, dealt)
    monkeypatch.setattr(sft, "CHUNK", 7)
    chunked = gradients(texts, dealt)
    assert chunked[:2] == (pytest.approx(loss, rel=1e-6), weight)
    assert torch.linalg.norm(chunked[2] - gradient) < 1e-6 * torch.linalg.norm(gradient)


def test_a_model_without_logits_to_keep_gives_the_same() -> None:
    texts, model = Texts.create(10), random_llama()
    batch = {name: torch.from_numpy(array) for name, array in labels.label_arrays([[0, 1], [2]], texts, 2).items()}

    def whole(logits_to_keep: Any, **inputs: Any) -> Any:  # noqa: ARG001
        return model(**inputs)

    assert torch.allclose(labels.logits(whole, batch), labels.logits(model, batch), rtol=1e-6, atol=1e-6)


def test_a_million_examples() -> None:
    lengths = np.random.default_rng(0).integers(20, 800, 1_000_000)
    examples = Examples.of_each(SimpleNamespace(lengths=lengths))
    batches = Batches(examples, Layout(2048, True, 4), seed=0, batch_tokens=131072, epochs=2.0)
    dealt = batches.deal(batches.steps - 2, 0, 8)  # the last one that is full
    assert batches.steps > 6000
    assert 131072 - 8 * 2048 < 8 * lengths[flat(dealt)].sum() < 131072 + 8 * 2048
