"""The kernels and graphs of a GPU against plain torch on the CPU: every kind of adapter, every family of bases."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from adapters import ADAPTERS, Exported, export, loaded, make_base
from test_families import FAMILIES, PROMPTS, random_model

from serving.engine import Engine
from serving.sequence import Request

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
PROMPT = tuple((5 * i + 7) % 320 for i in range(70))
NAMES: list[str | None] = [None, *ADAPTERS]


def pair(base: Path, exported: dict[str, Exported], dtype: torch.dtype = torch.float32) -> tuple[Engine, Engine]:
    """An engine on the CPU, fp32, and one on the GPU, with all adapters."""
    sizes = {"rows": 32, "tokens": 4096, "positions": 256, "adapter_bytes": 2**24}
    engines = Engine(loaded(base), **sizes), Engine(loaded(base).to("cuda", dtype), **sizes)
    for engine in engines:
        for name, adapter in exported.items():
            engine.load(name, adapter.folder)
    return engines


def test_logits_and_tokens_of_all_kinds(base: Path, exported: dict[str, Exported]) -> None:
    plain, fast = pair(base, exported)
    for name in NAMES:
        (expected,) = plain.logits([Request(PROMPT[:21], name)])
        (found,) = fast.logits([Request(PROMPT[:21], name)])
        assert (found.cpu() - expected).abs().max() < 2e-5 * expected.std()
    for temperature in (0.0, 0.8):
        limits = {"top_k": 40, "top_p": 0.9}
        asked = [
            Request(PROMPT[: 3 + row], name, new_tokens=6 + row % 5, temperature=temperature, seed=row, **limits)
            for row, name in enumerate(NAMES)
        ]
        answers = fast.generate(asked)
        assert answers == plain.generate(asked)
        assert answers == [fast.generate([request])[0] for request in asked]


def test_bf16_is_near(base: Path, exported: dict[str, Exported]) -> None:
    plain, fast = pair(base, exported, torch.bfloat16)
    for name in NAMES:
        (expected,) = plain.logits([Request(PROMPT[:21], name)])
        (found,) = fast.logits([Request(PROMPT[:21], name)])
        assert (found.float().cpu() - expected).norm() < 0.05 * expected.norm()


def test_stops_that_the_host_sees_one_step_late(base: Path, exported: dict[str, Exported]) -> None:
    plain, fast = pair(base, exported)
    stop = (plain.generate([Request(PROMPT[:4], "lora", new_tokens=3)])[0][2],)
    names = list(ADAPTERS)
    asked = [Request(PROMPT[: 3 + row], names[row % len(names)], new_tokens=20, stop=stop) for row in range(40)]
    assert fast.generate(asked) == plain.generate(asked)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    model = random_model(family, **FAMILIES[family])
    plain, fast = (Engine(deepcopy(model).to(d), tokens=2048, adapter_bytes=2**16) for d in ("cpu", "cuda"))
    asked = [Request(prompt, new_tokens=12) for prompt in PROMPTS]
    assert fast.generate(asked) == plain.generate(asked)


def test_long_sequences_whose_keys_are_read_in_parts() -> None:
    model = random_model("llama", max_position_embeddings=2048)
    sizes = {"tokens": 4096, "adapter_bytes": 2**16, "chunk": 256}
    plain, fast = (Engine(deepcopy(model).to(device), **sizes) for device in ("cpu", "cuda"))
    asked = [Request(tuple((7 * i + n) % 320 for i in range(900 + n)), new_tokens=10) for n in range(2)]
    assert fast.generate(asked) == plain.generate(asked)


def test_no_input_is_counted_twice_where_programs_share_them(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", intermediate_size=11008)
    plain, fast = pair(base, {"wide": export(base, "wide", tmp_path / "wide")})
    asked = [Request(PROMPT[: 3 + row], "wide", new_tokens=24) for row in range(16)]
    assert fast.generate(asked) == plain.generate(asked)


def test_draws_over_the_whole_vocabulary_are_those_of_the_cpu(base: Path, exported: dict[str, Exported]) -> None:
    plain, fast = pair(base, exported)
    asked = [
        Request(PROMPT[: 3 + row], name, new_tokens=6, temperature=0.5 + row % 3, seed=row, scores_answer=True)
        for row, name in enumerate(NAMES)
    ]
    for found, expected in zip(fast.answered(asked), plain.answered(asked), strict=True):
        assert found.answer == expected.answer
        assert found.scores == pytest.approx(expected.scores, abs=1e-3)
