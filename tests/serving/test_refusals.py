"""Adapters that are broken, dangerous or for another base: one clear error each, and nobody else is disturbed."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import Exported, loaded, make_base
from safetensors.torch import load_file, save_file

from serving.engine import Engine
from serving.error import AdapterRefused, UnknownAdapter
from serving.format import read_adapter
from serving.sequence import Request

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def engine(base: Path, exported: dict[str, Exported]) -> Engine:
    """An engine in which one adapter serves."""
    engine = Engine(loaded(base), tokens=512, positions=128, adapter_bytes=2**20)
    engine.load("good", exported["lora"].folder)
    return engine


def weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[: len(raw) // 2])


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q}.lora_A.weight"][0, 0] = float("nan")


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (cut, "adapter_model.safetensors: found a broken or truncated file"),
    "pickle": (
        pickled,
        "found adapter_model.bin, a pickle, which could run code; allowed: adapter_model.safetensors",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "found no weights; allowed: adapter_model.safetensors"),
    "no config": (lambda f: (f / CONFIG).unlink(), "found no adapter_config.json or bottleneck_config.json"),
    "no json": (lambda f: (f / CONFIG).write_text("{"), "adapter_config.json: found no JSON"),
    "nan": (lambda f: weights(f, poison), r"found values in .*q_proj.lora_A.weight that are not finite"),
    "key missing": (lambda f: weights(f, lambda t: t.pop(f"{Q}.lora_B.weight")), "found no tensor .*q_proj.lora_B"),
    "both missing": (
        lambda f: weights(f, lambda t: [t.pop(f"{Q}.lora_{side}.weight") for side in "AB"]),
        "found no tensor .*layers.0.self_attn.q_proj.lora_A.weight, which its config asks for",
    ),
    "key too many": (
        lambda f: weights(f, lambda t: t.update({f"{Q}.lora_C.weight": torch.ones(1)})),
        "found .*lora_C.weight, which has no place on this base",
    ),
    "layer too many": (
        lambda f: weights(f, lambda t: t.update({f"{Q}.lora_A.weight".replace("0", "7"): torch.ones(4, 64)})),
        "found .*layers.7.*, which has no place on this base",
    ),
    "rank": (lambda f: config(f, r=3), "found .*lora_A.weight of shape 4 x 64; allowed on this base: 3 x 64"),
    "kind": (lambda f: config(f, peft_type="HIRA"), "found an adapter of kind hira; allowed: lora, adalora, ia3"),
    "bias": (lambda f: config(f, bias="all"), "bias: found 'all'; allowed: none"),
    "unknown": (lambda f: config(f, use_bdlora=True), "use_bdlora: found True; allowed: nothing, or null"),
    "oversized": (
        lambda f: weights(f, lambda t: [t.update({n: v.repeat(999, 1)}) for n, v in t.items() if "lora_A" in n]),
        "found .* of shape 3996 x 64; allowed on this base: 4 x 64",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_adapter_is_refused_and_the_others_serve_on(
    how: str, engine: Engine, exported: dict[str, Exported], tmp_path: Path
) -> None:
    break_it, said = BROKEN[how]
    folder = tmp_path / "broken"
    shutil.copytree(exported["lora"].folder, folder)
    break_it(folder)
    before = engine.generate([Request((1, 2, 3), "good", new_tokens=3)])
    with pytest.raises(AdapterRefused, match=said):
        engine.load("broken", folder)
    with pytest.raises(AdapterRefused):
        engine.load("good", folder)  # a name that is taken keeps what it had
    with pytest.raises(UnknownAdapter):
        engine.add(Request((1, 2, 3), "broken"))
    assert engine.generate([Request((1, 2, 3), "good", new_tokens=3)]) == before


def test_more_bytes_than_allowed_are_not_even_read(engine: Engine, exported: dict[str, Exported]) -> None:
    with pytest.raises(AdapterRefused, match=r"found \d+ bytes; allowed: at most 100"):
        read_adapter(exported["lora"].folder, engine.base, limit=100)
    small = Engine(engine.base.model, tokens=64, adapter_bytes=2**10)
    with pytest.raises(AdapterRefused, match=r"found an adapter of \d+ numbers; allowed: 256"):
        small.load("large", exported["lora"].folder)


def test_an_adapter_and_a_model_for_another_base_are_refused(
    base: Path, exported: dict[str, Exported], tmp_path: Path
) -> None:
    other = Engine(loaded(make_base(tmp_path / "wider", hidden_size=128)), tokens=64, adapter_bytes=2**20)
    for name, found in (("lora", "4 x 64"), ("prompt", "6 x 64"), ("bottleneck", "6 x 64"), ("ia3", "")):
        with pytest.raises(AdapterRefused, match=f"of shape .*{found}; allowed on this base: "):
            other.load(name, exported[name].folder)
    with pytest.raises(AdapterRefused, match="found .* of shape .*; allowed on this base: "):
        other.load("model", base)


def test_an_unknown_adapter_is_an_error_and_never_the_base(engine: Engine) -> None:
    with pytest.raises(UnknownAdapter, match="adapter: found 'nobody', which is not loaded; allowed: good"):
        engine.generate([Request((1, 2, 3), "good"), Request((1, 2, 3), "nobody")])
    assert engine.scheduler.idle
    with pytest.raises(UnknownAdapter):
        engine.unload("nobody")
