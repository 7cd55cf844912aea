"""Every kind of adapter, alone and all in one batch: what plain PEFT (or the method's own module) says of it."""

from pathlib import Path

import pytest
import torch
from adapters import ADAPTERS, Exported, export, make_base
from torch import nn

from serving.engine import Engine
from serving.sequence import Request

PROMPT = tuple((5 * i + 7) % 320 for i in range(21))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("serving") / "base")


@pytest.fixture(scope="module")
def exported(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: export(base, name, folder / name) for name in ADAPTERS}


@pytest.fixture(scope="module")
def alone(base: Path, exported: dict[str, Exported]) -> dict[str | None, nn.Module]:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    return {None: plain} | {name: adapter.alone(base) for name, adapter in exported.items()}


@pytest.fixture(scope="module")
def engine(base: Path, exported: dict[str, Exported]) -> Engine:
    engine = Engine(str(base), rows=32, tokens=4096, positions=256, adapter_bytes=2**24)
    for name, adapter in exported.items():
        engine.load(name, adapter.folder)
    return engine


def reference(model: nn.Module, prompt: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([prompt])).logits[0]
    return logits[-len(prompt) :]


def continued(model: nn.Module, prompt: tuple[int, ...], count: int) -> list[int]:
    """Greedy tokens without any cache."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(reference(model, tuple(ids))[-1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", [None, *ADAPTERS])
def test_logits_are_those_of_the_adapter_alone(
    name: str | None, engine: Engine, alone: dict[str | None, nn.Module]
) -> None:
    expected = reference(alone[name], PROMPT)
    found = engine.logits(Request(PROMPT, name))
    assert (found - expected).abs().max() < 1e-5 * expected.std()
    if name is not None:
        assert (expected - reference(alone[None], PROMPT)).abs().max() > 1e-2 * expected.std()


def test_a_batch_of_all_kinds_gives_everyone_their_own_tokens(
    engine: Engine, alone: dict[str | None, nn.Module]
) -> None:
    names = [None, *ADAPTERS]
    prompts = {name: PROMPT[: 5 + number] for number, name in enumerate(names)}
    expected = {name: continued(alone[name], prompts[name], 8) for name in names}
    found = engine.generate([Request(prompts[name], name, new_tokens=8) for name in names])
    assert dict(zip(names, found, strict=True)) == expected
