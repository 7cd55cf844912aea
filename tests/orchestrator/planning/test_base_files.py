"""Bases that cannot be trained: each is refused with its own line, before anything is started."""

import json
from pathlib import Path
from typing import Any

import pytest
from jobs import CONFIG, make_base, make_job, write_weights

from orchestrator.errors import InputError
from orchestrator.planning.freeze import read_job
from orchestrator.planning.model import Model
from orchestrator.planning.plan import plan
from orchestrator.planning.preflight import check_job

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def refusal(folder: Path, **changes: Any) -> str:
    """The one line that a job on the base in a folder is refused with, less the folder's name."""
    with pytest.raises(InputError) as error:
        check_job(read_job(make_job(folder, **changes))[0])
    (line,) = str(error.value).splitlines()
    assert "scratch" not in line
    return line.removeprefix(f"base.model: {folder / 'base'}: ")


def configure(folder: Path, **changes: Any) -> None:
    """Change the config.json of the base in a folder; None takes a key out."""
    path = folder / "base" / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a whole base in `base`."""
    make_base(tmp_path / "base")
    return tmp_path


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (("pytorch_model.bin",), "found weights as pytorch_model.bin; only safetensors are read: convert them"),
        (("pytorch_model-1.bin", "pytorch_model-2.bin"), "found weights as pytorch_model-1.bin and 1 more; only"),
        (
            ("consolidated.00.pth",),
            "found weights as consolidated.00.pth; only safetensors are read: take the base in tran",
        ),
        (("tf_model.h5", "flax_model.msgpack"), "found weights as flax_model.msgpack and 1 more; only"),
        (("base-Q4_K_M.gguf",), "found only GGUF (base-Q4_K_M.gguf), which is not read; take the base that it was"),
        (("model-00001-of-00002.safetensors",), "found model-00001-of-00002.safetensors, but neither model.safeten"),
        (("adapter_config.json", "adapter_model.safetensors"), "found an adapter (adapter_config.json) and no base"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_weights_that_are_not_read(folder: Path, files: tuple[str, ...], expected: str) -> None:
    (folder / "base" / "model.safetensors").unlink()
    for name in files:
        (folder / "base" / name).write_bytes(b"{}")
    assert refusal(folder).startswith(expected)


def test_random_weights_are_named_only_where_all_else_is_there(folder: Path) -> None:
    (folder / "base" / "model.safetensors").unlink()
    (folder / "base" / "tokenizer.json").unlink()
    assert refusal(folder) == "no model.safetensors (nor its index) and no tokenizer"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ((), "no config.json; a base has one"),
        (("model.safetensors",), "found weights (model.safetensors) without config.json; take the whole folder"),
        (("a.gguf", "b.gguf"), "found only GGUF (a.gguf and 1 more), which is not read; take the base that it was"),
        (("merged/config.json",), "no config.json; there is one in merged in it"),
        (("output/config.json",), "no config.json; there is one in output in it"),
    ],
    ids=["empty", "weights", "gguf", "merged", "run"],
)
def test_folders_without_a_config(tmp_path: Path, files: tuple[str, ...], expected: str) -> None:
    (tmp_path / "base").mkdir()
    for name in files:
        path = tmp_path / "base" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"{}")
    assert refusal(tmp_path).startswith(expected)


@pytest.mark.parametrize("merged", [False, True])
def test_an_adapter_names_its_base(tmp_path: Path, merged: bool) -> None:
    (tmp_path / "base").mkdir()
    adapter = {"base_model_name_or_path": "owner/name", "peft_type": "LORA"}
    (tmp_path / "base" / "adapter_config.json").write_text(json.dumps(adapter))
    mend = "the model merged from both (output.merge)"
    if merged:
        make_base(tmp_path / "base" / "merged")
        mend = f"the merged model in {tmp_path / 'base' / 'merged'}"
    expected = f"found an adapter (adapter_config.json) and no base; name its base (owner/name), or {mend}"
    assert refusal(tmp_path) == expected


ENCODER = "an encoder: every token sees the whole text; allowed: a ...ForCausalLM model"
BOTH = "an encoder with a decoder; allowed: a ...ForCausalLM model"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, f"found BertForMaskedLM, {ENCODER}"),
        ({"model_type": "bert", "architectures": ["BertLMHeadModel"]}, f"found BertLMHeadModel, {ENCODER}"),
        ({"model_type": "roberta", "architectures": None}, f"found a model of type roberta, {ENCODER}"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, BOTH),
        ({"model_type": "bart", "architectures": None}, BOTH),
        ({"model_type": "new", "architectures": None, "is_encoder_decoder": True}, BOTH),
        (
            {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "vision_config": {"a": 1}},
            "found LlavaForConditionalGeneration, which reads more than text (vision_config)",
        ),
        ({"architectures": None, "vision_config": {"a": 1}}, "which reads more than text (vision_config)"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "found LlamaForSequenceClassification; allowed: a"),
        ({"architectures": ["LlamaModel"]}, "found LlamaModel; allowed: a ...ForCausalLM model"),
        ({"architectures": "LlamaForCausalLM"}, "config.json has architectures 'LlamaForCausalLM'; allowed: a list"),
        ({"model_type": None}, "config.json has no model_type"),
        (
            {"auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}, "model_type": "own"},
            "transformers h",
        ),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_what_is_no_causal_model_of_transformers(
    folder: Path, config: dict[str, Any], expected: str, weights: str
) -> None:
    (folder / "base" / "model.safetensors").rename(folder / "base" / weights)
    configure(folder, **config)
    assert expected in refusal(folder)


@pytest.mark.parametrize(
    "config",
    [{"architectures": None}, {"torch_dtype": "bfloat16"}, {"dtype": "float16"}, {"quantization_config": None}],
)
def test_configs_that_are_a_base(folder: Path, config: dict[str, Any]) -> None:
    configure(folder, **config)
    assert not plan(read_job(make_job(folder))[0]).warnings


def test_code_that_is_not_needed_is_not_run(folder: Path) -> None:
    configure(folder, auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"})
    (warning,) = plan(read_job(make_job(folder))[0]).warnings
    assert warning.endswith("its own code (auto_map) is not run; transformers' own llama is")


def test_an_adapter_beside_a_base_is_told(folder: Path) -> None:
    (folder / "base" / "adapter_config.json").write_text("{}")
    (warning,) = plan(read_job(make_job(folder, method="full", resources={}))[0]).warnings
    assert warning.endswith("it holds an adapter too (adapter_config.json), which is left out")
    with pytest.raises(InputError, match=r"it holds an adapter too .* with it; move that away"):  # beside another one
        plan(read_job(make_job(folder))[0])


def test_weights_of_another_config(folder: Path) -> None:
    configure(folder, hidden_size=64)
    assert refusal(folder) == ("its weights have model.embed_tokens.weight [96, 32]; config.json says [96, 64]")
    configure(folder, hidden_size=32, num_hidden_layers=3)
    assert "its weights lack model.layers.2.self_attn.q_proj.weight, and 8 more of the 30" in refusal(folder)


@pytest.mark.parametrize(
    ("quantisation", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bits"),
        ({**NF4, "bnb_4bit_quant_storage": "bfloat16"}, "bitsandbytes, 4 bits, stored as bfloat16"),
        ({"bits": 2}, "an unknown method"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_quantised_bases_are_refused_by_name(folder: Path, quantisation: dict[str, Any], name: str) -> None:
    configure(folder, quantization_config=quantisation)
    mend = "take the unquantised base, and method qlora"
    assert refusal(folder) == f"it is quantised already ({name}); {mend}"
    assert plan(read_job(make_job(folder, base={"model": "base", "init": "scratch"}))[0]).sizes is not None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        *(({"method": kind}, f"method.kind: found {kind}, and") for kind in ("full", "galore", "relora", "dora")),
        ({"method": {"kind": "lora", "init": "pissa", "rank": 2}}, "method.init: found pissa; allowed: default"),
        ({"method": {"kind": "qlora", "init": "loftq", "rank": 2}}, "method.init: found loftq, which needs the un"),
        ({"method": {"kind": "qlora", "quant": "fp4"}}, "method.quant: found fp4; allowed: nf4, which the base has"),
        ({"output": {"merge": True}}, "output.merge: the base is in 4 bits already, which hold no merged weights"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_a_base_in_4_bits_cannot_do(folder: Path, changes: dict[str, Any], expected: str) -> None:
    pack(folder / "base" / "model.safetensors")
    configure(folder, quantization_config=NF4)
    assert refusal(folder, **changes).startswith(expected)


def test_a_base_in_4_bits_is_counted_by_its_own_shapes(folder: Path) -> None:
    whole = plan(read_job(make_job(folder))[0]).sizes
    pack(folder / "base" / "model.safetensors")
    configure(folder, quantization_config=NF4)
    found = plan(read_job(make_job(folder))[0]).sizes
    assert whole is not None and found is not None
    assert (found.parameters, found.trained) == (whole.parameters, whole.trained)
    matrices = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48)
    assert found.held == matrices // 2 + 4 * matrices // 64
    assert found.memory.weights == whole.memory.weights - 4 * matrices + found.held


def pack(path: Path) -> None:
    """Rewrite weights of zeros as bitsandbytes keeps matrices in 4 bits: bytes, and the shape in a state of JSON."""
    model, tensors, states = Model(CONFIG), {}, {}
    for name, (out, in_) in model.linears.items():
        state = f"{name}.weight.quant_state.bitsandbytes__nf4"
        states[state] = json.dumps({"quant_type": "nf4", "shape": [out, in_]}).encode().ljust(64)
        tensors |= {f"{name}.weight": (out * in_ // 2, 1), f"{name}.weight.absmax": (out * in_ // 64,), state: (16,)}
    write_weights(path, model.other_shapes | tensors)
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    data = bytearray(content)
    for name, text in states.items():
        begin, end = (len(content) - sum_of(header) + offset for offset in header[name]["data_offsets"])
        assert end - begin == len(text)
        data[begin:end] = text
    path.write_bytes(bytes(data))


def sum_of(header: dict[str, Any]) -> int:
    """Bytes of all tensors."""
    return max(int(entry["data_offsets"][1]) for entry in header.values())


def test_weights_of_layers_that_the_config_does_not_have_are_named_and_not_counted(folder: Path) -> None:
    before = plan(read_job(make_job(folder))[0])
    shapes = Model(CONFIG, folder / "base").base_shapes
    more = {name.replace("layers.0", f"layers.{CONFIG['num_hidden_layers']}"): shapes[name] for name in shapes}
    write_weights(folder / "base" / "model.safetensors", shapes | more)
    after = plan(read_job(make_job(folder))[0])
    (warning,) = after.warnings
    assert (
        f"layers that config.json does not have are left out: model.layers.{CONFIG['num_hidden_layers']}." in warning
    )
    assert after.sizes == before.sizes


def test_a_config_that_says_4_bits_of_weights_that_are_not(folder: Path) -> None:
    configure(folder, quantization_config=NF4)
    assert refusal(folder).startswith("config.json says that it is in 4 bits (quantization_config), and its weights")
