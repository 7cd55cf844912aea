"""Two replicas beside one: new tokens per second of many adapters on one base, each replica a process with its GPU.

    python benchmarks/serve_replicas.py --out benchmarks/results/serve-replicas-h200.json
    python benchmarks/serve_replicas.py --base examples/tiny --adapters 4 --requests 32     (without a GPU)

Random LoRA adapters of rank 16 on all linear layers, 128 tokens of prompt and 64 new ones, all requests there at the
start. Who answers what is said by `serving/gateway/routing.py`, as in the gateway, and no Ray is needed. Each number
of replicas answers twice; the second time counts. `share` is what each replica answered of it.
"""

import argparse
import json
import multiprocessing
import os
import random
import tempfile
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import evaluate_many
import llama_1b
from layouts import commit, device, name_of_gpu
from random_base import random_base

from serving.gateway.routing import Router

PROMPT, NEW = 128, 64
SPAWN = multiprocessing.get_context("spawn")  # a fork would take along what a process knows of GPUs


class Asked(NamedTuple):
    """A request by its number: a prompt for an adapter."""

    number: int
    adapter: str
    prompt: tuple[int, ...]


def main() -> None:
    """Time one replica, and then two, and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--out", type=Path)
    for name, default in (("adapters", 64), ("requests", 2048), ("rows", 128), ("replicas", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        found = in_own_process(make_inputs, folder, options)
        base, adapters = Path(found["base"]), {name: Path(path) for name, path in found["adapters"].items()}
        rows = [measured(base, adapters, replicas, options) for replicas in (1, options.replicas)]
    result = {"commit": commit(), "device": found["device"], "adapters": options.adapters, "rows": rows}
    result["ratio"] = round(rows[1]["tokens_per_second"] / rows[0]["tokens_per_second"], 3)
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def in_own_process(work: Any, *arguments: Any) -> Any:
    """What a function gives in a process of its own, so that this one holds no GPU."""
    with SPAWN.Pool(1) as pool:
        return pool.apply(work, arguments)


def make_inputs(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The folders of a base and of adapters, and what they are served on."""
    from serving.starting import base_dtype

    base = options.base
    if not base:
        base = random_base(folder / "base", llama_1b.SHAPE, base_dtype(), evaluate_many.DEVICE)
    adapters = evaluate_many.random_adapters(base, folder, options.adapters)
    return {"base": str(base), "device": device(), "adapters": {name: str(path) for name, path in adapters.items()}}


def measured(base: Path, adapters: dict[str, Path], replicas: int, options: argparse.Namespace) -> dict[str, Any]:
    """The rate of so many replicas."""
    ends, processes = [], []
    for number in range(replicas):
        here, there = SPAWN.Pipe()
        process = SPAWN.Process(target=replica, args=(number, there, base, adapters, options.rows), daemon=True)
        process.start()
        ends.append(here)
        processes.append(process)
    for end in ends:
        end.recv()  # it is ready
    router = Router(replicas)
    for seed in (0, 1):
        asked = requests_of(sorted(adapters), options.requests, seed)
        began = time.perf_counter()
        answered = answer_all(ends, router, asked)
        seconds = time.perf_counter() - began
    for end, process in zip(ends, processes, strict=True):
        end.send(None)
        process.join()
    tokens = options.requests * NEW
    share = [round(count / options.requests, 3) for count in answered]
    return {"replicas": replicas, "seconds": seconds, "tokens_per_second": tokens / seconds, "share": share}


def requests_of(adapters: list[str], count: int, seed: int) -> list[Asked]:
    """Requests in a random order, as many of each adapter."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        prompt = tuple(rng.choices(range(3, 300), k=PROMPT))
        found.append(Asked(number, adapters[number % len(adapters)], prompt))
    rng.shuffle(found)
    return found


def answer_all(ends: list[Connection], router: Router, asked: list[Asked]) -> list[int]:
    """Have all requests answered; gives how many of them each replica answered."""
    for request in asked:
        chosen = router.choose(request.adapter)
        assert chosen is not None
        ends[chosen].send(request)
    answered = [0] * len(ends)
    while sum(answered) < len(asked):
        for end in wait(ends):
            assert isinstance(end, Connection)
            number = ends.index(end)
            for _ in end.recv():
                router.done(number)
                answered[number] += 1
    return answered


def replica(number: int, requests: Connection, base: Path, adapters: dict[str, Path], rows: int) -> None:
    """Answer requests on a GPU until there is None in their place."""
    os.environ["CUDA_VISIBLE_DEVICES"] = name_of_gpu(number)
    from serving.engine import Engine
    from serving.garbage import leave_to_no_collection
    from serving.sequence import Request, Sequence

    positions = PROMPT + NEW
    engine = Engine(base, residents=len(adapters), rows=rows, positions=positions, tokens=rows * (positions + 16))
    for name, folder in adapters.items():
        engine.load(name, folder)
    leave_to_no_collection()
    requests.send("ready")
    under_way: dict[int, Sequence] = {}
    while True:
        while requests.poll() or not under_way:
            asked = requests.recv()
            if asked is None:
                return
            under_way[asked.number] = engine.add(Request(asked.prompt, asked.adapter, NEW))
        engine.step()
        finished = [key for key, sequence in under_way.items() if sequence.finished]
        for key in finished:
            del under_way[key]
        if finished:
            requests.send(finished)


if __name__ == "__main__":
    main()
