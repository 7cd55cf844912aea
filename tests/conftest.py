"""Fixtures that many tests share: a tiny random base, and training as plain processes."""

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import yaml
from ports import free_port

pytest.register_assert_rewrite("contract", "training_runs")
# Before anything imports torch: where tests run side by side, threads that wait for each other cost most.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parent.parent
ENVIRONMENT = dict(os.environ)  # as pytest found it: what one test sets is not for processes that outlive it


@pytest.fixture(scope="session", autouse=True)
def _no_home(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[None]:
    """Keep what tests remember out of the home of whoever runs them, and tokens for those that ask again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEETUNE_HOME", str(tmp_path_factory.mktemp("fleetune")))
        patch.setenv("FLEETUNE_CACHE", str(cache))
        yield


@pytest.fixture(scope="session", autouse=True)
def _forked_readers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Have readers of rows forked, not started: two seconds for each of some sixty."""
    from orchestrator.planning import survey

    script = str(Path(__file__).with_name("forked_reader.py"))
    address = str(tmp_path_factory.mktemp("readers") / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        serve = [sys.executable, script, "serve", str(listener.fileno())]
        environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
        server = subprocess.Popen(serve, pass_fds=[listener.fileno()], env=environment, stdin=subprocess.DEVNULL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(survey, "READER", [sys.executable, "-I", "-S", script, address])
        yield
    server.kill()
    server.wait()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two layers (fp32) and the tokenizer of examples/tiny."""
    from llamas import random_llama
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("base")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny")
    tokenizer.save_pretrained(folder)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    random_llama(vocab_size=len(tokenizer), initializer_range=0.02, **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl of 200 small sums in the prompt/completion shape, of very different lengths."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [[rng.randrange(100) for _ in range(rng.randrange(2, 9))] for _ in range(200)]
    text = [{"prompt": " + ".join(map(str, row)) + " =", "completion": f" {sum(row)}"} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in text))
    return path


@pytest.fixture(scope="session")
def held_out(sums: Path) -> Path:
    """A .jsonl of the first 40 sums, to evaluate on."""
    path = sums.with_name("held-out.jsonl")
    path.write_text("".join(sums.read_text().splitlines(keepends=True)[:40]))
    return path


@pytest.fixture
def new_run(tmp_path: Path, tiny_base: Path, sums: Path) -> Any:
    """Make a run folder with a small job; keyword arguments replace parts of it.

    A step takes two passes of one worker, and one of each of two: at ZeRO 3 a pass takes a tenth of a second.
    """

    def make(name: str, **parts: dict[str, Any]) -> Path:
        job: dict[str, Any] = {
            "name": "test",
            "base": str(tiny_base),
            "method": {"kind": "lora", "rank": 4},
            "data": {"train": str(sums), "seq_len": 64},
            "train": {"steps": 10, "batch_tokens": 300, "lr": 1e-2, "warmup": 0.1, "micro_batch": 4},
            "checkpoint": {"every": 1000},
        }
        for key, value in parts.items():
            merges = key != "method" and isinstance(job.get(key), dict) and isinstance(value, dict)
            job[key] = {**job[key], **value} if merges else value
        run_dir = tmp_path / name
        run_dir.mkdir()
        (run_dir / "job.yaml").write_text(yaml.safe_dump({"run_id": name, "job": job}))
        return run_dir

    return make


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tokenised data of the tests is kept."""
    return tmp_path_factory.mktemp("cache")


class Workers:
    """Processes on loopback that train one run after another."""

    def __init__(self, world: int, cache: Path, log: Path) -> None:
        import worker

        shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        shared |= {"OMP_NUM_THREADS": "1", "FLEETUNE_CACHE": str(cache)}
        self._pipes, self._processes = [], []
        for rank in range(world):
            ours, theirs = Pipe()
            environment = {**ENVIRONMENT, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            self._pipes.append(ours)
            self._processes.append(worker.start(theirs, environment, log))

    def train(self, run_dir: Path, timeout: float) -> bool:
        """Train a run; False when a worker has ended instead, or all said nothing for `timeout` seconds."""
        waiting = list(self._pipes)
        try:
            for pipe in waiting:
                pipe.send(run_dir)
            while waiting:
                answered = wait(waiting, timeout)
                for pipe in answered:
                    pipe.recv()
                if not answered:
                    return False
                waiting = [pipe for pipe in waiting if pipe not in answered]
        except (BrokenPipeError, EOFError):
            return False
        return True

    def are_up(self) -> bool:
        """Whether all processes live; a kill may come when a run has ended."""
        return all(process.is_alive() for process in self._processes)

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()


@pytest.fixture(scope="session")
def workers() -> Iterator[dict[int, Workers]]:
    """The workers that are up, by world size."""
    import worker

    worker.prepare(ENVIRONMENT)
    up: dict[int, Workers] = {}
    yield up
    for group in up.values():
        group.stop()


@pytest.fixture
def launch(workers: dict[int, Workers], cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Train runs, one after another, in a world of so many plain processes."""
    log = tmp_path_factory.getbasetemp() / "workers.log"
    log.touch()

    def start(world: int, *run_dirs: Path, timeout: float = 240) -> None:
        for run_dir in run_dirs:
            if world in workers and not workers[world].are_up():
                workers.pop(world).stop()
            if world not in workers:
                workers[world] = Workers(world, cache, log)
            before, done = log.stat().st_size, False
            try:
                done = workers[world].train(run_dir, timeout)
            finally:
                if not done:  # also when pytest's own time limit struck: else they would answer the next run for this
                    workers.pop(world).stop()
            assert done, f"{run_dir.name} did not end; its workers wrote:\n" + log.read_bytes()[before:].decode()

    return start


@pytest.fixture
def gsm8k() -> Path:
    """GSM8K's training rows, where a checkout has them beside it."""
    path = ROOT.parent / "shared" / "data" / "gsm8k_train.jsonl"
    if not path.exists():
        pytest.skip("GSM8K is not beside this checkout")
    return path
