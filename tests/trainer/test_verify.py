"""Where one more copy of a model is loaded to be compared, and what the comparison says."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from llamas import random_llama

from methods.options.full import Full
from methods.options.low_rank import Lora
from trainer import reload, verify

IDS = [torch.arange(30), torch.arange(5, 12)]


def run_of(model: Any, folder: Path, method: Any) -> Any:
    """As much of a run as the comparison reads."""
    attempt = SimpleNamespace(folder=folder, event=lambda *_, **__: None)
    world = SimpleNamespace(device=torch.device("cpu"))
    job = SimpleNamespace(method=method)
    objective = SimpleNamespace(scores=False)
    return SimpleNamespace(
        model=model, dtype=torch.float32, job=job, world=world, attempt=attempt, objective=objective
    )


def test_a_model_that_fits_nowhere_is_compared_layer_by_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "model")
    seen = verify.Observation(IDS, [verify._logits(model, ids) for ids in IDS])
    places: list[Any] = []

    def load(place: Any) -> Any:
        loaded = reload.load_whole_model(run, tmp_path / "model", place)
        places.append({str(parameter.device) for parameter in loaded.parameters()})
        return loaded

    run = run_of(model, tmp_path, Full())
    assert verify.compare_loaded(run, load, seen).holds
    monkeypatch.setattr(reload, "free_bytes", lambda: 60_000)
    assert verify.compare_loaded(run, load, seen).holds
    assert places == [{"cpu"}, {"meta"}]
    with torch.no_grad():
        model.model.norm.weight.mul_(1.001)
    model.save_pretrained(tmp_path / "model")
    assert not verify.compare_loaded(run, load, seen).holds


def test_an_adapter_whose_base_fits_nowhere_is_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reload, "free_bytes", lambda: 60_000)
    run = run_of(random_llama(), tmp_path, Lora())
    with pytest.raises(RuntimeError, match="one more copy of the model takes"), reload.space_for_copy(run):
        pass


def test_the_host_says_what_is_free() -> None:
    free = reload.free_bytes()
    assert free is not None and 0 < free < 2**50
