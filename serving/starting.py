"""An engine in a process of its own, made for somebody else: with its base, its tokenizer and its adapters."""

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from serving.base import FrozenBase
from serving.engine import Engine
from serving.error import AdapterRefused, BaseRefused
from serving.garbage import leave_to_no_collection
from serving.loading import loaded, tail_ranks
from serving.packed import Packed
from serving.pool import packed_adapter
from serving.sizes import bytes_for

SMALL_WIDTH = 512  # of a base whose layers are done before a second thread has begun
RequestData = Mapping[str, Any]
SizesOf = Callable[[Any, int], dict[str, int]]  # the sizes of an engine, by the config of its base and its adapters


@dataclass(frozen=True)
class ReadyEngine:
    """An engine that has all adapters, and what makes text of its tokens."""

    engine: Engine
    tokenizer: Any

    def decode(self, ids: list[int]) -> str:
        """Token ids as text, without control tokens."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return str(text)


def ready_engine(request: RequestData, sizes_of: SizesOf) -> ReadyEngine | list[str]:
    """The engine that a request {base, revision, adapters: [{name, folder}]} asks for, or what is wrong with it."""
    from transformers import AutoTokenizer

    place = request["base"]
    revision = request["revision"] or "main"
    tokenizer = AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=False)
    model = loaded(place, base_dtype(), revision)
    if not torch.cuda.is_available() and model.config.hidden_size < SMALL_WIDTH:
        torch.set_num_threads(1)  # threads that wait for each other on a busy machine cost ten times the work
    try:
        sizes = sizes_of(model.config, len(request["adapters"]))
        base = FrozenBase(model, tail_ranks(model, sizes["residents"]))
    except BaseRefused as error:
        return [f"{place}: {error}"]
    adapters, problems = packed_all(base, request["adapters"])
    if problems:
        return problems
    engine = engine_with(base, adapters, sizes)
    leave_to_no_collection()
    return ReadyEngine(engine, tokenizer)


def packed_all(base: FrozenBase, adapters: Iterable[RequestData]) -> tuple[dict[str, Packed], list[str]]:
    """Adapters by their names, and what is wrong with those that are refused."""
    packed = {}
    problems: list[str] = []
    for adapter in adapters:
        folder = Path(adapter["folder"])
        try:
            packed[adapter["name"]] = packed_adapter(folder, base)
        except AdapterRefused as error:
            problems.append(str(error))
    return packed, problems


def engine_with(base: FrozenBase, adapters: Mapping[str, Packed], sizes: Mapping[str, int]) -> Engine:
    """An engine of these sizes with adapters, for which it has as much memory as they take."""
    adapter_bytes = bytes_for(adapters.values(), sizes["residents"])
    engine = Engine(base, adapter_bytes=adapter_bytes, **sizes)
    for name, packed in adapters.items():
        engine.give(name, packed)
    return engine


def base_dtype() -> torch.dtype:
    """The type of the base's weights here: that of the trainer's forward pass."""
    if torch.cuda.is_available():
        return torch.bfloat16
    return torch.float32


def say(**content: Any) -> None:
    """Write one line of JSON, at once; what libraries print goes elsewhere."""
    line = json.dumps(content)
    print(line, file=sys.__stdout__, flush=True)
