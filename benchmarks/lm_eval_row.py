"""The row of `evaluate_many.py --lm-eval`: lm-evaluation-harness, one adapter after another, and all by Fleetune.

Both are the harness's own `evaluate` on the same two tasks (local YAML, local rows): a text to be written behind a
prompt, and the likeliest of four. Its HFLM has one adapter (`peft=`) at a time; Fleetune's model has all of them in
one engine. Seconds are those of whole runs in a process that has imported everything: weights, tasks, requests,
scores.
"""

import json
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from serving.engine import Engine
from serving.starting import base_dtype

CHOICES = 4
LENGTH = 2  # tokens of a choice
ROOM = 64  # positions beside prompt and answer: what texts make of random ids, encoded again, may be longer
Results = dict[str, Any]  # of the harness, by adapter


def lm_eval_row(base: Path, adapters: Mapping[str, Path], folder: Path, options: Any) -> dict[str, Any]:
    """The seconds of both, and how far scores and answers are the same, on the first `peer_adapters`."""
    tasks = written_tasks(base, folder, options)
    ours, seconds = in_one_engine(base, adapters, tasks, options)
    some = dict(list(adapters.items())[: options.peer_adapters])
    theirs, peer_seconds = one_by_one(base, some, tasks, options)
    all_seconds = peer_seconds * len(adapters) / len(some)
    answers = [same_answers(ours[name], theirs[name]) for name in some]
    return {
        "lm_eval_ours_seconds": round(seconds, 2),
        "lm_eval_seconds": round(all_seconds, 2),
        "lm_eval_ratio": round(all_seconds / seconds, 1),
        "lm_eval_scores": {name: [accuracy(ours[name]), accuracy(theirs[name])] for name in some},
        "lm_eval_same_choices": round(sum(choices for choices, _ in answers) / len(some), 4),
        "lm_eval_same_texts": round(sum(texts for _, texts in answers) / len(some), 4),
    }


def written_tasks(base: Path, folder: Path, options: Any) -> list[str]:
    """The YAML files of the tasks, whose rows are random tokens as text."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    draw = random.Random(0)

    def text(tokens: int) -> str:
        return str(tokenizer.decode([draw.randrange(3, len(tokenizer)) for _ in range(tokens)]))

    rows = folder / "rows.jsonl"
    with rows.open("w") as stream:
        for _ in range(options.rows):
            choices = [text(LENGTH) for _ in range(CHOICES)]
            row = {"prompt": text(options.prompt), "choices": choices, "right": draw.randrange(CHOICES)}
            stream.write(json.dumps(row) + "\n")
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}}, "test_split": "test"}
    chosen = common | {
        "task": "chosen",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc"}],
    }
    written = common | {
        "task": "written",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{choices[right]}}",
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": options.new},
        "metric_list": [{"metric": "exact_match"}],
    }
    paths = []
    for task in (chosen, written):
        path = folder / f"{task['task']}.yaml"
        path.write_text(yaml.safe_dump(task))
        paths.append(str(path))
    return paths


def in_one_engine(
    base: Path, adapters: Mapping[str, Path], tasks: list[str], options: Any
) -> tuple[dict[str | None, Results], float]:
    """What the harness says of all adapters in one engine, and the seconds."""
    import lm_eval.evaluator
    import lm_eval.tasks  # noqa: F401

    from serving.harness import evaluate_by_harness

    positions = options.prompt + options.new + ROOM
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=base_dtype())
    rows = 16 * options.batch
    sizes = {"residents": len(adapters), "rows": rows, "tokens": rows * positions, "adapter_bytes": 2**30}
    engine = Engine(model, positions=positions, **sizes)
    for name, folder in adapters.items():
        engine.load(name, folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    found = evaluate_by_harness(engine, tokenizer, list(adapters), tasks, bootstrap_iters=0)
    return found, time.perf_counter() - began


def one_by_one(
    base: Path, adapters: Mapping[str, Path], tasks: list[str], options: Any
) -> tuple[dict[str, Results], float]:
    """What the harness says by its own model of one adapter after another, and the seconds."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = str(base_dtype()).removeprefix("torch.")
    length = options.prompt + options.new + ROOM
    manager = TaskManager()  # it reads all tasks that the harness has: the peer need not do so for each adapter
    began = time.perf_counter()
    found = {}
    for name, folder in adapters.items():
        model = HFLM(
            pretrained=str(base),
            peft=str(folder),
            dtype=dtype,
            device=device,
            max_length=length,
            batch_size=options.batch,
        )
        found[name] = evaluate(lm=model, task_dict=manager.load(tasks), bootstrap_iters=0)
    return found, time.perf_counter() - began


def accuracy(results: Results) -> float:
    """How many of the choices are right."""
    return round(float(results["results"]["chosen"]["acc,none"]), 4)


def same_answers(ours: Results, theirs: Results) -> tuple[float, float]:
    """The shares of rows with the same choice, and with the same text."""
    shares = []
    for task, answer in (("chosen", likeliest), ("written", lambda sample: sample["filtered_resps"])):
        pairs = zip(by_row(ours, task), by_row(theirs, task), strict=True)
        same = [answer(one) == answer(other) for one, other in pairs]
        shares.append(sum(same) / len(same))
    return shares[0], shares[1]


def by_row(results: Results, task: str) -> list[Any]:
    """What was answered in a task, in the order of its rows."""
    return sorted(results["samples"][task], key=lambda sample: sample["doc_id"])


def likeliest(sample: Any) -> int:
    """The number of the likeliest choice of a row."""
    values = [float(answer[0]) for answer in sample["filtered_resps"]]
    return values.index(max(values))
