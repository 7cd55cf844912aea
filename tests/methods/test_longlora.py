"""LongLoRA beyond the base's positions: against PEFT alone with the paper's pattern as masks, at every ZeRO stage."""

import json
import random
from pathlib import Path
from typing import Any

import by_hand
import peft
import pytest
import torch
from finished_runs import Curve, curve, difference, interrupted, loss_gap
from sampling import method_sampled
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from methods.base import UNSHARDED, Setup
from methods.longlora import LongLoraTuning
from methods.options.low_rank_long import LongLora
from methods.parts.weights import shapes
from orchestrator.errors import InputError
from orchestrator.planning.model import Model
from orchestrator.planning.preflight import check_job
from runfolder.job import Job
from runfolder.record import load_job

SEQ_LEN, GROUPS, FACTOR = 320, 8, 2  # the base has 256 positions
METHOD = {"kind": "longlora", "rank": 4, "groups": GROUPS}
RATE = 2e-3


@pytest.fixture(scope="module")
def long_sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sums of up to 80 numbers: documents from a fraction of a group to more than the base's positions."""
    rng = random.Random(1)
    rows = [[rng.randrange(100) for _ in range(rng.choice((3, 10, 30, 80)))] for _ in range(120)]
    text = [{"prompt": " + ".join(map(str, row[:2])), "completion": " + ".join(map(str, row))} for row in rows]
    path = tmp_path_factory.mktemp("long") / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in text))
    return path


@pytest.fixture(scope="module")
def bases(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bases with two matrices for the embeddings, and with one; large weights make attention matter."""
    folders = {}
    for name in ("untied", "tied"):
        config = AutoConfig.from_pretrained(tiny_base, tie_word_embeddings=name == "tied", initializer_range=0.2)
        torch.manual_seed(0)
        folders[name] = tmp_path_factory.mktemp(name)
        AutoModelForCausalLM.from_config(config).save_pretrained(folders[name])
        AutoTokenizer.from_pretrained(tiny_base).save_pretrained(folders[name])
    return folders


@pytest.fixture
def long_run(new_run: Any, long_sums: Path, tmp_path: Path) -> Any:
    """Make a run beyond the base's positions."""
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text("\n".join(long_sums.read_text().splitlines()[:12]))

    def make(name: str, **parts: Any) -> Path:
        parts["data"] = {"train": str(long_sums), "eval": str(held_out), "seq_len": SEQ_LEN} | parts.get("data", {})
        parts["train"] = {"batch_tokens": 1000, "lr": RATE} | parts.get("train", {})
        run_dir: Path = new_run(name, method=METHOD, evaluation={"max_new_tokens": 0, "before": False}, **parts)
        return run_dir

    return make


def pattern(length: int) -> torch.Tensor:
    """Which keys each head's queries see in a document, [1, H, T, T]."""
    group = -(-SEQ_LEN // GROUPS)
    at_T = torch.arange(length)
    causal = at_T[:, None] >= at_T
    halves = [causal & ((at_T[:, None] + c) // group == (at_T + c) // group) for c in (0, group // 2)]
    return torch.stack([halves[0], halves[0], halves[1], halves[1]])[None]


def reference(run_dir: Path, cache: Path) -> tuple[Curve, int]:
    """The same job in plain PEFT: its curve, and the number of trained weights."""
    config = AutoConfig.from_pretrained(load_job(run_dir).base.model)
    config.rope_parameters = {"rope_theta": 10000.0, "rope_type": "linear", "factor": float(FACTOR)}
    lora = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        modules_to_save=["embed_tokens", "input_layernorm", "post_attention_layernorm", "norm"],
        ensure_weight_tying=bool(config.tie_word_embeddings),
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(by_hand.base(run_dir, config=config), lora)
    points = by_hand.train(run_dir, cache, model, by_hand.adamw(model), mask=pattern)
    return points, sum(p.numel() for p in model.parameters() if p.requires_grad)


def reloaded(output: Path, base: Path) -> list[torch.nn.Module]:
    """The adapter on the base with the exported config, as its docs say, and the merged model."""
    plain = AutoModelForCausalLM.from_pretrained(base, config=AutoConfig.from_pretrained(output))
    return [peft.PeftModel.from_pretrained(plain, output), AutoModelForCausalLM.from_pretrained(output / "merged")]


def check_output(run_dir: Path, base: Path, cache: Path) -> None:
    """The exported adapter and the merged model have the loss that the trainer had, and a dense attention."""
    tied = AutoConfig.from_pretrained(base).tie_word_embeddings
    for model in reloaded(run_dir / "output", base):
        assert loss_gap(model, run_dir, cache) < 1e-6
        assert model.config._attn_implementation == "sdpa"
        assert model.config.max_position_embeddings == 512
        assert model.config.rope_parameters["rope_type"] == "linear"
        head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        assert torch.equal(head, embedding) == tied
    without = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run_dir / "output")
    assert loss_gap(without, run_dir, cache) > 1e-4  # the config matters


LAYOUTS: dict[str, dict[str, Any]] = {
    "untied-0": {"sharding": {"zero": 0}, "data": {"packing": False}, "train": {"micro_batch": 3}},
    "untied-2": {"sharding": {"zero": 2}, "train": {"gradient_checkpointing": True}},
    "untied-3": {"sharding": {"zero": 3}, "train": {"gradient_checkpointing": True}},
    "tied-3": {"sharding": {"zero": 3}, "train": {"micro_batch": 2}},
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("layouts", method_sampled("longlora", list(LAYOUTS)))
def test_every_layout_equals_peft_alone_and_its_output_loads(
    layouts: list[str], long_run: Any, launch: Any, bases: dict[str, Path], cache: Path
) -> None:
    base = {name: bases[name.split("-")[0]] for name in layouts}
    common = {"output": {"merge": True}, "checkpoint": {"every": 5}}
    runs = {name: long_run(name, base=str(base[name]), **common, **LAYOUTS[name]) for name in layouts}
    launch(2, *runs.values())
    expected = {base[name]: reference(run, cache) for name, run in runs.items()}
    for name, run in runs.items():
        points, trained = expected[base[name]]
        assert difference(curve(run), points) < 1e-6, name
        options = load_job(run).method
        model = AutoModelForCausalLM.from_pretrained(base[name])
        assert options.trained_parameters(*shapes(model, UNSHARDED)) == trained
        header = Model(json.loads((base[name] / "config.json").read_text()), base[name])
        assert options.trained_parameters(header.linears, header.other_shapes) == trained
        check_output(run, base[name], cache)
    again = {name: interrupted(runs[name], f"again-{name}", 5) for name in layouts}
    launch(2, *again.values())
    for name, run in again.items():
        assert curve(run, 2) == curve(runs[name])[5:]


def tuning(seq_len: int, **options: Any) -> LongLoraTuning:
    """A method for sequences of this length."""
    return LongLoraTuning(LongLora(**options), Setup(seq_len=seq_len))


def test_positions_are_reached_as_asked() -> None:
    config = LlamaConfig(max_position_embeddings=256)
    assert tuning(256).load_options(config) == {}  # the attention is replaced when the model is there
    assert config.rope_parameters["rope_type"] == "default" and config.max_position_embeddings == 256
    assert tuning(600, groups=1).load_options(config) == {}
    assert config.rope_parameters == {"rope_theta": 10000.0, "rope_type": "linear", "factor": 3.0}
    assert config.max_position_embeddings == 768
    config = LlamaConfig(max_position_embeddings=256)
    tuning(512, rope="yarn").load_options(config)
    assert config.rope_parameters["original_max_position_embeddings"] == 256
    assert config.rope_parameters["rope_type"] == "yarn" and config.rope_parameters["factor"] == 2.0


def test_scaled_positions_are_not_scaled_again() -> None:
    config = LlamaConfig(max_position_embeddings=256, rope_parameters={"rope_type": "linear", "factor": 2.0})
    with pytest.raises(ValueError, match="data.seq_len: found 300; allowed: at most 256"):
        tuning(300).load_options(config)
    for scaled in (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
    ):
        LongLora().check(scaled | {"max_position_embeddings": 256}, 256)
        with pytest.raises(ValueError, match="are scaled already"):
            LongLora().check(scaled | {"max_position_embeddings": 256}, 257)
    LongLora().check({"max_position_embeddings": 256, "rope_scaling": None, "rope_theta": 1e4}, 257)


def test_an_attention_that_groups_cannot_stand_for_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot cap attention's logits, as this base does; nearest: lora"):
        LongLora().check({"attn_logit_softcapping": 50.0}, 64)
    LongLora(groups=1).check({"attn_logit_softcapping": 50.0}, 64)
    narrow = {"sliding_window": 16}
    LongLora().check(narrow, 64)
    LongLora().check(narrow | {"use_sliding_window": False}, 65)
    with pytest.raises(ValueError, match="found 65; allowed: at most 64, in 4 groups of the 16 tokens"):
        LongLora().check(narrow, 65)


def test_one_group_is_dense(tiny_base: Path) -> None:
    method = tuning(64, groups=1)
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    attached = method.attach(model).train()
    assert model.config._attn_implementation == "sdpa"
    plain = AutoModelForCausalLM.from_pretrained(tiny_base)
    ids = torch.randint(3, 100, (2, 64))
    assert torch.equal(attached(ids).logits, plain(ids).logits)


def test_preflight_lets_it_go_beyond_the_base(tiny_base: Path, long_sums: Path) -> None:
    def job(**method: Any) -> Job:
        data = {"train": str(long_sums), "seq_len": SEQ_LEN}
        return Job.model_validate({"base": str(tiny_base), "method": method, "data": data, "train": {"steps": 1}})

    check_job(job(kind="longlora"))
    with pytest.raises(InputError, match="data.seq_len: found 320; allowed: at most 256"):
        check_job(job(kind="lora"))
