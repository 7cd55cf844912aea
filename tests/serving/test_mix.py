"""Every kind of adapter, alone and all in one batch: what plain PEFT (or the method's own module) says of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import ADAPTERS, Exported, loaded

from serving.engine import Engine
from serving.sequence import Request

PROMPT = tuple((5 * i + 7) % 320 for i in range(21))
TOKENS = 8
NAMES: list[str | None] = [None, *ADAPTERS]


@pytest.fixture(scope="module")
def alone(base: Path, exported: dict[str, Exported]) -> dict[str | None, Any]:
    """Plain models, each with one of the adapters."""
    return {None: loaded(base)} | {name: adapter.alone(base) for name, adapter in exported.items()}


@pytest.fixture(scope="module")
def engine(base: Path, exported: dict[str, Exported]) -> Engine:
    """An engine that has them all."""
    engine = Engine(loaded(base), rows=32, tokens=4096, positions=256, adapter_bytes=2**24)
    for name, adapter in exported.items():
        engine.load(name, adapter.folder)
    return engine


def said(model: Any, prompt: tuple[int, ...]) -> torch.Tensor:
    """The logits of a plain model behind each token of a prompt."""
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([prompt])).logits[0]
    return logits[-len(prompt) :]


def continued(model: Any, prompt: tuple[int, ...]) -> list[int]:
    """What transformers generates, greedily."""
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "pad_token_id": 0}
    given: torch.Tensor = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    return given[0, -TOKENS:].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_adapter_alone(
    name: str | None, engine: Engine, alone: dict[str | None, Any]
) -> None:
    expected = said(alone[name], PROMPT)
    (found,) = engine.logits([Request(PROMPT, name)])
    assert (found - expected).abs().max() < 1e-5 * expected.std()
    if name is not None:
        assert (expected - said(alone[None], PROMPT)).abs().max() > 1e-2 * expected.std()


def test_a_batch_of_all_kinds_gives_everyone_their_own_tokens(engine: Engine, alone: dict[str | None, Any]) -> None:
    prompts = {name: PROMPT[: 5 + number] for number, name in enumerate(NAMES)}
    expected = {name: continued(alone[name], prompts[name]) for name in NAMES}
    found = engine.generate([Request(prompts[name], name, new_tokens=TOKENS) for name in NAMES])
    assert dict(zip(NAMES, found, strict=True)) == expected


def test_neither_order_nor_company_changes_a_tenants_tokens(engine: Engine) -> None:
    requests = [
        Request(PROMPT[: 3 + number], name, new_tokens=5 + number % 4, temperature=number % 2 * 0.8, seed=number)
        for number, name in enumerate(NAMES)
    ]
    together = engine.generate(requests)
    backwards = engine.generate(requests[::-1])[::-1]
    assert together == backwards == [engine.generate([request])[0] for request in requests]
