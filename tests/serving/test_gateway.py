"""The API as its clients use it: OpenAI's own client against a real server on loopback."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from adapters import Exported
from gateway_server import gateway

from serving.engine import Engine
from serving.gateway.server import Server
from serving.gateway.text import Codec
from serving.sequence import Request

PROMPT = "What is 12 + 30?"


@pytest.fixture(scope="module")
def server(tiny_base: Path, served: dict[str, Exported]) -> Iterator[Server]:
    """A gateway without tenants."""
    with gateway(tiny_base, {name: exported.folder for name, exported in served.items()}) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    """OpenAI's client, told where this server is."""
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)


def expected(base: Path, served: dict[str, Exported], adapter: str | None, tokens: int) -> str:
    """What an engine of its own says behind the prompt, as text."""
    engine = Engine(base, tokens=1024, positions=128, adapter_bytes=2**20)
    if adapter:
        engine.load(adapter, served[adapter].folder)
    codec = Codec(base)
    ids = codec._encode(PROMPT, True)
    (answer,) = engine.generate([Request(ids, adapter, tokens, codec.ends)])
    return codec.decode([*ids, *answer])[len(codec.decode(list(ids))) :]


def test_the_models_are_the_base_and_its_adapters(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "lora", "dora", "prompt"]
    assert client.models.retrieve("dora").owned_by == "shared"


@pytest.mark.parametrize("adapter", [None, "lora", "prompt"])
def test_completions_are_the_engines(
    adapter: str | None, client: openai.OpenAI, tiny_base: Path, served: dict[str, Exported]
) -> None:
    text = expected(tiny_base, served, adapter, 12)
    whole = client.completions.create(model=adapter or "tiny", prompt=PROMPT, max_tokens=12, temperature=0)
    assert whole.choices[0].text == text
    assert whole.usage and whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    options = {"include_usage": True}
    stream = client.completions.create(
        model=adapter or "tiny", prompt=PROMPT, max_tokens=12, temperature=0, stream=True, stream_options=options
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_chats_are_streamed_and_whole(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    asked = {"model": "dora", "messages": messages, "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert whole.usage and whole.usage.completion_tokens <= 8
