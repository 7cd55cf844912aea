"""A gateway under load: tokens per second, first tokens, and what tenants get of it, by a client like any other.

    fleetune serve --base B --tenants tenants.yaml --adapters a=... --adapters b=... &
    python benchmarks/serve_load.py --url http://127.0.0.1:8000 --key KEY_A=a --key KEY_B=b --clients 16 --seconds 60

Each KEY=MODEL is a tenant with so many clients that ask its model one request after the other, as streams. A line of
JSON for each tenant, and one for all: requests, tokens of answers per second, seconds to the first token (median and
95th percentile), errors by status; for all also the least service of a tenant by the most, counted as the server does
(1 for a token of a prompt, 2 for one of an answer). Tenants compete where there are more clients than rows (256).
With `--small KEY=MODEL` one more tenant asks once a second; its waiting beside the others is compared with that
alone, measured before.
"""

import argparse
import asyncio
import json
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import openai

PROMPT = "Write a long story about a small town. " * 4


@dataclass
class Seen:
    """What the clients of one tenant saw."""

    model: str
    requests: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    first_token_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)

    @property
    def service(self) -> int:
        """Tokens as the server's fair turns count them."""
        return self.prompt_tokens + 2 * self.answer_tokens

    def summary(self, seconds: float) -> dict[str, Any]:
        """The figures of one tenant."""
        ordered = sorted(self.first_token_s)
        return {
            "model": self.model,
            "requests": self.requests,
            "answer_tokens_per_s": round(self.answer_tokens / seconds, 1),
            "first_token_s_median": round(statistics.median(ordered), 4) if ordered else None,
            "first_token_s_p95": round(ordered[int(0.95 * (len(ordered) - 1))], 4) if ordered else None,
            "whole_s_median": round(statistics.median(self.whole_s), 4) if self.whole_s else None,
            "service": self.service,
            "errors": self.errors,
        }


async def ask(client: openai.AsyncOpenAI, seen: Seen, tokens: int) -> None:
    """One request, read as a stream."""
    begun = time.monotonic()
    first = True
    try:
        stream = await client.completions.create(
            model=seen.model, prompt=PROMPT, max_tokens=tokens, stream=True, stream_options={"include_usage": True}
        )
        async for event in stream:
            if first:
                seen.first_token_s.append(time.monotonic() - begun)
                first = False
            if event.usage:
                seen.prompt_tokens += event.usage.prompt_tokens
                seen.answer_tokens += event.usage.completion_tokens
    except openai.APIError as error:
        status = str(getattr(error, "status_code", type(error).__name__))
        seen.errors[status] = seen.errors.get(status, 0) + 1
        await asyncio.sleep(0.1)
        return
    seen.requests += 1
    seen.whole_s.append(time.monotonic() - begun)


async def ask_on(client: openai.AsyncOpenAI, seen: Seen, tokens: int, until: float, pause_s: float = 0) -> None:
    """Ask until a time."""
    while time.monotonic() < until:
        await ask(client, seen, tokens)
        if pause_s:
            await asyncio.sleep(pause_s)


async def run(options: argparse.Namespace) -> None:
    """Measure, and print what was seen."""

    def client_of(key: str) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{options.url}/v1", api_key=key, max_retries=0, timeout=600)

    tenants = [text.partition("=") for text in options.key]
    alone = beside = None
    work = []
    seen_by = []
    if options.small:
        key, _, model = options.small.partition("=")
        alone, beside = Seen(model), Seen(model)
        await ask_on(client_of(key), alone, options.tokens, time.monotonic() + options.seconds / 4, 1.0)
    until = time.monotonic() + options.seconds
    for key, _, model in tenants:
        client, seen = client_of(key), Seen(model)
        seen_by.append(seen)
        work += [ask_on(client, seen, options.tokens, until) for _ in range(options.clients)]
    if beside:
        key, _, model = options.small.partition("=")
        work.append(ask_on(client_of(key), beside, options.tokens, until, 1.0))
    await asyncio.gather(*work)
    for seen in seen_by:
        print(json.dumps(seen.summary(options.seconds)))
    total = {
        "answer_tokens_per_s": round(sum(seen.answer_tokens for seen in seen_by) / options.seconds, 1),
        "least_by_most_service": round(min(s.service for s in seen_by) / max(s.service for s in seen_by), 4),
    }
    if alone and beside and alone.whole_s and beside.whole_s:
        total["small_alone_s"] = round(statistics.median(alone.whole_s), 4)
        total["small_beside_s"] = round(statistics.median(beside.whole_s), 4)
    print(json.dumps(total))


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", action="append", required=True, metavar="KEY=MODEL")
    parser.add_argument("--small", metavar="KEY=MODEL")
    parser.add_argument("--clients", type=int, default=16, help="of each tenant")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
