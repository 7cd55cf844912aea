"""A gateway under load: what tenants with a backlog get, what others wait beside them, and 1,000 adapters at random.

    python benchmarks/serve_load.py --out benchmarks/results/serve-load-cpu.json
    python benchmarks/serve_load.py --device cuda --out benchmarks/results/serve-load-h200.json

It starts `fleetune serve --no-ray` as a process of its own, with random LoRA adapters on all linear layers of a
random base and the keys of three tenants: on a GPU in the shape of Llama-3.2-1B, on the CPU of the tiny base in
examples/. The tokenizer has a word for each token, and no end, so answers are whole. Clients are sockets of this
process, which read streams. Neither Ray nor OpenAI's client is needed. Three parts, of `--seconds` each:

- `solo`: one tenant asks one of its adapters once a second, alone.
- `tenants`: two more have `--clients` requests each under way all the while, together more than the server has rows
  (256), for 16 adapters each. Given is the least service of the two by the most, after a fifth of the time, counted
  as the server does (1 for a token of a prompt, 2 for one of an answer); and what the first tenant waits by what it
  waited alone. A part must be far longer than an answer takes then: nobody's rows are taken away.
- `at_random`: 50 clients ask adapters that chance chooses of all.
"""

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_1b
import torch
import yaml
from peft import LoraConfig, get_peft_model
from random_base import random_base
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from serving.gateway.tenants import hash_of

ROOT = Path(__file__).parent.parent
WORDS = 500  # of those that the tokenizer has, that prompts are made of
SHARE = 16  # adapters of a tenant
RANDOM_CLIENTS = 50
KEYS = {"busy": "ft-busy", "other": "ft-other", "small": "ft-small"}


@dataclass
class Seen:
    """What the clients of one tenant saw."""

    service: int = 0  # tokens as the server's fair turns count them
    requests: int = 0
    answer_tokens: int = 0
    first_token_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)

    def summary(self, seconds: float) -> dict[str, Any]:
        """The figures of a tenant."""
        return {
            "requests": self.requests,
            "answer_tokens_per_s": round(self.answer_tokens / seconds, 1),
            "first_token_s": spread(self.first_token_s),
            "whole_s": spread(self.whole_s),
            "errors": self.errors,
        }


def spread(values: list[float]) -> dict[str, float]:
    """The median and the 95th percentile of some seconds."""
    if not values:
        return {}
    ordered = sorted(values)
    return {
        "median": round(statistics.median(ordered), 4),
        "p95": round(ordered[round(0.95 * (len(ordered) - 1))], 4),
    }


@dataclass
class Client:
    """Asks as one tenant, one request after the other."""

    port: int
    key: str
    adapters: Sequence[str]
    seen: Seen
    draw: random.Random
    words: int
    tokens: int

    async def ask_on(self, pause_s: float = 0) -> None:
        """Ask until it is cancelled."""
        while True:
            try:
                await self.ask()
            except (OSError, asyncio.IncompleteReadError, ValueError) as error:
                self.count_error(type(error).__name__)
            await asyncio.sleep(pause_s)

    async def ask(self) -> None:
        """One request with a fresh prompt, read as a stream."""
        text = " ".join(f"w{self.draw.randrange(WORDS)}" for _ in range(self.words))
        body = {"model": self.draw.choice(self.adapters), "prompt": text, "max_tokens": self.tokens}
        begun = time.monotonic()
        events = 0
        usage = None
        async for event in self.events(body | {"stream": True, "stream_options": {"include_usage": True}}):
            usage = event.get("usage") or usage
            if not event.get("choices"):
                continue
            if not events:
                self.seen.first_token_s.append(time.monotonic() - begun)
            events += 1
            self.count_tokens(1)
        if usage is None:
            return self.count_error("cut")
        self.count_tokens(usage["completion_tokens"] - events)
        self.seen.service += usage["prompt_tokens"]
        self.seen.requests += 1
        self.seen.whole_s.append(time.monotonic() - begun)
        return None

    async def events(self, body: dict[str, Any]) -> Any:
        """The events of one answer."""
        data = json.dumps(body).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {self.key}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n"
            writer.write(head.encode() + data)
            answer = await reader.readuntil(b"\r\n\r\n")
            status = answer.split(b" ", 2)[1].decode()
            if status != "200":
                raise ValueError(status)
            while size := int(await reader.readline(), 16):
                chunk = await reader.readexactly(size + 2)
                for line in chunk.splitlines():
                    if line.startswith(b"data: {"):
                        yield json.loads(line[6:])
        finally:
            writer.close()

    def count_tokens(self, tokens: int) -> None:
        """Count tokens of an answer."""
        self.seen.answer_tokens += tokens
        self.seen.service += 2 * tokens

    def count_error(self, name: str) -> None:
        """Count a request that failed."""
        self.seen.errors[name] = self.seen.errors.get(name, 0) + 1


class Load:
    """The clients of all parts, before one server."""

    def __init__(self, port: int, names: list[str], options: argparse.Namespace) -> None:
        self.port, self.names, self.options = port, names, options

    def client(self, tenant: str, adapters: Sequence[str], seen: Seen, seed: int) -> Client:
        """A client of a tenant."""
        key, draw = KEYS[tenant], random.Random(f"{tenant} {seed}")
        return Client(self.port, key, adapters, seen, draw, self.options.words, self.options.tokens)

    async def solo(self, seconds: float) -> Seen:
        """What the small tenant sees alone."""
        seen = Seen()
        await for_seconds([self.client("small", self.names[-1:], seen, 0).ask_on(1.0)], seconds)
        return seen

    async def tenants(self) -> dict[str, Any]:
        """What two tenants with a backlog get, and the small one beside them, after it was alone."""
        seconds = self.options.seconds
        await self.solo(3.0)  # what is compiled or read first is not counted
        alone = await self.solo(seconds)
        tell("solo", alone.summary(seconds))
        seen = {tenant: Seen() for tenant in KEYS}
        work = [self.client("small", self.names[-1:], seen["small"], 1).ask_on(1.0)]
        for tenant, first in (("busy", 0), ("other", SHARE)):
            adapters = self.names[first : first + SHARE]
            for number in range(self.options.clients):
                work.append(self.client(tenant, adapters, seen[tenant], number).ask_on())
        before: dict[str, int] = {}
        rising = seconds / 5
        loop = asyncio.get_running_loop()
        loop.call_later(rising, lambda: before.update({tenant: seen[tenant].service for tenant in seen}))
        await for_seconds(work, seconds)
        served = [seen[tenant].service - before[tenant] for tenant in ("busy", "other")]
        return {
            "solo": alone.summary(seconds),
            "tenants": {tenant: seen[tenant].summary(seconds) for tenant in seen},
            "service": served,
            "least_by_most_service": round(min(served) / max(served), 4),
            "small_share": round((seen["small"].service - before["small"]) / sum(served), 4),
            "small_first_token_by_solo": ratio(seen["small"].first_token_s, alone.first_token_s),
            "small_whole_by_solo": ratio(seen["small"].whole_s, alone.whole_s),
        }

    async def at_random(self) -> dict[str, Any]:
        """What clients see that ask any adapter of all."""
        seen = Seen()
        work = [self.client("busy", self.names, seen, -number - 1).ask_on() for number in range(RANDOM_CLIENTS)]
        await for_seconds(work, self.options.seconds)
        return seen.summary(self.options.seconds)


async def for_seconds(work: list[Any], seconds: float) -> None:
    """Let clients work for so long; an answer under way then is left."""
    tasks = [asyncio.ensure_future(client) for client in work]
    await asyncio.sleep(seconds)
    for task in tasks:
        task.cancel()
    for done in await asyncio.gather(*tasks, return_exceptions=True):
        if not isinstance(done, asyncio.CancelledError):
            raise done
    await asyncio.sleep(1.0)  # the server lets go of what it did for them


def ratio(beside: list[float], alone: list[float]) -> float | None:
    """Median by median."""
    if not beside or not alone:
        return None
    return round(statistics.median(beside) / statistics.median(alone), 3)


def shape_for(device: str) -> dict[str, Any]:
    """The shape of Llama-3.2-1B for a GPU, that of the tiny base for the CPU."""
    shape = llama_1b.SHAPE
    if device == "cpu":
        plain = json.loads((ROOT / "examples" / "tiny" / "config.json").read_text())
        shape = {name: plain[name] for name in shape.keys() & plain.keys()}
    return shape


def random_adapters(base: Path, folder: Path, count: int, rank: int) -> list[Path]:
    """The folders of adapters that differ in all their numbers, like one that PEFT saves."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
    first = folder / "first"
    get_peft_model(model, config, autocast_adapter_dtype=False).save_pretrained(first, save_embedding_layers=False)
    shapes = load_file(first / "adapter_model.safetensors")
    numbers = sum(tensor.numel() for tensor in shapes.values())
    noise = 0.05 * torch.randn(numbers + 61 * count, dtype=torch.bfloat16)
    folders = []
    for number in range(count):
        place = folder / f"task-{number}"
        place.mkdir()
        (place / "adapter_config.json").write_bytes((first / "adapter_config.json").read_bytes())
        parts = noise[61 * number : 61 * number + numbers].split([t.numel() for t in shapes.values()])
        tensors = {name: part.view(t.shape).clone() for part, (name, t) in zip(parts, shapes.items(), strict=True)}
        save_file(tensors, place / "adapter_model.safetensors")
        folders.append(place)
    return folders


@contextmanager
def server(base: Path, adapters: list[Path], folder: Path, device: str) -> Iterator[tuple[int, float]]:
    """The port of a server that ends with the block, and the seconds that its start took."""
    tenants = []
    for name, key in KEYS.items():
        tenants.append({"name": name, "keys": [hash_of(key)], "adapters": ["*"], "answers_at_once": 4096})
    file = folder / "tenants.yaml"
    file.write_text(yaml.safe_dump({"tenants": tenants}))
    command = [sys.executable, "-P", "-m", "orchestrator", "serve", "--no-ray", "--port", "0", "--base", str(base)]
    command += ["--tenants", str(file), "--folder", str(folder / "usage")]
    command += [word for place in adapters for word in ("--adapters", f"{place.name}={place}")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    began = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        said = re.match(r"serving on http://\S+:(\d+)$", process.stdout.readline())
        if said is None:
            sys.exit("the server did not start: what it says is above")
        yield int(said[1]), time.monotonic() - began
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(90)
        process.kill()


def main() -> None:
    """Read the command line, measure, and write what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=192, help="of each tenant that has a backlog")
    parser.add_argument("--words", type=int, default=128, help="of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, at most")
    parser.add_argument("--seconds", type=float, default=60, help="of each part")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: found cuda, and no GPU is here")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
        base = random_base(folder / "base", shape_for(options.device), dtype, options.device)
        adapters = random_adapters(base, folder, options.adapters, options.rank)
        tell("adapters written", len(adapters))
        with server(base, adapters, folder, options.device) as (port, start_s):
            tell("the server is up after seconds", round(start_s, 1))
            load = Load(port, [adapter.name for adapter in adapters], options)
            result = asyncio.run(measured(load)) | {"start_s": round(start_s, 1)}
    settings = {
        name: getattr(options, name) for name in ("rank", "adapters", "clients", "words", "tokens", "seconds")
    }
    result = {"device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu", **settings, **result}
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def tell(what: str, seen: Any) -> None:
    """Print what has been done so far."""
    print(f"{time.strftime('%H:%M:%S')} {what}: {json.dumps(seen)}", flush=True)


async def measured(load: Load) -> dict[str, Any]:
    """The figures of all parts."""
    tenants = await load.tenants()
    tell("tenants", tenants)
    return tenants | {"at_random": await load.at_random()}


if __name__ == "__main__":
    main()
