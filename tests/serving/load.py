"""Many clients that ask many adapters while others come and go: what they got, and whether it was right."""

import asyncio
import io
import json
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import torch
from gateway_server import gateway
from safetensors.torch import load, save

from serving.engine import Engine
from serving.gateway.server import EngineSizes, Server
from serving.gateway.text import Codec
from serving.sequence import Request

ADAPTERS = 1000
CHECKED = 25  # one adapter in so many has its answers checked
PROMPT = "What is 12 + 30?"
TOKENS = 6
ROOM = EngineSizes(residents=16, rows=64, positions=64, tokens=8192, adapter_bytes=2**22)


@dataclass
class Counts:
    """What clients saw."""

    statuses: Counter[int] = field(default_factory=Counter)
    checked: int = 0
    wrong: list[str] = field(default_factory=list)
    swaps: int = 0  # of adapters that came, were asked, and went


def variants(exported: Path, folder: Path, count: int) -> list[Path]:
    """So many adapters of different weights, like one that was exported."""
    tensors = load((exported / "adapter_model.safetensors").read_bytes())
    config = (exported / "adapter_config.json").read_bytes()
    made = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        changed = {name: 0.3 * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}
        place = folder / f"task-{number}"
        place.mkdir()
        (place / "adapter_config.json").write_bytes(config)
        (place / "adapter_model.safetensors").write_bytes(save(changed))
        made.append(place)
    return made


def expected_answers(base: Path, folders: list[Path]) -> dict[str, str]:
    """What adapters say, each by itself in an engine of its own."""
    engine, codec = Engine(base, residents=1, rows=1, positions=64, tokens=256, adapter_bytes=2**20), Codec(base)
    ids = codec._encode(PROMPT, True)
    known = codec.decode(list(ids))
    answers = {}
    for folder in folders:
        engine.load(folder.name, folder)
        (answer,) = engine.generate([Request(ids, folder.name, TOKENS, codec.ends)])
        engine.unload(folder.name)
        answers[folder.name] = codec.decode([*ids, *answer])[len(known) :]
    return answers


class Clients:
    """Clients of one server, in one event loop."""

    def __init__(self, server: Server, folders: list[Path], expected: dict[str, str]) -> None:
        self.server, self.address, self.folders, self.expected = server, server.address, folders, expected
        self.counts = Counts()

    async def run(self, clients: int, swappers: int, seconds: float) -> Counts:
        """Let all of them work for so long."""
        loop = asyncio.get_running_loop()
        self.deadline = loop.time() + seconds
        limits = httpx2.Limits(max_connections=clients + swappers)
        self.http = httpx2.AsyncClient(base_url=self.address, limits=limits, timeout=120)
        async with self.http, asyncio.TaskGroup() as tasks:
            for number in range(clients):
                tasks.create_task(self.ask_on(random.Random(number)))
            for number in range(swappers):
                tasks.create_task(self.swap_on(number, random.Random(-number - 1)))
        return self.counts

    async def ask_on(self, draw: random.Random) -> None:
        """Ask adapters that chance chooses, one after the other."""
        while asyncio.get_running_loop().time() < self.deadline:
            name = draw.choice(self.folders).name
            if draw.random() < 0.3:
                name = draw.choice(list(self.expected))
            answer = await self.ask(name, draw.random() < 0.3)
            self.check(name, name, answer)

    async def swap_on(self, number: int, draw: random.Random) -> None:
        """Bring an adapter, ask it, bring another one of its name, ask it, drop it, and ask in vain."""
        by_name = {folder.name: folder for folder in self.folders}
        name = f"mine-{number}"
        while asyncio.get_running_loop().time() < self.deadline:
            for variant in draw.sample(list(self.expected), 2):
                await self.bring(name, by_name[variant])
                self.check(name, variant, await self.ask(name, False))
            self.count(await self.http.delete(f"/v1/adapters/{name}"))
            gone = await self.http.post("/v1/completions", json={"model": name, "prompt": "1"})
            if gone.status_code != 404:
                self.counts.wrong.append(f"{name} answered after it had gone")
            self.counts.swaps += 1

    def check(self, name: str, variant: str, answer: str) -> None:
        """Compare an answer with the one that is right, where that is known."""
        if variant in self.expected:
            self.counts.checked += 1
            if answer != self.expected[variant]:
                self.counts.wrong.append(f"{name} as {variant}: {answer!r}, not {self.expected[variant]!r}")

    def count(self, response: httpx2.Response) -> None:
        self.counts.statuses[response.status_code] += 1

    async def bring(self, name: str, folder: Path) -> None:
        """Upload an adapter."""
        files: dict[str, Any] = {}
        for part, file in (("config", "adapter_config.json"), ("weights", "adapter_model.safetensors")):
            files[part] = (file, io.BytesIO((folder / file).read_bytes()))
        self.count(await self.http.post("/v1/adapters", data={"name": name}, files=files))

    async def ask(self, name: str, streams: bool) -> str:
        """The answer of an adapter, whole or put together from a stream."""
        body = {"model": name, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "stream": streams}
        if not streams:
            response = await self.http.post("/v1/completions", json=body)
            self.count(response)
            return str(response.json()["choices"][0]["text"]) if response.status_code == 200 else response.text
        text = ""
        async with self.http.stream("POST", "/v1/completions", json=body) as response:
            self.count(response)
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
        return text


@contextmanager
def loaded_server(base: Path, exported: Path, folder: Path) -> Iterator[Clients]:
    """A server with all the adapters, and clients for it."""
    folders = variants(exported, folder, ADAPTERS)
    expected = expected_answers(base, folders[::CHECKED])
    with gateway(base, {path.name: path for path in folders}, sizes=ROOM) as server:
        yield Clients(server, folders, expected)
