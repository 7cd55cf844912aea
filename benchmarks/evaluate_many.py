"""Evaluation of many adapters: Fleetune in one pass, and PEFT with transformers one adapter after another.

    python benchmarks/evaluate_many.py --out benchmarks/results/evaluate-many.json
    python benchmarks/evaluate_many.py --base examples/tiny --adapters 3 --rows 40 --prompt 24 --new 8

Random LoRA adapters of rank 16 on all linear layers, random prompts, greedy; without `--base` a random model in the
shape of Llama-3.2-1B. Of both, the seconds are those of asking, without loading the base; ours also without compiling
kernels. The peer takes `--batch` prompts at once; it is timed on the first `--peer-adapters` adapters, and the
seconds of all are that many times more. Beside the times stands how many answers are the same, token by token. With
`--lm-eval` a second peer is lm-evaluation-harness with its own HF model (`pip install lm-eval`; see lm_eval_row.py).
"""

import argparse
import gc
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import llama_1b
import torch
from layouts import device
from lm_eval_row import lm_eval_row
from peft import LoraConfig, PeftModel, get_peft_model
from random_base import random_base
from transformers import AutoModelForCausalLM

from serving.base import FrozenBase
from serving.engine import Engine
from serving.evaluate import Candidate, answer_all, sheets_of
from serving.folder import adapter_digest
from serving.garbage import leave_to_no_collection
from serving.loading import loaded, tail_ranks
from serving.pool import packed_adapter
from serving.question import AskedTask, Question
from serving.sizes import sizes_for
from serving.starting import base_dtype, engine_with

RANK = 16
WARM = 32  # questions of each adapter that are asked before, as kernels are compiled and graphs captured then
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Answers = dict[str, list[str]]  # by adapter, in the order of the questions


def main() -> None:
    """Time both, and write what came of it."""
    options = read_options()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base = options.base or random_base(folder / "base", llama_1b.SHAPE, base_dtype(), DEVICE, end="w2")
        adapters = random_adapters(base, folder, options.adapters)
        torch.manual_seed(0)
        vocabulary = AutoModelForCausalLM.from_pretrained(base).config.vocab_size
        ids = torch.randint(3, vocabulary, (options.rows, options.prompt)).tolist()
        questions = [Question(tuple(prompt), options.new) for prompt in ids]
        ours, seconds = in_one_pass(base, adapters, questions, folder / "answers")
        some = dict(list(adapters.items())[: options.peer_adapters])
        theirs, peer_seconds = one_by_one(base, some, questions, options.batch)
        harness = lm_eval_row(base, adapters, folder, options) if options.lm_eval else {}
    same = [a == b for name in some for a, b in zip(ours[name], theirs[name], strict=True)]
    times = len(adapters) / len(some)
    result = {
        "device": device(),
        **{name: getattr(options, name) for name in ("adapters", "rows", "prompt", "new", "batch")},
        "seconds": round(seconds, 2),
        "peft_seconds": round(peer_seconds * times, 2),
        "peft_adapters_timed": len(some),
        "ratio": round(peer_seconds * times / seconds, 1),
        "same_answers": round(sum(same) / len(same), 4),
        **harness,
    }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def read_options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--out", type=Path)
    for name, default in (("adapters", 16), ("rows", 500), ("prompt", 128), ("new", 32), ("batch", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--peer-adapters", type=int, default=2)
    parser.add_argument("--lm-eval", action="store_true")
    return parser.parse_args()


def random_adapters(base: Path, folder: Path, count: int) -> dict[str, Path]:
    """The folders by name of adapters that change what the base says, as PEFT saves them."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=base_dtype()).to(DEVICE)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", init_lora_weights=False)
    folders = {}
    for number in range(count):
        torch.manual_seed(number)
        adapted = get_peft_model(model, config)
        name = f"a{number}"
        folders[name] = folder / name
        adapted.save_pretrained(folders[name], save_embedding_layers=False)
        model = adapted.unload()
    return folders


def in_one_pass(base: Path, adapters: dict[str, Path], questions: list[Question], out: Path) -> tuple[Answers, float]:
    """The answers of all adapters, and the seconds from the first question to the last answer on disk."""
    candidates = [Candidate(name, folder, adapter_digest(folder)) for name, folder in adapters.items()]
    model = loaded(base, base_dtype())
    sizes = sizes_for(model.config, questions, len(adapters))
    base_of_all = FrozenBase(model, tail_ranks(model, sizes["residents"]))
    packed = {name: packed_adapter(folder, base_of_all) for name, folder in adapters.items()}
    engine = engine_with(base_of_all, packed, sizes)
    leave_to_no_collection()  # as `ready_engine` does for an evaluation
    # Backwards, as the pages of prompts that the engine has seen are kept.
    warm = [Question(question.prompt[::-1], question.new_tokens) for question in questions[:WARM]]
    ask(engine, [AskedTask("warm", "w", tuple(warm))], candidates, out / "warm")
    sheets, seconds = ask(engine, [AskedTask("rows", "r", tuple(questions))], candidates, out / "rows")
    answers = {}
    for sheet in sheets:
        kept = sheet.file.answers
        answers[str(sheet.candidate.name)] = [str(kept[question.key].text) for question in questions]
    gc.unfreeze()  # the engine makes room for the peer
    return answers, seconds


def ask(engine: Engine, tasks: list[AskedTask], candidates: list[Candidate], out: Path) -> tuple[Any, float]:
    """Ask all, and give the sheets with their answers, and the seconds."""
    sheets = sheets_of(out, tasks, candidates)
    began = time.perf_counter()
    answer_all(engine, sheets, str, {}, lambda _: None)
    return sheets, time.perf_counter() - began


def one_by_one(base: Path, adapters: dict[str, Path], questions: list[Question], batch: int) -> tuple[Answers, float]:
    """The answers of adapters by transformers, one adapter after another, and the seconds of generation."""
    answers: Answers = {}
    seconds = 0.0
    for name, folder in adapters.items():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=base_dtype()).to(DEVICE)
        tuned = PeftModel.from_pretrained(model, folder).to(base_dtype()).eval()
        began = time.perf_counter()
        answers[name] = []
        for start in range(0, len(questions), batch):
            rows = questions[start : start + batch]
            ids = torch.tensor([question.prompt for question in rows], device=DEVICE)
            new = rows[0].new_tokens
            with torch.inference_mode():
                out = tuned.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new,
                    max_new_tokens=new, pad_token_id=0, eos_token_id=None,
                )  # fmt: skip
            answers[name] += [str(row) for row in out[:, ids.shape[1] :].tolist()]
        seconds += time.perf_counter() - began
    return answers, seconds


if __name__ == "__main__":
    main()
