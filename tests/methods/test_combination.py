"""Combined adapters: PEFT's own results where it is right, the exact sum, and what the engine makes of them."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from llamas import random_llama
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from methods.parts.combination import Recipe, combine
from methods.parts.lora_folder import NotCombined, read_lora_folder, write_lora_folder
from orchestrator.combine import combine_adapters
from orchestrator.commands.serve import serve_app
from orchestrator.errors import InputError
from serving.engine import Engine
from serving.sequence import Request

WEIGHTS = [0.7, -0.4]
IDS = torch.tensor([[5, 9, 2, 7, 7, 1]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("combined") / "base"
    random_llama().save_pretrained(folder)
    return folder


def trained(base: Path, folder: Path, seed: int, **options: Any) -> Path:
    """A LoRA adapter with random weights, as PEFT saves it."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False} | options
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def parents(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("parents")
    return [trained(base, folder / "a", 1), trained(base, folder / "b", 2, lora_alpha=3, use_rslora=True)]


def by_peft(base: Path, parents: list[Path], how: str, **options: Any) -> Any:
    """The logits of PEFT's own combination."""
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), parents[0], "p0")
    for number, parent in enumerate(parents[1:], 1):
        model.load_adapter(parent, f"p{number}")
    names = [f"p{number}" for number in range(len(parents))]
    torch.manual_seed(0)
    model.add_weighted_adapter(names, WEIGHTS, "mixed", how, **options)
    model.set_adapter("mixed")
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits[0]


def of_folder(base: Path, folder: Path) -> Any:
    """The logits of an adapter that PEFT loads."""
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits[0]


@pytest.mark.parametrize(
    ("how", "peft_how", "options"),
    [
        ("cat", "cat", {}),
        ("linear", "linear", {}),
        ("svd", "svd", {"svd_rank": 4}),
        ("ties", "ties_svd", {"svd_rank": 4, "density": 0.5}),
    ],
)
def test_a_combination_is_that_of_peft(
    how: str, peft_how: str, options: dict[str, Any], base: Path, parents: list[Path], tmp_path: Path
) -> None:
    combination = combine([read_lora_folder(parent) for parent in parents], WEIGHTS, Recipe(how))
    write_lora_folder(combination.adapter, tmp_path / how)
    found, expected = of_folder(base, tmp_path / how), by_peft(base, parents, peft_how, **options)
    plain = of_folder(base, parents[0])
    assert (found - expected).abs().max() < 2e-4 * expected.std() < 0.1 * (found - plain).abs().max()
    engine = Engine(AutoModelForCausalLM.from_pretrained(base).eval(), tokens=64, adapter_bytes=2**18)
    engine.load("mixed", tmp_path / how)
    (served,) = engine.logits([Request(tuple(IDS[0].tolist()), "mixed")])
    assert (served - found).abs().max() < 1e-4 * found.std()


def test_what_a_report_says_is_so(parents: list[Path]) -> None:
    adapters = [read_lora_folder(parent) for parent in parents]
    exact = combine(adapters, WEIGHTS, Recipe("cat"))
    assert exact.distance < 1e-6
    assert combine(adapters, WEIGHTS, Recipe("svd", rank=8)).distance < 1e-5
    cut = combine(adapters, WEIGHTS, Recipe("svd", rank=4)).distance
    assert 0.1 < cut < combine(adapters, WEIGHTS, Recipe("svd", rank=2)).distance < 1
    assert combine(adapters, WEIGHTS, Recipe("linear")).distance > 0.5  # every A has met every B
    same = combine([adapters[0], adapters[0]], [1.0, -1.0], Recipe("svd"))
    assert same.cancelled == pytest.approx(1)
    assert combine([adapters[0], adapters[0]], [1.0, 2.0], Recipe("cat")).cancelled < 1e-6
    assert 0.2 < exact.cancelled < 0.8


def test_dare_keeps_the_sum_on_average_and_follows_its_seed(parents: list[Path]) -> None:
    adapters = [read_lora_folder(parent) for parent in parents]
    module = next(iter(adapters[0].updates))
    recipes = [Recipe("dare", rank=48, density=0.5, seed=seed) for seed in range(60)]
    drawn = [combine(adapters, WEIGHTS, recipe).adapter.updates[module].delta() for recipe in recipes]
    exact = combine(adapters, WEIGHTS, Recipe("cat")).adapter.updates[module].delta()
    assert (torch.stack(drawn).mean(0) - exact).norm() < 0.25 * exact.norm() < (drawn[0] - exact).norm()
    again = combine(adapters, WEIGHTS, recipes[0]).adapter.updates[module].delta()
    assert torch.equal(again, drawn[0]) and not torch.equal(drawn[1], drawn[0])


def test_layers_and_ranks_of_their_own_are_kept(base: Path, tmp_path: Path) -> None:
    first = trained(base, tmp_path / "first", 1, target_modules=["q_proj"], rank_pattern={"layers.0": 2})
    second = trained(base, tmp_path / "second", 2, target_modules=["q_proj", "o_proj"], r=3, alpha_pattern={"o": 1})
    adapters = [read_lora_folder(folder) for folder in (first, second)]
    write_lora_folder(combine(adapters, [1.0, 2.0], Recipe("cat")).adapter, tmp_path / "mixed")
    deltas = {}
    for name, folder in (("mixed", tmp_path / "mixed"), ("first", first), ("second", second)):
        deltas[name] = {module: factors.delta() for module, factors in read_lora_folder(folder).updates.items()}
    assert deltas["mixed"].keys() == deltas["second"].keys()
    for module, delta in deltas["mixed"].items():
        expected = 2.0 * deltas["second"][module]
        if module in deltas["first"]:
            expected = expected + deltas["first"][module]
        assert torch.allclose(delta, expected, atol=1e-6)
    of_folder(base, tmp_path / "mixed")
    assert json.loads((tmp_path / "mixed" / "adapter_config.json").read_text())["r"] == 7
    pruned = combine(adapters, [1.0, 2.0], Recipe("ties", rank=32, density=0.3)).adapter.updates
    alone = "model.layers.0.self_attn.o_proj"
    kept = pruned[alone].delta().abs() > 1e-6
    assert torch.allclose(pruned[alone].delta()[kept], 2.0 * deltas["second"][alone][kept], atol=1e-5)
    assert 0.25 < kept.float().mean() < 0.32
    with pytest.raises(NotCombined, match="found ranks 4 and 3; allowed for linear: one rank"):
        combine(adapters, [1.0, 1.0], Recipe("linear"))


def test_the_command_writes_an_adapter_and_says_what_it_did(parents: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "mixed"
    arguments = ["combine", "--out", str(out), f"{parents[0]}:0.7", f"{parents[1]}:0.3", "--how", "ties"]
    done = CliRunner().invoke(serve_app, arguments)
    assert done.exit_code == 0, done.output
    assert "combined as ties, rank 4;" in done.output and "no evaluation is known" in done.output
    assert load_file(out / "adapter_model.safetensors")
    report = json.loads((out / "combination.json").read_text())
    assert report["density"] == 0.5 and [parent["weight"] for parent in report["parents"]] == [0.7, 0.3]


def test_what_has_no_combination_is_refused(base: Path, parents: list[Path], tmp_path: Path) -> None:
    dora = trained(base, tmp_path / "dora", 3, use_dora=True)
    other = trained(base, tmp_path / "other", 3)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "another"}))
    first = f"{parents[0]}:1"
    for arguments, said in (
        ([first], "found 1 adapters; allowed: two or more"),
        ([first, f"{dora}:1"], "use_dora: found True; allowed: nothing, as it has no sum"),
        ([first, f"{other}:1"], "found adapters of several bases"),
        ([first, f"{base}:1"], "found no adapter_config.json; allowed: folders of LoRA adapters"),
        ([first, "b"], "found 'b'; allowed: ADAPTER:WEIGHT"),
        ([first, f"{parents[1]}:nan"], "allowed: ADAPTER:WEIGHT"),
    ):
        with pytest.raises(InputError, match=said):
            combine_adapters(tmp_path / "out", arguments, "cat")
    with pytest.raises(InputError, match="--how: found 'sum'; allowed: linear, cat, svd, ties, dare"):
        combine_adapters(tmp_path / "out", [first, first], "sum")
    with pytest.raises(InputError, match="which is there already"):
        combine_adapters(tmp_path, [first, first], "cat")
    assert not (tmp_path / "out").exists()
