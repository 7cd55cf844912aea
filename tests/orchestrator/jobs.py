"""A job that would run, on bases of zeros and three rows of data; and a cluster that only queues."""

import fcntl
import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer, models, pre_tokenizers

from clusters import holder
from orchestrator.planning.model import Model, parameter_count

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def make_base(folder: Path, **changes: Any) -> Path:
    """A base whose weights are zeros."""
    folder.mkdir()
    config = {**CONFIG, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    write_weights(folder / "model.safetensors", Model(config).shapes)
    return folder


def write_tokenizer(folder: Path, *words: str) -> None:
    """A tokenizer that knows a few words: any other one, and each sign between them, is `<unk>`."""
    ids = {word: id_ for id_, word in enumerate(("<unk>", "</s>", *words))}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_weights(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of zeros."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * parameter_count({name: shape})
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


def make_job(folder: Path, **changes: Any) -> Path:
    """A job.yaml in a folder, with base and data beside it, named by relative paths."""
    if not (folder / "base").exists():
        make_base(folder / "base")
    (folder / "train.jsonl").write_text('{"prompt": "1+1=", "completion": "2, as everybody knows"}\n' * 3)
    job = {
        "name": "sums",
        "base": "base",
        "method": {"kind": "lora", "rank": 2},
        "data": {"train": "train.jsonl", "seq_len": 16},
        "train": {"steps": 7, "batch_tokens": 16},
        "resources": {"workers_per_node": 2},
        **changes,
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


@contextmanager
def only_queued(home: Path) -> Iterator[None]:
    """Stand in for the supervisor of the local cluster: what is submitted waits."""
    folder = home / "local"
    folder.mkdir(parents=True)
    descriptor = os.open(folder / "supervisor.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.pwrite(descriptor, holder.current_holder().dump(), 0)
    try:
        yield
    finally:
        os.close(descriptor)
