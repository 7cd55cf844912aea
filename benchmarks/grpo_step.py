"""A step of GRPO on answers of the model's own: what writing them takes of its time and memory, and how exact it is.

`preferences.py --rows grpo grpo-fp32` runs it. Every prompt has as many tokens as the others, and of answers that a
random model writes hardly one ends before its time, so nobody waits for long ones. Parts of a step are timed from
outside, with the device waited for before and after each. The reward is a function in a process of its own.
"""

import dataclasses
import gc
import itertools
import json
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

WARMUP, STEPS = 2, 4
PROMPT_WORDS = 100
ONE_TOKEN = ["red", "blue", "cat", "dog", "is", "the"]  # in the tokenizer of the tiny base
REWARD = '''
def spread(prompt, completion, row):
    """A number that differs between answers of a random model."""
    return sum(map(ord, completion)) % 11 / 11
'''


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is written in a step: answers to each prompt, and the most tokens of one."""

    prompts: int
    samples: int
    new_tokens: int


def grpo_run(place: Path, base: str, method: dict[str, Any], size: Size, precision: str) -> Path:
    """A new run folder, whose steps have so many prompts."""
    from transformers import AutoTokenizer

    rng = random.Random(0)
    rows = [prompt_row(rng) for _ in range(2 * (WARMUP + STEPS) * size.prompts)]
    tokenizer = AutoTokenizer.from_pretrained(base)
    lengths = {len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) for row in rows[:50]}
    run_dir = Path(tempfile.mkdtemp(prefix="grpo-", dir=place))
    data, reward = run_dir / "prompts.jsonl", run_dir / "rewards.py"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward.write_text(REWARD)
    job = {
        "name": "step",
        "base": base,
        "objective": {
            "kind": "grpo",
            "reward": f"{reward}:spread",
            "samples": size.samples,
            "new_tokens": size.new_tokens,
        },
        "method": method,
        "data": {"train": str(data), "seq_len": 2048},
        "train": {
            "steps": WARMUP + STEPS,
            "batch_tokens": size.prompts * (max(lengths) + 1),
            "micro_batch": 4,
            "precision": precision,
            "lr": 1e-6,
        },
    }
    (run_dir / "job.yaml").write_text(yaml.safe_dump({"run_id": run_dir.name, "job": job}))
    return run_dir


def prompt_row(rng: random.Random) -> dict[str, str]:
    """A prompt of so many words, and an answer that nobody asks for."""
    return {"prompt": " ".join(["red", *rng.choices(ONE_TOKEN, k=PROMPT_WORDS)]), "completion": " the"}


class Parts:
    """The seconds that calls of some functions took, by the name of the part of a step that they are."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def time(self, owner: Any, function: str, part: str) -> None:
        """From now on, add what calls of a function take to a part."""
        plain = getattr(owner, function)

        def timed(*arguments: Any, **keywords: Any) -> Any:
            with_device()
            began = time.monotonic()
            try:
                return plain(*arguments, **keywords)
            finally:
                with_device()
                self.seconds[part] += time.monotonic() - began

        setattr(owner, function, timed)


def with_device() -> None:
    """Wait until a GPU has done all that it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def grpo_steps(run_dir: Path, started: Callable[[Path], Any]) -> dict[str, Any]:
    """The figures of a run's steps; `started` gives a run under its engine, its feed and its meter."""
    from serving.engine import Engine
    from serving.garbage import leave_to_no_collection
    from trainer import rollouts
    from trainer.group_writer import GroupWriter
    from trainer.meter import SaveRequest
    from trainer.rewards import FunctionReward
    from trainer.step import take_step

    parts = Parts()
    for owner, function, part in (
        (rollouts, "rolled_out", "rollout"),
        (GroupWriter, "load", "adapter"),
        (Engine, "answered", "write"),
        (FunctionReward, "judge", "reward"),
    ):
        parts.time(owner, function, part)
    note_peaks(rollouts)
    measured = []
    with started(run_dir) as (run, micro_batches, meter, _):
        leave_to_no_collection()
        places: list[int] = []
        for step in range(1, WARMUP + STEPS + 1):
            parts.seconds.clear()
            with_device()
            began = time.monotonic()
            take_step(run, step, micro_batches, meter, SaveRequest())
            with_device()
            measured.append({"step": time.monotonic() - began, **parts.seconds})
            if step == WARMUP:
                places = places_of_base(run.model)
        meter.flush()
        moved = bytes_moved(run.model, places)
        memory = memory_figures(run)
        answers = rollouts.recorded_rollout(run.attempt, WARMUP + STEPS)
        kernels = run.objective.kernels
    assert answers is not None
    lines = (run_dir / "attempts" / "1" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines][WARMUP:]
    return {
        **seconds(measured[WARMUP:]),
        "answers": len(answers["rewards"]),
        "answer_tokens": statistics.mean(row["answer_tokens"] for row in rows),
        "engine_distance": max(row["engine_distance"] for row in rows),
        "groups_without_signal": max(row["groups_without_signal"] for row in rows),
        "peak_gib": rows[-1]["peak_memory_bytes"] / 2**30,
        "bytes_of_base_moved": moved,
        **memory,
        "kernels": kernels.names,
        "problems": kernels.problems,
    }


PEAKS: list[int] = []  # bytes that a GPU held at most while answers were written beside those before, of each step


def note_peaks(rollouts: Any) -> None:
    """Have `rollouts.written` note the most bytes that a GPU held meanwhile beside what it held before."""
    import torch

    plain = rollouts.written

    def noted(*arguments: Any) -> Any:
        if not torch.cuda.is_available():
            return plain(*arguments)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            return plain(*arguments)
        finally:
            PEAKS.append(torch.cuda.max_memory_allocated() - before)

    rollouts.written = noted


def seconds(measured: list[dict[str, float]]) -> dict[str, Any]:
    """The median step, and which share of it each part takes; generation is all but the reward and the update."""
    of_step = statistics.median(row["step"] for row in measured)
    shares = {}
    for part in ("adapter", "write", "reward"):
        shares[part] = median_share(measured, lambda row, part=part: row[part])
    shares["update"] = median_share(measured, lambda row: row["step"] - row["rollout"])
    generation = median_share(measured, lambda row: row["rollout"] - row["reward"])
    return {"step_s": of_step, "generation_share": generation, "shares": shares}


def median_share(measured: list[dict[str, float]], of: Callable[[dict[str, float]], float]) -> float:
    """The median over steps of the share that some of its seconds have in a step."""
    shares = [of(row) / row["step"] for row in measured]
    return round(statistics.median(shares), 4)


def frozen(model: Any) -> Iterator[Any]:
    """The weights of the base, each memory once."""
    seen = set()
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.data_ptr() not in seen:
            seen.add(parameter.data_ptr())
            yield parameter


def places_of_base(model: Any) -> list[int]:
    """Where the weights of the base lie."""
    return [parameter.data_ptr() for parameter in frozen(model)]


def bytes_moved(model: Any, places: list[int]) -> int:
    """The bytes of the base's weights that lie elsewhere now."""
    pairs = itertools.zip_longest(frozen(model), places)
    return sum(parameter.nbytes for parameter, place in pairs if parameter.data_ptr() != place)


def memory_figures(run: Any) -> dict[str, Any]:
    """Sizes of base, caches and adapter, what the engine has of the base a second time, and what it takes beside.

    That is what is free again when the engine is gone, without its caches, and the most that writing takes on top.
    """
    engine = run.objective._answers.writer.engine
    model = run.model
    base = sum(parameter.nbytes for parameter in frozen(model))
    cache = engine.cache.key_LNHE.nbytes + engine.cache.value_LNHE.nbytes
    shared = {parameter.untyped_storage().data_ptr() for parameter in frozen(model)}
    groups = [group.weight_LNI for group in engine.base.groups.values()]
    tensors = [*groups, engine.base.embed_VD, engine.base.head_VD]
    second = sum(tensor.nbytes for tensor in tensors if tensor.untyped_storage().data_ptr() not in shared)
    figures = {
        "base_bytes": base,
        "cache_bytes": cache,
        "adapter_bytes": sum(weight.nbytes for weight in model.parameters() if weight.requires_grad),
        "bytes_of_second_base": second,
    }
    if PEAKS:
        del engine, groups, tensors
        beside = freed_with_engine(run) - cache + max(PEAKS[WARMUP:])
        figures["bytes_beside_base_and_cache"] = beside
        figures["of_base_beside_cache"] = round(1 + beside / base, 4)
    return figures


def freed_with_engine(run: Any) -> int:
    """Let the engine of a run go; gives the bytes that a GPU has then."""
    import torch

    before = torch.cuda.memory_allocated()
    run.objective._answers = None
    gc.unfreeze()
    gc.collect()
    return before - torch.cuda.memory_allocated()


def grpo_table(rows: list[dict[str, Any]]) -> str:
    """The figures as Markdown."""
    head = "| row | step s | generation | adapter | write | reward | update | apart | base moved | memory / base |"
    lines = [head, "|---" * 10 + "|"]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['row']} | {row['error']} |" + " |" * 8)
            continue
        shares = " | ".join(f"{row['shares'][part]:.1%}" for part in ("adapter", "write", "reward", "update"))
        moved = row["bytes_of_base_moved"] + row["bytes_of_second_base"]
        memory = row.get("of_base_beside_cache", "no GPU")
        lines.append(
            f"| {row['row']} | {row['step_s']:.2f} | {row['generation_share']:.1%} | {shares} | "
            f"{row['engine_distance']:.1e} | {moved} | {memory} |"
        )
    return "\n".join(lines)
