"""Prefix tuning with documents in one row: what it computes, forward and backward, is what rows of their own give.

Flash attention is stood in for by the same sums on a CPU; what is laid out for it, and given back, is real.
"""

from typing import Any

import pytest
import torch
from flash_on_cpu import flash_on_cpu
from llamas import random_llama

from methods.base import Setup
from methods.options.virtual import Prefix
from methods.registry import create
from trainer.kernels.documents import tell_documents
from trainer.kernels.prefixed import PREFIX_ATTENTION, KeyPlaces

Made = tuple[torch.Tensor, list[torch.Tensor]]  # logits, and gradients of prefixes


def tuned() -> Any:
    """A base with prefixes of three tokens in each layer."""
    base: Any = random_llama(vocab_size=60)
    torch.manual_seed(1)
    return create(Prefix(kind="prefix", tokens=3, init_text=None), Setup(seq_len=32)).attach(base)


def made(model: Any, logits_NV: torch.Tensor) -> Made:
    """Logits, and the gradients of a sum in which each counts differently."""
    weight_NV = torch.linspace(-1, 1, logits_NV.numel()).view_as(logits_NV)
    (weight_NV * logits_NV).sum().backward()
    gradients = [parameter.grad for name, parameter in model.named_parameters() if "prefix" in name]
    return logits_NV.detach(), gradients


def alone(documents: list[list[int]]) -> Made:
    """Each document in a pass of its own."""
    model = tuned()
    logits = [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in documents]
    return made(model, torch.cat(logits))


def in_one_row(documents: list[list[int]], rows: int, starts: list[int]) -> Made:
    """All of them in one pass."""
    model = tuned()
    model.set_attn_implementation(PREFIX_ATTENTION)
    tell_documents(model.get_decoder(), 32)
    ids = torch.tensor([token for document in documents for token in document]).view(rows, -1)
    positions = torch.cat([torch.arange(len(document)) for document in documents]).view(rows, -1)
    told = torch.tensor(starts, dtype=torch.int32)
    with flash_on_cpu():
        logits = model(input_ids=ids, position_ids=positions, documents=told, use_cache=False).logits
        return made(model, logits.flatten(0, 1))


@pytest.mark.parametrize(
    ("lengths", "rows", "starts"),
    [((5, 1, 9), 1, [0, 5, 6, 15]), ((12,), 1, [0, 12]), ((7, 7), 2, []), ((4, 2, 6), 2, [0, 4, 6, 12])],
    ids=["several", "one", "a row each", "several in two rows"],
)
def test_documents_in_one_row_see_the_prefix_and_themselves(
    lengths: tuple[int, ...], rows: int, starts: list[int]
) -> None:
    torch.manual_seed(2)
    documents = [torch.randint(60, (length,)).tolist() for length in lengths]
    expected_logits, expected_gradients = alone(documents)
    logits, gradients = in_one_row(documents, rows, starts)
    torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=1e-5)
    assert len(gradients) == 2
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert expected.norm() > 0
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


def test_each_document_has_a_prefix_in_front() -> None:
    places = KeyPlaces.of(torch.tensor([0, 2, 2, 5], dtype=torch.int32), 5, 3)
    assert places.start_S.tolist() == [0, 5, 8, 14] and places.start_S.dtype == torch.int32
    assert places.own_N.tolist() == [3, 4, 11, 12, 13]
    assert places.front_EV.tolist() == [[0, 1, 2], [5, 6, 7], [8, 9, 10]]


def test_a_pass_that_is_told_nothing_is_dense() -> None:
    model = tuned()
    ids = torch.tensor([[1, 2, 3, 4]])
    expected = model(input_ids=ids, use_cache=False).logits
    model.set_attn_implementation(PREFIX_ATTENTION)
    tell_documents(model.get_decoder(), 32)
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected)


def test_shared_prompts_are_refused() -> None:
    model = tuned()
    model.set_attn_implementation(PREFIX_ATTENTION)
    tell_documents(model.get_decoder(), 32)
    told = torch.tensor([0, 4], dtype=torch.int32)
    ids = torch.tensor([[1, 2, 3, 4]])
    with pytest.raises(ValueError, match="do not share their prompts"):
        model(input_ids=ids, position_ids=torch.arange(4)[None], documents=told, key_starts=told, key_places=told)
