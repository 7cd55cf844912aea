"""Fixtures that many tests share: a tiny random base, and training as plain processes."""

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two layers (fp32) and the tokenizer of examples/tiny."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
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


@pytest.fixture
def new_run(tmp_path: Path, tiny_base: Path, sums: Path) -> Any:
    """Make a run folder with a small job; keyword arguments replace parts of it."""

    def make(name: str, **parts: dict[str, Any]) -> Path:
        job: dict[str, Any] = {
            "name": "test",
            "base": str(tiny_base),
            "method": {"kind": "lora", "rank": 4},
            "data": {"train": str(sums), "seq_len": 64},
            "train": {"steps": 20, "batch_tokens": 300, "lr": 1e-2, "warmup": 0.1},
            "checkpoint": {"every": 1000},
        }
        for key, value in parts.items():
            job[key] = {**job[key], **value} if key in job and key != "method" and isinstance(value, dict) else value
        run_dir = tmp_path / name
        run_dir.mkdir()
        (run_dir / "job.yaml").write_text(yaml.safe_dump({"run_id": name, "job": job}))
        return run_dir

    return make


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tokenised data of the tests is kept."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def launch(cache: Path, tmp_path: Path) -> Any:
    """Train runs, one after another, in `world` plain processes on loopback; gives the processes' exit codes."""

    def start(world: int, *run_dirs: Path, timeout: float = 240) -> list[int]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        log = (tmp_path / "workers.log").open("ab")
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "trainer", *map(str, run_dirs)],
                env=os.environ
                | {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "OMP_NUM_THREADS": "1",
                    "FLEETUNE_CACHE": str(cache),
                },
                stdout=log,
                stderr=log,
            )
            for rank in range(world)
        ]
        try:
            return [process.wait(timeout) for process in processes]
        finally:
            for process in processes:
                process.kill()
            log.close()
            print((tmp_path / "workers.log").read_text()[-5000:])

    return start


@pytest.fixture
def gsm8k() -> Path:
    """GSM8K's training rows, where a checkout has them beside it."""
    path = ROOT.parent / "shared" / "data" / "gsm8k_train.jsonl"
    if not path.exists():
        pytest.skip("GSM8K is not beside this checkout")
    return path
