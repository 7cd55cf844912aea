"""What the engine writes beside a model in training: on the same weights, by the adapter as it is, drawn by seeds."""

from typing import Any

import pytest
import torch
from llamas import random_llama

from methods.base import Setup
from methods.options import KINDS
from methods.registry import create
from runfolder.group_objectives import GroupOptions
from trainer.group_writer import AskedAnswer, GroupWriter, WrittenAnswer
from trainer.writing_size import cached_tokens

ENDS = (1,)
TEMPERATURE = 1.5
ASKED = [*(AskedAnswer((5, 6, 7, 8), 9, seed) for seed in range(4)), AskedAnswer((5, 6), 9, 77)]
OPTIONS: dict[str, dict[str, Any]] = {"fourierft": {"frequencies": 64}}
TRIED = sorted(KINDS.keys() - GroupOptions.refused_methods.keys())


def moved(model: Any) -> None:
    """Move what is trained, as an update does."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)


def in_training(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, GroupWriter]:
    """A base, the same with a method's adapter on it that has moved, and what writes with it."""
    torch.manual_seed(0)
    base = random_llama(
        vocab_size=300, initializer_range=0.2, bos_token_id=0, eos_token_id=ENDS[0], pad_token_id=2
    ).to(dtype)
    method = create(KINDS[kind](kind=kind, **OPTIONS.get(kind, {})), Setup(3))
    model: Any = method.attach(base)
    model.eval()
    moved(model)
    return base, model, GroupWriter(model, method, 64)


def furthest(model: Any, written: list[WrittenAnswer]) -> float:
    """How far the model's log-probabilities of the answers are at most from the engine's."""
    gaps = []
    for asked, answer in zip(ASKED, written, strict=True):
        ids = torch.tensor([[*asked.prompt, *answer.ids]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].float() / TEMPERATURE
        given = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[len(asked.prompt) - 1 :, 0]
        gaps.append((given - torch.tensor(answer.log_probabilities)).abs().max().item())
    return max(gaps)


@pytest.mark.parametrize("kind", TRIED)
def test_answers_come_from_the_model_as_it_is_now(kind: str) -> None:
    base, model, writer = in_training(kind)
    digest = writer.load()
    written = writer.write(ASKED, ENDS, TEMPERATURE)
    assert furthest(model, written) < 1e-5
    assert len({tuple(answer.ids) for answer in written[:4]}) == 4
    alone = writer.write(ASKED[1:2], ENDS, TEMPERATURE)
    assert alone[0].ids == written[1].ids  # whatever else is written at the time
    moved(model)
    assert writer.load() != digest
    assert furthest(model, writer.write(ASKED, ENDS, TEMPERATURE)) < 1e-5
    attention = base.model.layers[1].self_attn
    laid_out = writer.engine.base.weight(1, "k_proj")
    assert attention.k_proj.weight.data_ptr() == laid_out.data_ptr()  # no second base


def test_a_base_in_16_bits_has_an_adapter_in_32() -> None:
    _, model, writer = in_training("lora", torch.bfloat16)
    writer.load()
    written = writer.write(ASKED, ENDS, TEMPERATURE)
    with torch.autocast("cpu", torch.bfloat16):
        assert furthest(model, written) < 0.2


def test_caches_hold_all_answers_of_a_step_unless_that_takes_too_much() -> None:
    assert cached_tokens(positions=100, bytes_of_token=1) == 51_200  # 512 answers
    assert cached_tokens(positions=2048, bytes_of_token=1) == 196_608
    assert cached_tokens(positions=2048, bytes_of_token=2**17) == 65_536  # 8 GiB
    assert cached_tokens(positions=2048, bytes_of_token=2**30) == 4096  # two answers
