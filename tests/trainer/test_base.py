"""Loading a base: nothing but the base comes with it; and bases that are in 4 bits already are trained."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from finished_runs import curve, difference, events, loss_gap
from llamas import random_llama
from peft import PeftModel
from sampling import each_sampled
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from methods.options import KINDS
from methods.parts import quantised
from orchestrator.planning.model import locate, parameter_count
from runfolder.job import Base
from runfolder.record import load_job
from trainer.base import load_config, load_pretrained
from trainer.data.tokenizer import load_tokenizer

# Adam divides by sqrt(v) + eps: a small eps makes of the rounding of a gradient that is nearly zero a whole step.
SHORT: dict[str, Any] = {"steps": 4, "lr": 5e-3, "eps": 1e-4}


@pytest.fixture(scope="module")
def beside_an_adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base in a folder that also holds a LoRA, which changes all that the base says."""
    folder = tmp_path_factory.mktemp("both")
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(folder)
    adapter = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapter.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("zero", each_sampled([0, 3]))
def test_an_adapter_beside_the_base_changes_nothing(
    zero: int, beside_an_adapter: Path, new_run: Any, launch: Any, held_out: Path, cache: Path, tiny_base: Path
) -> None:
    methods = {"full": {"kind": "full"}, "lora": {"kind": "lora", "rank": 4, "target": ["k_proj"]}}
    common: dict[str, Any] = {
        "train": {"steps": 3},
        "data": {"eval": str(held_out)},
        "evaluation": {"max_new_tokens": 0},
        "sharding": {"zero": zero},
    }
    for kind, method in methods.items():
        plain = new_run(f"{kind} plain", **common, method=method)
        both = new_run(f"{kind} both", **common, method=method, base=str(beside_an_adapter))
        launch(2, plain, both)
        assert curve(both) == curve(plain)
        output = both / "output"
        if kind == "full":
            assert not (output / "adapter_config.json").exists()
            loaded = AutoModelForCausalLM.from_pretrained(output)
        else:
            loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), output)
            named = json.loads((output / "adapter_config.json").read_text())["target_modules"]
            assert all(name.endswith("k_proj") for name in named)
        assert loss_gap(loaded, both, cache) < 1e-6


def test_weights_that_lack_are_not_made_up(tmp_path: Path) -> None:
    random_llama(num_hidden_layers=1).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(ValueError, match=r"its weights lack model\.layers\.1\.\S+, .* \(9 in all\)$"):
        load_pretrained(Base(model=str(tmp_path)), torch.float32)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    model = random_llama()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="model.safetensors"):
        load_pretrained(Base(model=str(tmp_path)), torch.float32)


def test_code_of_a_base_is_not_run(tiny_base: Path, tmp_path: Path) -> None:
    for path in tiny_base.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "own.py").write_text("raise SystemExit('code of the base was run')")
    for name in ("config.json", "tokenizer_config.json"):
        found = json.loads((tmp_path / name).read_text())
        own = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoTokenizer": ["own.T", None]}
        (tmp_path / name).write_text(json.dumps(found | {"auto_map": own}))
    base = Base(model=str(tmp_path))
    assert len(load_tokenizer(base)) == load_pretrained(base, torch.float32).config.vocab_size
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "own"}))
    with pytest.raises(ValueError, match="it needs code of its own, which is never run"):
        load_config(base)


@pytest.fixture(scope="module")
def in_4_bits(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base as bitsandbytes and transformers save one in 4 bits."""
    folder = tmp_path_factory.mktemp("packed")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    AutoModelForCausalLM.from_pretrained(tiny_base, quantization_config=nf4, dtype=torch.bfloat16).save_pretrained(
        folder
    )
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(folder)
    return folder


IN_4_BITS = [kind for kind, options in KINDS.items() if options.on_4_bits]
SMALL: dict[str, dict[str, Any]] = {  # of these the options that are smaller than their defaults
    "lora": {"rank": 4},
    "rslora": {"rank": 4},
    "qlora": {"rank": 4},
    "adalora": {"rank": 2, "initial_rank": 4, "every": 1},
    "longlora": {"rank": 4},
    "vera": {"rank": 8},
    "fourierft": {"frequencies": 50},
    "prefix": {"tokens": 4},
    "prompt": {"tokens": 4},
    "ptuning": {"tokens": 4, "hidden": 16},
    "bottleneck": {"size": 4},
}


@pytest.fixture(scope="module")
def model(in_4_bits: Path) -> Any:
    found = locate(Base(model=str(in_4_bits)))
    assert found is not None
    return found


@pytest.mark.parametrize("kind", each_sampled(IN_4_BITS))
def test_a_base_in_4_bits_is_trained(
    kind: str, in_4_bits: Path, new_run: Any, launch: Any, held_out: Path, cache: Path, model: Any
) -> None:
    common: dict[str, Any] = {
        "base": str(in_4_bits),
        "method": {"kind": kind, **SMALL.get(kind, {})},
        "train": {**SHORT, "steps": 6},
        "data": {"eval": str(held_out)},
        "evaluation": {"max_new_tokens": 0},
    }
    alone = new_run("alone", **common)
    pair = new_run("pair", **common, sharding={"zero": 3})
    launch(1, alone)
    launch(2, pair)
    assert difference(curve(alone), curve(pair)) < 1e-6
    method = load_job(pair).method
    (plan,) = (event for event in events(pair) if event["event"] == "plan")
    assert plan["trained"] == method.trained_parameters(model.linears, model.other_shapes)
    if kind != "adalora":  # PEFT keeps the ranks of its modules as parameters
        assert plan["parameters"] == parameter_count(model.shapes) + method.added_parameters(
            model.linears, model.other_shapes
        )
    losses = [loss for loss, _ in curve(pair)]
    assert losses[-1] < losses[0]
    if "export" not in method.refusals:
        assert loss_gap(reload(in_4_bits, pair), pair, cache) < 1e-5


def reload(base: Path, run: Path) -> Any:
    """The output on its base, as plain PEFT and transformers load both, in fp32."""
    config = AutoConfig.from_pretrained(run / "output" if (run / "output" / "config.json").exists() else base)
    config.quantization_config["bnb_4bit_compute_dtype"] = "float32"
    packed = AutoModelForCausalLM.from_pretrained(base, config=config)
    quantised.cast_others(packed, torch.float32)  # saved in bf16
    for _, layer in quantised.four_bit_layers(packed):
        # In evaluation bitsandbytes computes in bf16 on some CPUs, and fails there for layers as narrow as these.
        layer.support_avx512bf16_for_cpu = False
    return PeftModel.from_pretrained(packed, run / "output")
