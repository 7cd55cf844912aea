"""Sizes and layouts, against models that transformers and PEFT make of the same configs."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jobs import CONFIG, make_base, make_job, write_weights
from llamas import LLAMA_3B

from methods.options.low_rank import Dora, Lora
from methods.options.subspace import Galore
from orchestrator.errors import InputError
from orchestrator.planning.freeze import read_job
from orchestrator.planning.generations import generations
from orchestrator.planning.model import Model, parameter_count, read_header, weight_files
from orchestrator.planning.plan import plan
from orchestrator.planning.preflight import check_job
from orchestrator.planning.sizes import Memory, memory, planned_kernels, sizes
from orchestrator.terminal.fit_text import generation_fields
from runfolder.job import Job

SMALL = {key: value for key, value in CONFIG.items() if key not in ("architectures", "model_type")}


def job(**changes: Any) -> Job:
    found = {"base": "some/base", "data": "/x.jsonl", "train": {"steps": 3}, **changes}
    return Job.model_validate(found)


def test_llama_3b_with_lora_on_two_projections() -> None:
    model = Model(LLAMA_3B)
    found = sizes(job(method={"kind": "lora", "rank": 32, "target": ["q_proj", "v_proj"]}), model)
    assert found is not None
    assert parameter_count(model.shapes) == 3_212_749_824
    assert found.trained == 9_175_040
    assert found.parameters == 3_212_749_824 + 9_175_040


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "llama"},
        {"model_type": "llama", "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        {"model_type": "mistral", "head_dim": 16},
        {"model_type": "qwen2"},
        {"model_type": "qwen3", "head_dim": 16, "attention_bias": True},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_shapes_from_the_config_are_those_of_transformers(changes: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {**SMALL, **changes}
    with torch.device("meta"):
        real = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert Model(config).shapes == {name: tuple(p.shape) for name, p in real.named_parameters()}


@pytest.mark.parametrize("target", ["all-linear", ("q_proj", "down_proj")])
@pytest.mark.parametrize("options", [Lora, Dora])
def test_trained_parameters_are_those_of_peft(options: Any, target: Any) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    from methods.registry import create

    config = {**SMALL, "model_type": "llama"}
    chosen = options(rank=4, target=target)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    adapted = create(chosen).attach(base.to_empty(device="cpu"))
    model = Model(config)
    assert chosen.trained_parameters(model.linears, model.other_shapes) == sum(
        p.numel() for p in adapted.parameters() if p.requires_grad
    )


def test_bytes_per_worker_fall_with_the_stage() -> None:
    def found(zero: int, held: int = 0) -> Memory:
        return memory(shared=1000, held=held, trained=8, state=(64, 0), zero=zero, world_size=4)

    assert found(0) == Memory(1032, 32, 64)
    assert found(1) == Memory(1032, 32, 24)
    assert found(2) == Memory(1032, 8, 24)
    assert found(3) == Memory(258, 8, 24)
    assert found(3, held=500) == Memory(758, 8, 24)
    assert memory(shared=0, held=0, trained=9, state=(72, 5), zero=1, world_size=2).optimizer == 4 * 5 + 36 + 5


def test_moments_on_the_host_take_nothing_of_the_device() -> None:
    model = Model({**SMALL, "model_type": "llama"})

    def found(zero: int, where: str) -> Memory:
        sharding = {"zero": zero, "offload": where}
        of_job = sizes(job(method="full", sharding=sharding, resources={"workers_per_node": 2}), model)
        assert of_job is not None
        return of_job.memory

    whole = found(0, "none")
    assert found(0, "optimizer") == Memory(whole.weights, whole.gradients, 0, whole.optimizer)
    for zero in (1, 2, 3):
        there = found(zero, "none")
        assert found(zero, "optimizer") == Memory(there.weights, there.gradients, 0, whole.optimizer // 2)


def test_frozen_weights_are_bf16_on_gpus_and_fp32_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    model = Model({**SMALL, "model_type": "llama"})
    frozen = 4 * parameter_count(model.shapes)
    lora = {"kind": "lora", "rank": 1}
    on_cpu = sizes(job(method=lora, resources={"workers_per_node": 2}), model)
    on_gpu = sizes(job(method=lora, resources={"gpus_per_node": 2}), model)
    assert on_cpu is not None and on_gpu is not None
    assert on_cpu.memory.weights == frozen + 4 * on_cpu.trained
    assert on_gpu.memory.weights == frozen // 2 + 4 * on_cpu.trained


@pytest.mark.parametrize(
    ("resources", "zero", "wanted", "expected"),
    [
        ({"workers_per_node": 2}, 0, "auto", "plain"),
        ({"workers_per_node": 2}, 0, "fast", "fast"),
        ({"gpus_per_node": 2}, 2, "auto", "fast"),
        ({"gpus_per_node": 2}, 2, "plain", "plain"),
        ({"gpus_per_node": 2}, 3, "auto", "fast"),
    ],
)
def test_kernels_are_fast_on_gpus(
    resources: Any, zero: int, wanted: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    train = {"steps": 3, "kernels": wanted}
    found = job(method={"kind": "lora"}, resources=resources, sharding={"zero": zero}, train=train)
    assert planned_kernels(found) == expected


def test_whole_models_at_zero_3_are_plain_unless_asked() -> None:
    common: Any = {"method": {"kind": "full"}, "resources": {"gpus_per_node": 2}, "sharding": {"zero": 3}}
    plain, fast = (job(**common, train={"steps": 3, "kernels": wanted}) for wanted in ("auto", "fast"))
    assert (planned_kernels(plain), planned_kernels(fast)) == ("plain", "fast")


def test_at_zero_3_few_trained_weights_are_whole_and_many_are_shared() -> None:
    model = Model({**SMALL, "model_type": "llama"})
    frozen = 4 * parameter_count(model.shapes)
    for rank, share in ((1, 1), (64, 2)):
        found = sizes(
            job(method={"kind": "lora", "rank": rank}, resources={"workers_per_node": 2}, sharding={"zero": 3}),
            model,
        )
        assert found is not None
        assert found.memory.weights == frozen // 2 + 4 * found.trained // share


def a_job(tmp_path: Path, **changes: Any) -> Job:
    """A job that would run, with absolute paths."""
    return read_job(make_job(tmp_path, **changes))[0]


def problems(job: Job) -> list[str]:
    with pytest.raises(InputError) as error:
        plan(job)
    return str(error.value).splitlines()


def test_a_plan_counts_what_would_run(tmp_path: Path) -> None:
    found = plan(a_job(tmp_path, train={"epochs": 4, "batch_tokens": 20}, method="full", sharding={"zero": 2}))
    assert (found.workers, found.rows, found.eval_rows, found.zero) == (2, 3, None, 2)
    assert (found.steps, found.steps_estimated) == (6, True)  # 3 rows of 10 tokens each: 120 tokens in batches of 20
    assert found.micro_batches == 1
    assert found.sizes is not None
    assert found.sizes.trained == found.sizes.parameters
    assert found.sizes.memory.total == 4 * found.sizes.trained + (4 + 12) * found.sizes.trained // 2


def test_a_plan_warns_of_more_moments_than_this_machine_has_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = {"steps": 3, "batch_tokens": 20}
    planned = a_job(tmp_path, train=train, method="full", sharding={"offload": "optimizer"})
    assert not any("sharding.offload" in warning for warning in plan(planned).warnings)
    monkeypatch.setattr("orchestrator.planning.place.host_bytes", lambda: 1000)
    (warning,) = (warning for warning in plan(planned).warnings if "sharding.offload" in warning)
    assert "for moments of its workers; found 0.0 GiB on this machine" in warning


def test_a_plan_says_the_learning_rate_and_where_it_comes_from(tmp_path: Path) -> None:
    def rate(**changes: Any) -> tuple[float, str]:
        found = plan(a_job(tmp_path, **changes))
        return found.lr, found.lr_source

    steps = {"steps": 3, "batch_tokens": 20}
    width = CONFIG["hidden_size"]
    default = Lora().rate(width)
    assert default > Lora.default_lr
    assert rate(method="lora", train=steps) == (default, f"default of lora at hidden size {width}")
    assert rate(method="galore", train=steps) == (Galore.default_lr, "default of galore")
    assert rate(method="lora", train={**steps, "lr": 0.5}) == (0.5, "train.lr")


def test_a_plan_says_what_an_objective_needs_and_which_pairs_teach_nothing(tmp_path: Path) -> None:
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    rows = [pair, pair | {"rejected": "b"}, pair]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = {"steps": 3, "batch_tokens": 20}
    data = {"train": "pairs.jsonl", "seq_len": 16}
    found = plan(a_job(tmp_path, objective="dpo", method="lora", data=data, train=train))
    width = CONFIG["hidden_size"]
    assert (found.objective, found.rows) == ("dpo", 3)
    assert found.needs.startswith("one forward pass over all answers before the first step")
    assert found.lr == pytest.approx(0.05 * Lora().rate(width))
    assert found.lr_source == f"0.05 times the default of lora at hidden size {width}, for dpo"
    left_out = "data.train: 1 pairs (first: row 2) have two answers that are the same: left out"
    assert left_out in found.warnings


def test_a_plan_counts_what_a_job_writes_and_its_caches(tmp_path: Path) -> None:
    model = Model(LLAMA_3B)
    written = {"kind": "grpo", "samples": 8, "new_tokens": 256, "updates": 2}
    grpo = job(objective=written, method="lora", train={"steps": 3, "batch_tokens": 6400, "precision": "bf16"})
    sized = sizes(grpo, model)
    survey = SimpleNamespace(tokens=1000, learned=200, examples=10)
    rows: Any = SimpleNamespace(survey=survey)
    found = generations(grpo, model, sized, rows, "gpu", "NVIDIA H200")
    assert found is not None
    assert (found.prompts, found.answers, found.tokens, found.learned) == (64, 512, 131_072, 512 * (256 + 80))
    of_token = 2 * 28 * 8 * 128 * 2  # keys and values, layers, heads, size, bytes
    assert found.cache_bytes == of_token * min(512 * grpo.data.seq_len, 2**33 // of_token)
    assert found.share is not None and 0.1 < found.share < 0.5
    each_step = job(objective=written | {"updates": 1}, method="lora", train={"steps": 3, "batch_tokens": 6400})
    once = generations(each_step, model, sized, rows, "gpu", "NVIDIA H200")
    assert once is not None and once.share is not None and once.share > found.share
    unknown = generations(grpo, model, sized, rows, "gpu", None)
    assert unknown is not None and unknown.share is None
    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    judged = job(objective={"kind": "rloo", "reward": "model", "reward_model": str(tmp_path)}, method="lora")
    with_judge = generations(judged, model, sized, rows, "gpu", None)
    assert with_judge is not None
    lines = generation_fields(with_judge)
    assert lines["reward model"].startswith("100 B on each worker")
    assert generation_fields(found)["it writes"] == (
        "512 answers to about 64 prompts every 2 steps: at most 131,072 tokens, 172,032 with their prompts"
    )
    assert generations(job(), model, sized, rows, "gpu", None) is None
    shorter = grpo.model_copy(update={"data": grpo.data.model_copy(update={"seq_len": 200})})
    cut = generations(shorter, model, sized, rows, "gpu", None)
    assert cut is not None
    assert (cut.tokens, cut.learned) == (512 * 119, 512 * (119 + 80))


def test_a_plan_tells_of_prompts_that_leave_little_or_are_none(tmp_path: Path) -> None:
    data = {"train": "rows.jsonl", "seq_len": 16}
    grpo = a_job(tmp_path, objective={"kind": "grpo", "new_tokens": 15}, method="lora", data=data)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    told = "objective.new_tokens: found 15; a prompt of 1 tokens leaves room for 14 in data.seq_len 16, and"
    assert [text for text in plan(grpo).warnings if text.startswith(told)], plan(grpo).warnings
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    where = tmp_path / "rows.jsonl"
    assert problems(grpo) == [f"data.train: {where}, row 1: found no prompt, allowed: rows with a prompt to answer"]


def test_a_sequence_longer_than_the_base_knows(tmp_path: Path) -> None:
    data = {"train": "train.jsonl", "seq_len": 128}
    assert problems(a_job(tmp_path, data=data)) == [
        "data.seq_len: found 128; allowed: at most 64 (positions of the base)",
        "train.batch_tokens: found 16; allowed: at least one sequence (data.seq_len 128)",
    ]


def test_a_target_that_the_base_does_not_have(tmp_path: Path) -> None:
    (line,) = problems(a_job(tmp_path, method={"kind": "lora", "target": ["q_proj", "query"]}))
    assert line.startswith("method: found 'query', which the base does not have; allowed: down_proj, ")
    assert "q_proj" in line


def test_warnings_are_no_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = plan(a_job(tmp_path, train={"steps": 1, "batch_tokens": 31, "precision": "bf16"}))
    assert [warning.split(": ")[0] for warning in found.warnings] == [
        "train.precision",
        "train.batch_tokens",
    ]
    assert found.precision == "bf16"


def test_a_bad_row_and_a_bad_base_are_told_together(tmp_path: Path) -> None:
    good = a_job(tmp_path)
    Path(good.data.train).write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    (tmp_path / "base" / "tokenizer.json").unlink()
    row, base = problems(good)
    assert row.startswith("data.train: ") and "row 2" in row
    assert base.startswith("base.model: ") and "no tokenizer" in base


def test_weights_that_are_cut_short(tmp_path: Path) -> None:
    good = a_job(tmp_path)
    path = tmp_path / "base" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    (line,) = problems(good)
    assert line.endswith("damaged or cut short")
    path.write_bytes(b"\xff" * 32)
    (line,) = problems(good)
    assert "not a whole safetensors file" in line
    path.unlink()
    with pytest.raises(InputError) as error:
        check_job(good)  # as submit does: a plan needs no weights
    (line,) = str(error.value).splitlines()
    assert line.endswith("say base.init: scratch to start from random weights")
    assert plan(good.model_copy(update={"base": good.base.model_copy(update={"init": "scratch"})})).sizes is not None


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    folder = make_base(tmp_path / "base")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"model-2\.safetensors: missing; .* names 2 files, 1 lack"):
        weight_files(folder)
    write_weights(folder / "model-2.safetensors", {"x": (2, 3)})
    assert [path.name for path in weight_files(folder)] == ["model-1.safetensors", "model-2.safetensors"]
    assert [(t.name, t.shape) for t in read_header(folder / "model-2.safetensors")] == [("x", (2, 3))]


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ("{", "config.json: not JSON"),
        ("[]", "config.json: found list; allowed: an object"),
        ("{}", "config.json has no model_type"),
        ('{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}', "allowed: a ...ForCausalLM model"),
        ('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}', "gives no shapes (KeyError"),
    ],
)
def test_configs_that_are_no_base(tmp_path: Path, config: str, problem: str) -> None:
    good = a_job(tmp_path)
    (tmp_path / "base" / "config.json").write_text(config)
    (tmp_path / "base" / "model.safetensors").unlink()
    (line,) = problems(good.model_copy(update={"base": good.base.model_copy(update={"init": "scratch"})}))
    assert problem in line


def test_a_config_without_a_size_gives_no_shapes() -> None:
    with pytest.raises(InputError, match=r"gives no shapes \(TypeError: model.embed_tokens.weight would have .*None"):
        _ = Model({**CONFIG, "hidden_size": None, "head_dim": 8}).shapes


def test_a_config_of_a_million_layers_gives_no_shapes() -> None:
    with pytest.raises(InputError, match=r"gives no shapes \(TypeError: num_hidden_layers is 1,000,000; "):
        _ = Model({**CONFIG, "num_hidden_layers": 10**6}).shapes


def test_a_share_of_test_rows_that_is_not_one_row_is_refused(tmp_path: Path) -> None:
    data = {"train": "train.jsonl", "eval": "train.jsonl", "seq_len": 16}
    source = make_job(tmp_path, data=data, evaluation={"test": 0.5})
    rows = plan(source).eval_rows
    assert rows
    plan(source, [f"evaluation.test={1.01 / rows}"])
    with pytest.raises(InputError, match=rf"^evaluation.test: found 0.001, less than one of {rows} held-out rows; "):
        plan(source, ["evaluation.test=0.001"])


def test_a_base_that_cannot_pack_is_refused(tmp_path: Path) -> None:
    make_base(tmp_path / "base", architectures=["OPTForCausalLM"])
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"opt"'))
    with pytest.raises(InputError, match=r"data\.packing: documents .* of type opt; allowed: false"):
        plan(make_job(tmp_path))
    plan(make_job(tmp_path), ["data.packing=false"])


def test_a_config_with_a_size_below_zero_gives_no_shapes() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": -48}
    counts = {"num_hidden_layers": 2, "num_attention_heads": 4}
    with pytest.raises(InputError, match=r"gives no shapes \(TypeError: .*gate_proj.weight would have .*-48"):
        _ = Model({"model_type": "llama", **sizes, **counts}).shapes


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, True), ({"objective": "reward"}, False), ({"base": {"model": "b", "init": "scratch"}}, False)],
    ids=["sft", "a head that is trained", "from scratch"],
)
def test_trained_weights_are_whole_beside_a_base_that_is_shared_alone(changes: Any, expected: bool) -> None:
    found = job(**{"method": {"kind": "lora"}, "sharding": {"zero": 3}, **changes})
    assert found.keeps_trained_whole(10, 100) == expected
    assert not found.keeps_trained_whole(20, 100)
