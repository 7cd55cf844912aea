"""Methods on bases that are no Llama: other names, biases, tied and transposed weights, attention, experts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from campaign import METHODS, TRAIN, merges, output_gaps
from finished_runs import events
from llamas import TWO_LAYERS
from sampling import sampled
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    FalconConfig,
    GPT2Config,
    GPTJConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
)

from methods.base import Setup
from methods.registry import create
from orchestrator.planning.model import locate
from runfolder.job import Base, Job
from runfolder.record import load_job
from trainer.base import load_model
from trainer.data.tokenizer import load_tokenizer

CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "qwen2": (Qwen2Config, TWO_LAYERS | {"tie_word_embeddings": True}),
    "gpt2": (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "phi3": (Phi3Config, TWO_LAYERS),
    "mixtral": (MixtralConfig, TWO_LAYERS | {"num_local_experts": 4, "head_dim": 8}),
    "gptj": (GPTJConfig, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 8}),
    "falcon": (FalconConfig, {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
}
LACKING = {  # what such a base has under other names, or not at all
    ("gpt2", "longlora"): "q_proj",
    ("gpt2", "ia3"): "k_proj",
    ("gpt2", "prefix"): "k_proj and v_proj",
    ("gpt2", "bottleneck"): "down_proj",
    ("phi3", "longlora"): "q_proj",
    ("phi3", "ia3"): "k_proj",
    ("phi3", "prefix"): "k_proj and v_proj",
    ("mixtral", "ia3"): "down_proj",
    ("mixtral", "bottleneck"): "down_proj",
    ("gptj", "longlora"): "longlora cannot change the attention",
    ("gptj", "ia3"): "down_proj",
    ("gptj", "prefix"): "prefix cannot change the attention of a base of type gptj; nearest: prompt",
    ("gptj", "bottleneck"): "down_proj",
    ("falcon", "longlora"): "longlora cannot change the attention",
    ("falcon", "ia3"): "k_proj",
    ("falcon", "prefix"): "k_proj and v_proj",
    ("falcon", "bottleneck"): "down_proj",
    ("falcon", "qlora"): "bitsandbytes cannot keep .*, a FalconLinear, in 4 bits; nearest: lora",
}


FEW, WHOLE = sampled(list(METHODS), 6)
CASES = [
    pytest.param("gpt2", *FEW.values, id="gpt2-sample"),
    *(pytest.param(name, *WHOLE.values, id=name, marks=pytest.mark.matrix) for name in CONFIGS),
]


@pytest.fixture
def base(request: pytest.FixtureRequest, tiny_base: Path, tmp_path: Path) -> Path:
    """A random base of a family, in a folder of its name."""
    return make(request.param, tiny_base, tmp_path)


def make(name: str, tiny_base: Path, folder: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    family, shape = CONFIGS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family(vocab_size=len(tokenizer), **shape, **special))
    for saved in (model, tokenizer):
        saved.save_pretrained(folder / name)
    return folder / name


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("base", "kinds"), CASES, indirect=["base"])
def test_what_was_trained_is_counted_and_loads(
    kinds: list[str], base: Path, new_run: Any, launch: Any, held_out: Path, cache: Path
) -> None:
    kinds = [kind for kind in kinds if (base.name, kind) not in LACKING]
    runs = {
        kind: new_run(
            f"{kind} {base.name}",
            base=str(base),
            method=METHODS[kind],
            data={"eval": str(held_out), "packing": base.name != "falcon"},
            train={"steps": 4, **TRAIN[kind]},
            sharding={"zero": 3},
            evaluation={"max_new_tokens": 0, "before": False},
            output={"merge": merges(kind)},
        )
        for kind in kinds
    }
    launch(2, *runs.values())
    model = locate(Base(model=str(base)))
    assert model
    for kind, run in runs.items():
        (plan,) = (event for event in events(run) if event["event"] == "plan")
        assert plan["trained"] == load_job(run).method.trained_parameters(model.linears, model.other_shapes), kind
        gaps = output_gaps(kind, run, cache)
        assert max(gaps.values(), default=0.0) < 1e-5, (kind, gaps)


@pytest.mark.parametrize(("family", "kind"), LACKING)
def test_what_a_base_lacks_is_said(family: str, kind: str, tiny_base: Path, tmp_path: Path) -> None:
    base = make(family, tiny_base, tmp_path)
    job = Job.model_validate(
        {"base": str(base), "method": METHODS[kind], "data": {"train": "-"}, "train": {"steps": 1}}
    )
    method = create(job.method, Setup(1, 0, 64, load_tokenizer(job.base)))
    with pytest.raises(ValueError, match=LACKING[family, kind]):
        load_model(job, method, torch.float32, torch.device("cpu"))
