"""A whole model as an adapter of its base: exact where a rank holds the difference, else with what is left out."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import loaded
from safetensors.torch import load_file, save_file

from serving import whole
from serving.engine import Engine
from serving.error import AdapterRefused
from serving.format import digest_in_folder
from serving.sequence import Request

PROMPTS = [tuple((7 * row + 3 * i) % 320 for i in range(9 + row)) for row in range(3)]
Tensors = dict[str, torch.Tensor]


def changed_model(base: Path, folder: Path, rank: int | None, everything: bool = False) -> Path:
    """A model whose linear layers differ from the base's by matrices of this rank (None: any), or all its weights."""
    model = loaded(base)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj" in name:
                outputs, inputs = weight.shape
                inner = rank or min(outputs, inputs)
                weight += torch.randn(outputs, inner) @ torch.randn(inner, inputs) * 0.1 / inner**0.5
            elif everything:
                weight += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return folder


def scores_alone(folder: Path) -> list[list[float]]:
    """The log-likelihoods that a model gives to the tokens of the prompts, behind the first, by transformers."""
    model = loaded(folder)
    found = []
    for prompt in PROMPTS:
        with torch.no_grad():
            logits_TV = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        found.append([float(logits_TV[place - 1, prompt[place]]) for place in range(1, len(prompt))])
    return found


def scores_in(engine: Engine, name: str | None) -> list[list[float]]:
    return engine.log_likelihoods([Request(prompt, name, new_tokens=1) for prompt in PROMPTS], [1] * len(PROMPTS))


def assert_close(scores: list[list[float]], expected: list[list[float]], tolerance: float = 2e-5) -> None:
    for found, wanted in zip(scores, expected, strict=True):
        assert found == pytest.approx(wanted, abs=tolerance)


def engine_on(base: Path) -> Engine:
    return Engine(loaded(base), tokens=512, positions=64, adapter_bytes=2**22)


def test_a_model_of_which_all_weights_differ_is_computed_beside_its_base(base: Path, tmp_path: Path) -> None:
    folder = changed_model(base, tmp_path / "full", None, everything=True)
    engine = engine_on(base)
    assert engine.load("full", folder) == digest_in_folder(folder)
    assert engine.left_out("full") < 1e-5  # the layers are not wider than the rank that is kept
    alone = scores_alone(folder)
    assert_close(scores_in(engine, "full"), alone)
    of_base = scores_in(engine, None)
    assert_close(of_base, scores_alone(base))
    assert abs(alone[0][0] - of_base[0][0]) > 0.01, "nothing to tell apart"


@pytest.mark.parametrize("exact", [whole.EXACT, 0])  # all singular values, or those of a range drawn at random
def test_a_difference_of_low_rank_is_exact_and_another_says_what_is_left_out(
    exact: int, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole, "KEPT_RANK", 6)
    monkeypatch.setattr(whole, "EXACT", exact)
    engine = engine_on(base)
    merged, full = (changed_model(base, tmp_path / name, rank) for name, rank in (("merged", 5), ("full", None)))
    engine.load("merged", merged)
    assert engine.left_out("merged") < 1e-4
    assert_close(scores_in(engine, "merged"), scores_alone(merged))
    engine.load("full", full)
    kept, share = truncated(load_file(base / "model.safetensors"), load_file(full / "model.safetensors"), 6)
    assert engine.left_out("full") == pytest.approx(share, rel=0.02) and 0.3 < share < 1
    if exact:
        shutil.copytree(full, tmp_path / "kept")
        save_file(kept, tmp_path / "kept" / "model.safetensors", metadata={"format": "pt"})
        assert_close(scores_in(engine, "full"), scores_alone(tmp_path / "kept"))


def truncated(of_base: Tensors, of_model: Tensors, rank: int) -> tuple[Tensors, float]:
    """A model's weights with the differences of its linear layers cut to a rank, and the share that is left out."""
    kept, squares, left = dict(of_model), 0.0, 0.0
    for name in of_model:
        if "_proj" in name:
            change = (of_model[name] - of_base[name]).double()
            u, s, v = torch.linalg.svd(change, full_matrices=False)
            kept[name] = (of_base[name] + (u[:, :rank] * s[:rank]) @ v[:rank]).float().contiguous()
            squares += float(s.square().sum())
            left += float(s[rank:].square().sum())
    return kept, (left / squares) ** 0.5


def test_a_model_that_is_the_base_changes_nothing_and_takes_no_space(base: Path) -> None:
    engine = engine_on(base)
    engine.load("same", base)
    packed = engine.pool.packed_of("same")
    assert packed.size == 0 and packed.adapter.embed_VD is None and packed.adapter.left_out == 0
    assert scores_in(engine, "same") == scores_in(engine, None)


def without_a_layer(tensors: Tensors) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def with_another(tensors: Tensors) -> None:
    tensors["model.layers.2.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].clone()


def not_finite(tensors: Tensors) -> None:
    tensors["model.norm.weight"][3] = torch.nan


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (without_a_layer, "found no tensor model.layers.1.mlp.up_proj.weight"),
        (with_another, "found model.layers.2.mlp.up_proj.weight, which has no place on this base"),
        (not_finite, "found values in model.norm.weight that are not finite"),
    ],
)
def test_a_broken_model_is_refused(break_it: Any, said: str, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    break_it(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterRefused, match=said):
        engine_on(base).load("broken", folder)


def test_a_quantised_or_truncated_model_is_refused(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "quantised"
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))
    engine = engine_on(base)
    with pytest.raises(AdapterRefused, match="found quantised weights"):
        engine.load("quantised", folder)
    (folder / "config.json").write_text(json.dumps(config))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(AdapterRefused, match="found a broken or truncated file"):
        engine.load("truncated", folder)
