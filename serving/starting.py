"""An engine in a process of its own, made for somebody else: with its base, its tokenizer and its adapters."""

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from serving.engine import Engine
from serving.error import AdapterRefused, BaseRefused
from serving.loading import loaded

SMALL_WIDTH = 512  # of a base whose layers are done before a second thread has begun
RequestData = Mapping[str, Any]
SizesOf = Callable[[Any], dict[str, int]]  # the sizes of an engine by the config of its base


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
        sizes = sizes_of(model.config)
        engine = Engine(model, **sizes)
    except BaseRefused as error:
        return [f"{place}: {error}"]
    problems = load_all(engine, request["adapters"])
    return problems or ReadyEngine(engine, tokenizer)


def load_all(engine: Engine, adapters: Iterable[RequestData]) -> list[str]:
    """Load adapters under their names; gives what is wrong with those that are refused."""
    problems: list[str] = []
    for adapter in adapters:
        folder = Path(adapter["folder"])
        try:
            engine.load(adapter["name"], folder)
        except AdapterRefused as error:
            problems.append(str(error))
    return problems


def base_dtype() -> torch.dtype:
    """The type of the base's weights here: that of the trainer's forward pass."""
    if torch.cuda.is_available():
        return torch.bfloat16
    return torch.float32


def say(**content: Any) -> None:
    """Write one line of JSON, at once; what libraries print goes elsewhere."""
    line = json.dumps(content)
    print(line, file=sys.__stdout__, flush=True)
