"""S2-Attn: what each head sees, in packed and padded rows, against the paper's equations and its leaking original."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from llamas import random_llama
from torch.nn.functional import scaled_dot_product_attention

from methods.parts.shifted_attention import Pattern, attend, sparse_in_training

GROUP = 8
HEADS, SIZE = 4, 6
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def positions(*rows: list[int]) -> torch.Tensor:
    """`position_ids` of rows of documents of these lengths; padding is one of them, as the trainer makes it."""
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])


PACKED = positions([17, 3, 12], [32], [5, 8, 19])
PADDED = positions([32], [20, 12], [9, 23])
WHOLE = positions([32])


def seen(position_BT: torch.Tensor, group: int = GROUP) -> torch.Tensor:
    """The mask [B, H, T, T] of the module's equation, one element at a time."""
    rows, length = position_BT.shape
    document_BT = (position_BT == 0).cumsum(1)
    mask = torch.zeros(rows, HEADS, length, length, dtype=torch.bool)
    for b, h, t, s in torch.cartesian_prod(*map(torch.arange, mask.shape)).tolist():
        shift = group // 2 if h >= HEADS // 2 else 0
        p_t, p_s = int(position_BT[b, t]), int(position_BT[b, s])
        same = document_BT[b, t] == document_BT[b, s]
        mask[b, h, t, s] = same and s <= t and (p_t + shift) // group == (p_s + shift) // group
    return mask


def ours(position_BT: torch.Tensor, group: int = GROUP) -> Attention:
    """Our attention for rows of these positions, [B, H, T, D]."""
    return lambda q, k, v: attend(q, k, v, Pattern.of(position_BT, group)).transpose(1, 2)


def rolled(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The paper's Algorithm 1: roll half of the heads by g / 2, attend in groups under a causal mask, roll back."""

    def roll(x_BHTD: torch.Tensor, by: int) -> torch.Tensor:
        first, second = x_BHTD.chunk(2, dim=1)
        return torch.cat([first, second.roll(by, dims=2)], dim=1)

    groups = [roll(x, -GROUP // 2).unflatten(2, (-1, GROUP)) for x in (query, key, value)]
    return roll(scaled_dot_product_attention(*groups, is_causal=True).flatten(2, 3), GROUP // 2)


def inputs(rows: int, length: int = 32) -> list[torch.Tensor]:
    """Random queries, keys and values [B, H, T, D], in fp64."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, HEADS, length, SIZE, generator=generator, dtype=torch.float64) for _ in range(3)]


def influence(attention: Attention, rows: int) -> torch.Tensor:
    """Which token's key or value moves which output of its row: [B, H, T, S]; fails where heads or rows mix."""
    query, key, value = inputs(rows)
    total = torch.zeros(rows, HEADS, 32, 32, dtype=torch.bool)
    for b, h, t in torch.cartesian_prod(torch.arange(rows), torch.arange(HEADS), torch.arange(32)).tolist():
        q, k, v = (x.clone().requires_grad_() for x in (query, key, value))
        attention(q, k, v)[b, h, t].square().sum().backward()
        moved = (k.grad != 0).any(-1) | (v.grad != 0).any(-1)
        total[b, h, t] = moved[b, h]
        moved[b, h] = False
        assert not moved.any()
    return total


def leaks(moved: torch.Tensor, position_BT: torch.Tensor) -> torch.Tensor:
    """For each head, whether an output depends on what comes later or on another document."""
    document_BT = (position_BT == 0).cumsum(1)
    other = document_BT[:, None, :, None] != document_BT[:, None, None, :]
    later = torch.ones(32, 32, dtype=torch.bool).triu(1)
    return (moved & (other | later)).any(dim=(0, 2, 3))


@pytest.mark.parametrize("position_BT", [PACKED, PADDED, WHOLE], ids=["packed", "padded", "whole"])
def test_no_head_sees_the_future_or_another_document(position_BT: torch.Tensor) -> None:
    moved = influence(ours(position_BT), len(position_BT))
    assert leaks(moved, position_BT).tolist() == [False] * HEADS
    assert torch.equal(moved, seen(position_BT))


def test_the_check_finds_the_leak_of_the_paper_s_pseudocode() -> None:
    assert leaks(influence(rolled, 1), WHOLE).tolist() == [False, False, True, True]


def test_equal_to_the_paper_s_pseudocode_where_that_does_not_leak() -> None:
    parts = inputs(1)
    expected, found = rolled(*parts), ours(WHOLE)(*parts)
    assert torch.allclose(found[:, :2], expected[:, :2], atol=1e-12)
    assert torch.allclose(found[:, 2:, GROUP // 2 :], expected[:, 2:, GROUP // 2 :], atol=1e-12)
    assert not torch.allclose(found[:, 2:, : GROUP // 2], expected[:, 2:, : GROUP // 2], atol=1e-2)


@pytest.mark.parametrize("group", [1, 3, 8, 32, 50])
@pytest.mark.parametrize("position_BT", [PACKED, PADDED], ids=["packed", "padded"])
def test_equal_to_the_equation(position_BT: torch.Tensor, group: int) -> None:
    parts = inputs(3)
    expected = scaled_dot_product_attention(*parts, attn_mask=seen(position_BT, group))
    assert torch.allclose(ours(position_BT, group)(*parts), expected, atol=1e-12)


def test_packed_is_as_if_alone() -> None:
    parts = inputs(1)
    packed = ours(positions([17, 3, 12]))(*parts)
    alone = [ours(positions([n]))(*(x[:, :, a : a + n] for x in parts)) for a, n in ((0, 17), (17, 3), (20, 12))]
    assert torch.allclose(packed, torch.cat(alone, dim=2), atol=1e-12)


def test_documents_of_half_a_group_are_dense() -> None:
    parts = inputs(1)
    dense = scaled_dot_product_attention(*parts, is_causal=True)
    assert torch.allclose(ours(WHOLE, group=64)(*parts), dense, atol=1e-12)


def sparse_llama() -> Any:
    """A random Llama with grouped heads whose attention is sparse in training."""
    model = random_llama()
    model.set_attn_implementation("shifted")
    sparse_in_training(model.get_decoder(), GROUP)
    return model


def test_a_model_attends_sparsely_in_training_and_densely_else() -> None:
    model, reference = sparse_llama(), random_llama()
    ids = torch.randint(3, 300, (3, 32), generator=torch.Generator().manual_seed(1))
    for position_BT in (PACKED, PADDED):
        expected = reference(input_ids=ids, position_ids=position_BT, attention_mask=seen(position_BT)).logits
        found = model.train()(input_ids=ids, position_ids=position_BT, use_cache=False).logits
        assert torch.allclose(found, expected, atol=1e-5)
        dense = reference(input_ids=ids, position_ids=position_BT, use_cache=False).logits
        found = model.eval()(input_ids=ids, position_ids=position_BT, use_cache=False).logits
        assert torch.equal(found, dense)
        assert not torch.allclose(dense, expected, atol=1e-2)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), reference.generate(ids, **options))


def test_a_model_sees_no_future() -> None:
    model = sparse_llama().train()
    embeds = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    logits = model(inputs_embeds=embeds, position_ids=PACKED, use_cache=False).logits
    document_BT = (PACKED == 0).cumsum(1)
    for t in range(32):
        (grad,) = torch.autograd.grad(logits[:, t].square().sum(), embeds, retain_graph=True)
        allowed = (document_BT == document_BT[:, t : t + 1]) & (torch.arange(32) <= t)
        assert (grad[~allowed] == 0).all() and (grad[:, t] != 0).any()


def test_gradient_checkpointing_changes_nothing() -> None:
    ids = torch.randint(3, 300, (3, 32), generator=torch.Generator().manual_seed(1))
    grads = []
    for checkpointing in (False, True):
        model = sparse_llama().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        losses = [model(input_ids=ids, position_ids=p, use_cache=False).logits.sum() for p in (PACKED, PADDED)]
        for loss in losses:  # the second forward pass comes before the first backward pass
            loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_what_it_cannot_do_is_refused() -> None:
    model = sparse_llama().train()
    ids = torch.zeros(1, 32, dtype=torch.long)
    with pytest.raises(ValueError, match="position_ids"):
        model(input_ids=ids)
    with pytest.raises(ValueError, match="no attention_mask"):
        model(input_ids=ids, position_ids=WHOLE, attention_mask=torch.ones_like(ids))
