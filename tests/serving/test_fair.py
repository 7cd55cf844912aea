"""Fair turns of tenants, counted in steps of the engine: what one gets does not depend on how fast the machine is."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from adapters import loaded, make_base

from serving.engine import Engine
from serving.fair import ANSWER_PRICE, PROMPT_PRICE
from serving.sequence import Request, Sequence

ROWS = 8
BACKLOG = 3 * ROWS  # sequences that each busy tenant has waiting or running, at least
Shape = tuple[int, int]  # tokens of the prompt, and of the answer


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """An engine with few rows, on a base of one layer."""
    base = make_base(tmp_path / "base", num_hidden_layers=1, hidden_size=16, intermediate_size=16)
    return Engine(loaded(base), rows=ROWS, chunk=64, tokens=4096, positions=128, adapter_bytes=2**16)


class Load:
    """A tenant that always has a backlog, of requests whose shapes a seed draws."""

    def __init__(self, engine: Engine, tenant: str, shape: Callable[[random.Random], Shape]) -> None:
        self.engine, self.tenant, self.shape = engine, tenant, shape
        self.draw = random.Random(tenant)
        self.sequences: list[Sequence] = []

    def fill(self) -> None:
        """Ask for more where few are left."""
        unfinished = sum(not sequence.finished for sequence in self.sequences)
        while unfinished < BACKLOG:
            prompt, new_tokens = self.shape(self.draw)
            request = Request((7,) * prompt, new_tokens=new_tokens, tenant=self.tenant)
            self.sequences.append(self.engine.add(request))
            unfinished += 1

    @property
    def service(self) -> float:
        """What it got, counted here by the prices of the paper."""
        prompts = sum(len(sequence.request.prompt) for sequence in self.sequences if sequence.answer)
        answers = sum(len(sequence.answer) for sequence in self.sequences)
        return prompts * PROMPT_PRICE + answers * ANSWER_PRICE


def short(draw: random.Random) -> Shape:
    return draw.randint(4, 16), draw.randint(2, 6)


def long(draw: random.Random) -> Shape:
    return draw.randint(20, 60), draw.randint(16, 32)


def answered(draw: random.Random) -> Shape:
    return draw.randint(4, 8), draw.randint(24, 48)


@pytest.mark.parametrize("others", [(long, short), (answered, short)])
def test_tenants_with_a_backlog_get_equal_service(others: tuple, engine: Engine) -> None:
    first, second = (Load(engine, name, shape) for name, shape in zip("ab", others, strict=True))
    at_begin = 0.0
    for step in range(700):
        first.fill()
        second.fill()
        engine.step()
        if step == 99:
            at_begin = second.service - first.service
    difference = second.service - first.service - at_begin
    assert abs(difference) < 0.05 * first.service


def test_who_was_away_has_saved_up_nothing(engine: Engine) -> None:
    busy, late = Load(engine, "busy", short), Load(engine, "late", short)
    for _ in range(200):
        busy.fill()
        engine.step()
    before = busy.service
    for _ in range(200):
        busy.fill()
        late.fill()
        engine.step()
    assert busy.service - before == pytest.approx(late.service, rel=0.1)


def latencies(engine: Engine, loads: list[Load]) -> list[int]:
    """How many steps each request of a tenant takes that sends one now and then, while others do what they do."""
    found = []
    draw = random.Random(4)
    for _ in range(25):
        for _ in range(draw.randint(60, 100)):
            for load in loads:
                load.fill()
            engine.step()
        sequence = engine.add(Request((7,) * draw.randint(4, 16), new_tokens=draw.randint(6, 12), tenant="small"))
        steps = 0
        while not sequence.finished:
            for load in loads:
                load.fill()
            engine.step()
            steps += 1
        found.append(steps)
    return found


def test_a_tenant_with_little_load_is_hardly_delayed_by_those_with_a_backlog(engine: Engine) -> None:
    alone = latencies(engine, [])
    loads = [Load(engine, "a", long), Load(engine, "b", answered)]
    beside = latencies(engine, loads)
    ratios = [delayed / solo for delayed, solo in zip(beside, alone, strict=True)]
    assert max(ratios) <= 2
