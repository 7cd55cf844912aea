"""A tiny base, and an exported adapter of every kind for it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from adapters import ADAPTERS, Exported, export, make_base


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small take longer on several threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two layers."""
    return make_base(tmp_path_factory.mktemp("serving") / "base")


@pytest.fixture(scope="session")
def exported(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """The adapters by name, as runs leave them."""
    folder = tmp_path_factory.mktemp("adapters")
    return {name: export(base, name, folder / name) for name in ADAPTERS}


@pytest.fixture(scope="session")
def served(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """Adapters for the tiny base that has a tokenizer."""
    folder = tmp_path_factory.mktemp("served")
    return {name: export(tiny_base, name, folder / name) for name in ("lora", "dora", "prompt")}
