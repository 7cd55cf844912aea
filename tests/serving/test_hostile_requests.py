"""Requests and adapters that mean harm, over real HTTP: each is refused or survived, and nobody else is disturbed."""

import io
import json
import pickle
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
import torch
from adapters import Exported, export, make_base
from gateway_server import KEYS, client_of, files_of, gateway, tenants_of
from pydantic import BaseModel, ValidationError
from safetensors.torch import load, save
from waiting import until

from serving.gateway.bodies import ChatBody, CompletionBody
from serving.gateway.idle import IdleConnections
from serving.gateway.server import Server
from serving.gateway.service import Allowed

LIMITS = Allowed(body_bytes=200_000, upload_bytes=8_000_000, answers=40, head_s=1.5, body_s=1.5, stalled_s=1.5)
Q = "base_model.model.model.layers.0.self_attn.q_proj"
WRITER = {"Authorization": f"Bearer {KEYS['bob']}"}


@pytest.fixture(scope="module")
def server(tiny_base: Path, served: dict[str, Exported]) -> Iterator[Server]:
    """A gateway with tenants and small limits."""
    folders = {name: served[name].folder for name in ("lora", "dora")}
    tenants = tenants_of(bob={"uploads": 100, "answers_at_once": 1000}, alice={"adapters": ["*"]})
    with gateway(tiny_base, folders, tenants, allowed=LIMITS) as started:
        yield started


@pytest.fixture(autouse=True)
def _others_are_undisturbed(server: Server) -> Iterator[None]:
    """Somebody else gets the same answer before and after, and nothing is left in the engine."""
    before = answer(server)
    yield
    assert answer(server) == before
    thread = thread_of(server)
    until(lambda: not thread.streams and thread.engine.scheduler.idle)
    cache, pool = thread.engine.cache, thread.engine.pool
    held = sum(len(resident.pages) for resident in pool._residents.values())
    assert cache.free_pages + held == cache.pages - 1
    assert all(resident.users == 0 for resident in pool._residents.values())
    assert not thread.broken


def thread_of(server: Server) -> Any:
    return server.service.answering


def answer(server: Server, model: str = "lora") -> str:
    """What somebody else asks."""
    asked = {"model": model, "prompt": "2 + 2 =", "max_tokens": 8, "temperature": 0}
    return client_of(server, "alice").completions.create(**asked).choices[0].text


def post(server: Server, body: Any, path: str = "/v1/completions", **headers: str) -> httpx2.Response:
    """A body as it is, or as JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx2.post(server.address + path, content=content, headers={**WRITER, **headers}, timeout=30)


def completion(**changes: Any) -> dict[str, Any]:
    return {"model": "dora", "prompt": "1", "max_tokens": 3} | changes


BODIES: dict[str, tuple[Any, int, str]] = {
    "negative max_tokens": (completion(max_tokens=-1), 400, "max_tokens: Input should be greater than or equal to 1"),
    "no max_tokens": (completion(max_tokens=0), 400, "max_tokens"),
    "too many tokens": (completion(max_tokens=10**9), 400, "found 1000000001 positions; allowed: at most 256"),
    "10,000 stops": (completion(stop=["x"] * 10_000), 400, "stop"),
    "an empty stop": (completion(stop=""), 400, "stop"),
    "a long stop": (completion(stop="x" * 5000), 400, "stop"),
    "invalid utf-8": (b'{"model": "dora", "prompt": "\xff\xfe"}', 400, "bytes that are no UTF-8 at 29"),
    "half a surrogate": (b'{"model": "dora", "prompt": "\\ud800"}', 400, "prompt"),
    "no json": (b"model=dora", 400, "found no JSON"),
    "empty": (b"", 400, "found no JSON"),
    "nan": (b'{"model": "dora", "prompt": "1", "temperature": NaN}', 400, "found NaN, which is no JSON"),
    "deep": (b'{"model":' + b"[" * 90_000, 400, "found no JSON"),
    "a number of 5,000 digits": (b'{"max_tokens":' + b"9" * 5000 + b"}", 400, "found no JSON"),
    "a list": ([1, 2], 400, "valid dictionary"),
    "unknown key": (completion(logit_procesor=1), 400, "logit_procesor: Extra inputs are not permitted"),
    "an unknown key of half a surrogate": (b'{"\\ud800": 1}', 400, "unable to parse raw data as a unicode string"),
    "a model of half a surrogate": (b'{"model": "\\ud800", "prompt": "1"}', 400, "unable to parse raw data"),
    "unsupported": (completion(logprobs=5), 400, "logprobs"),
    "too many answers": (completion(n=33), 400, "n: Input should be less than or equal to 32"),
    "too many prompts": (completion(prompt=["1"] * 17, n=2), 400, "more than 32 answers"),
    "many prompts": (completion(prompt=["1"] * 40), 400, "at most 32 items after validation, not 40"),
    "a truth as an id": (completion(prompt=[True]), 400, "prompt"),
    "many keys": (completion() | {f"{key}": 0 for key in range(100)}, 400, "an object of 103 keys; allowed: 64"),
    "no prompt": (completion(prompt=[]), 400, "prompt"),
    "an empty prompt": (completion(prompt=""), 400, "found no prompt"),
    "a long prompt": (completion(prompt="1 " * 9000), 400, "characters; allowed: at most"),
    "a prompt too long": (completion(prompt="1 " * 400), 400, "positions; allowed: at most 256"),
    "ids of no token": (completion(prompt=[1, 10**30]), 400, "found an id of no token"),
    "negative ids": (completion(prompt=[-1]), 400, "found an id of no token"),
    "hot": (completion(temperature=1e9), 400, "temperature"),
    "a body too large": (completion(prompt="1" * 300_000), 413, "more than 200000 bytes"),
    "another's": (completion(model="lora"), 404, "not here or not yours"),
    "a path": (completion(model="../../../etc/passwd"), 404, "not here or not yours"),
    "a path of ours": (completion(model="/lora"), 404, "not here or not yours"),
    "a path of another": (completion(model="alice/mine"), 404, "not here or not yours"),
    "a zero byte": (completion(model="dora\0"), 404, "not here or not yours"),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_hostile_body_is_refused_in_one_line(name: str, server: Server) -> None:
    body, status, said = BODIES[name]
    response = post(server, body)
    error = response.json()["error"]
    assert (response.status_code, said in error["message"]) == (status, True), error
    assert "\n" not in error["message"] and len(error["message"]) < 400


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionBody, {"model": "a", "prompt": [0, ""] * 5000}),
        (CompletionBody, {"model": "a", "prompt": [[]] * 5000}),
        (CompletionBody, {"model": "a", "prompt": "1", "stop": [1] * 5000}),
        (ChatBody, {"model": "a", "messages": [{"role": "user", "content": [{}] * 4000}]}),
        (ChatBody, {"model": "a", "messages": [{}] * 4000}),
    ],
)
def test_a_body_of_flaws_alone_is_left_at_its_first(kind: type[BaseModel], body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refused:
        kind.model_validate(body)
    assert refused.value.error_count() < 10


def test_hostile_chats_are_refused(server: Server) -> None:
    long = [{"role": "user", "content": "1 " * 1000}] * 20
    refused = post(server, {"model": "dora", "messages": long}, "/v1/chat/completions")
    assert "found 40000 characters; allowed: at most" in refused.json()["error"]["message"]
    for turns in ([], [{"role": "root", "content": "1"}], [{"role": "user", "content": {"a": 1}}], "1"):
        assert post(server, {"model": "dora", "messages": turns}, "/v1/chat/completions").status_code == 400
    asked = {"model": "dora", "messages": [{"role": "user", "content": "{{ 7 * 7 }}"}], "max_tokens": 2}
    assert post(server, asked, "/v1/chat/completions").status_code == 200


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], bytes]:
    def changed(folder: Path) -> bytes:
        tensors = load((folder / "adapter_model.safetensors").read_bytes())
        change(tensors)
        return save(tensors)

    return changed


def fill(value: float) -> Callable[[Path], bytes]:
    return weights(lambda tensors: tensors[f"{Q}.lora_A.weight"].fill_(value))


def cut(folder: Path) -> bytes:
    raw = (folder / "adapter_model.safetensors").read_bytes()
    return raw[: len(raw) // 2]


WEIGHTS: dict[str, tuple[Callable[[Path], bytes], int, str]] = {
    "truncated": (cut, 400, "found a broken or truncated file"),
    "empty": (lambda _: b"", 400, "found a broken or truncated file"),
    "a header that promises 2^60 bytes": (lambda _: b"\0" * 7 + b"\x10{}", 400, "found a broken or truncated file"),
    "a pickle": (lambda _: pickle.dumps({"a": 1}), 400, "found a broken or truncated file"),
    "nan": (fill(float("nan")), 400, "that are not finite"),
    "infinite": (fill(float("inf")), 400, "that are not finite"),
    "a wrong key": (
        weights(lambda t: t.update({"model.evil": torch.ones(1)})),
        400,
        "model.evil",
    ),
    "a missing key": (weights(lambda t: t.pop(f"{Q}.lora_B.weight")), 400, "found no tensor"),
    "a header of a million tensors": (
        lambda _: (5 * 2**20).to_bytes(8, "little") + b"{}" + b" " * (5 * 2**20 - 2),
        400,
        "found a header of 5242880 bytes; allowed: 4194304",
    ),
    "oversized": (lambda _: b"x" * 8_100_000, 413, "more than 8000000 bytes"),
}
CONFIGS: dict[str, tuple[Any, str]] = {
    "no json": (b"{", "found no JSON"),
    "deep": (b"[" * 60_000, "found no JSON"),
    "a list": ([1], "allowed: an object"),
    "large": ({"a": "x" * 70_000}, "allowed: 65536"),
    "kind": ({"peft_type": "HIRA"}, "found an adapter of kind hira"),
    "no rank": ({"r": None}, "adapter"),
    "a rank of words": ({"r": "many"}, "adapter"),
    "a rank of nothing": ({"r": 0}, "adapter"),
    "a huge rank": ({"r": 10**9}, "of shape"),
    "a scale beyond numbers": ({"lora_alpha": 10**60}, "not finite"),
    "a pattern that takes for ever": ({"rank_pattern": {"(a|a?)+$": 1}}, "patterns without groups"),
    "many repetitions": ({"alpha_pattern": {"a*a*a*a*a*b": 1}}, "patterns without groups"),
    "no pattern": ({"rank_pattern": {"[": 1}}, "patterns without groups"),
    "patterns as text": ({"rank_pattern": "q_proj"}, "allowed: an object"),
    "code of its own": ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
}


def bring(server: Server, name: str, files: dict[str, Any]) -> httpx2.Response:
    return httpx2.post(f"{server.address}/v1/adapters", data={"name": name}, files=files, headers=WRITER, timeout=30)


def assert_refused(response: httpx2.Response, status: int, said: str) -> None:
    error = response.json()["error"]
    assert (response.status_code, said in error["message"]) == (status, True), error
    assert "/tmp" not in error["message"] and "fleetune-adapter" not in error["message"]


@pytest.mark.parametrize("name", WEIGHTS)
def test_hostile_weights_are_refused(name: str, server: Server, served: dict[str, Exported]) -> None:
    make, status, said = WEIGHTS[name]
    folder = served["lora"].folder
    files = files_of(folder) | {"weights": ("adapter_model.safetensors", make(folder))}
    assert_refused(bring(server, "evil", files), status, said)
    assert post(server, completion(model="evil")).status_code == 404


@pytest.mark.parametrize("name", CONFIGS)
def test_hostile_configs_are_refused(name: str, server: Server, served: dict[str, Exported]) -> None:
    change, said = CONFIGS[name]
    files = files_of(served["lora"].folder)
    raw = change
    if not isinstance(change, bytes):
        raw = json.dumps(change if isinstance(change, list) else json.loads(files["config"][1]) | change).encode()
    assert_refused(bring(server, "evil", files | {"config": ("adapter_config.json", raw)}), 400, said)


def test_an_adapter_for_another_base_is_refused(server: Server, tmp_path: Path) -> None:
    folder = export(make_base(tmp_path / "wider", hidden_size=128), "lora", tmp_path / "other").folder
    assert_refused(bring(server, "evil", files_of(folder)), 400, "allowed on this base")


@pytest.mark.parametrize(
    "name", ["../evil", "..", "a/b", "", "a" * 65, "é", "a\0b", "a\nb", ".hidden", "tiny", "dora"]
)
def test_hostile_names_are_refused(name: str, server: Server, served: dict[str, Exported]) -> None:
    assert bring(server, name, files_of(served["lora"].folder)).status_code in (400, 409)


def test_a_name_of_a_file_is_no_path(server: Server, served: dict[str, Exported], tmp_path: Path) -> None:
    files = files_of(served["lora"].folder)
    for filename in ("../adapter_config.json", str(tmp_path / "adapter_config.json"), "config.json", "x.py"):
        refused = bring(server, "evil", files | {"config": (filename, files["config"][1])})
        assert_refused(refused, 400, "a file of another name")
    assert not list(tmp_path.iterdir())
    elsewhere = files | {"weights": (str(tmp_path / "adapter_model.safetensors"), files["weights"][1])}
    assert bring(server, "good", elsewhere).status_code == 201  # its name is never looked at
    assert not list(tmp_path.iterdir())
    for path in ("/v1/adapters/../../etc/passwd", "/v1/adapters/%2e%2e%2fgood", "/v1/adapters/alice%2fgood"):
        assert httpx2.delete(server.address + path, headers=WRITER).status_code in (404, 405)
    assert httpx2.delete(f"{server.address}/v1/adapters/good", headers=WRITER).status_code == 200


def test_weights_that_overflow_hurt_their_owner_alone(server: Server, served: dict[str, Exported]) -> None:
    folder = served["lora"].folder
    files = files_of(folder) | {"weights": ("adapter_model.safetensors", fill(3e38)(folder))}
    assert bring(server, "huge", files).status_code == 201
    before = answer(server)
    with ThreadPoolExecutor(4) as threads:
        huge = [threads.submit(post, server, completion(model="huge", max_tokens=60)) for _ in range(3)]
        assert [answer(server) for _ in range(5)] == [before] * 5
        assert {reply.result().status_code for reply in huge} == {200}
    assert httpx2.delete(f"{server.address}/v1/adapters/huge", headers=WRITER).status_code == 200


def raw_request(server: Server, body: bytes, length: int | None = None) -> socket.socket:
    """A connection on which a request was sent, and nothing was read."""
    host, _, port = server.address.rpartition("//")[2].partition(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect((host, int(port)))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {KEYS['bob']}\r\n"
    connection.sendall(f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body)
    return connection


@pytest.mark.parametrize("streams", [True, False])
def test_who_goes_away_leaves_nothing_behind(streams: bool, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    thread = thread_of(server)
    monkeypatch.setattr(thread.engine, "step", lambda: time.sleep(0.01))  # nothing is ever finished
    connections = []
    for _ in range(10):
        body = json.dumps(completion(max_tokens=200, stream=streams, temperature=0)).encode()
        connections.append(raw_request(server, body))
    until(lambda: len(thread.streams) == 10)
    for connection in connections:
        connection.close()
    until(lambda: not thread.streams and thread.engine.scheduler.idle)


def test_a_head_or_a_body_that_does_not_come_is_not_waited_for(server: Server) -> None:
    host, _, port = server.address.rpartition("//")[2].partition(":")
    with ExitStack() as stack:
        heads = []
        for head in (b"", b"POST /v1/completions HTT", b"GET /health HTTP/1.1\r\nHost: a\r\n"):
            heads.append(stack.enter_context(socket.create_connection((host, int(port)), timeout=60)))
            heads[-1].sendall(head)
        body = stack.enter_context(raw_request(server, b'{"model"', 1000))
        assert [connection.recv(4096) for connection in heads] == [b"", b"", b""]
        assert b"408" in body.recv(4096).split(b"\r\n")[0]


def test_a_connection_that_is_used_is_kept() -> None:
    class Used:
        """A connection whose requests come and are answered, each before somebody looks."""

        def __init__(self) -> None:
            self.transport, self.is_open = self, True
            self.answer()

        def answer(self, whole: bool = True) -> None:
            self.cycle = SimpleNamespace(response_complete=whole)

        def close(self) -> None:
            self.is_open = False

    used, busy, left = Used(), Used(), Used()
    idle = IdleConnections(2)
    busy.answer(whole=False)
    for now_s in range(10):
        used.answer()
        idle.look([used, busy, left], now_s)
        assert (used.is_open, busy.is_open, left.is_open) == (True, True, now_s < 3)


def test_a_body_longer_than_it_says_is_cut_and_chunks_count(server: Server) -> None:
    chunks = (b"x" * 50_000 for _ in range(6))
    response = httpx2.post(f"{server.address}/v1/completions", content=chunks, headers=WRITER, timeout=30)
    assert response.status_code == 413


def test_readers_that_take_nothing_are_left_and_hold_nobody_up(server: Server) -> None:
    for listener in server.servers[0].sockets:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # else the kernel takes it all
    body = json.dumps(completion(prompt=["1"] * 16, n=2, max_tokens=200, stream=True, temperature=1)).encode()
    with raw_request(server, body) as connection:
        until(lambda: server.service.under_way == 32)
        assert answer(server)
        until(lambda: server.service.under_way == 0)
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    assert received.startswith(b"HTTP/1.1 200") and b"[DONE]" not in received


def test_a_full_queue_says_when_to_come_back(server: Server) -> None:
    body = completion(prompt=["1"] * 16, n=2, max_tokens=200, temperature=0)
    with ThreadPoolExecutor(4) as threads:
        replies = [reply.result() for reply in [threads.submit(post, server, body) for _ in range(4)]]
    by_status = sorted(reply.status_code for reply in replies)
    assert by_status[0] == 200 and by_status[-1] == 429
    assert all(reply.headers["retry-after"] == "2" for reply in replies if reply.status_code == 429)


def test_other_paths_and_methods_have_errors_of_the_same_shape(server: Server) -> None:
    for method, path in (("GET", "/v1/completions"), ("GET", "/etc/passwd"), ("POST", "/"), ("GET", "/v1/../x")):
        response = httpx2.request(method, server.address + path, headers=WRITER)
        assert response.status_code in (404, 405) and response.json()["error"]["message"]


def test_forms_that_lack_parts_or_have_too_many_are_refused(server: Server, served: dict[str, Exported]) -> None:
    files = files_of(served["lora"].folder)
    url = f"{server.address}/v1/adapters"
    assert bring(server, "x", {"config": files["config"]}).status_code == 400
    assert httpx2.post(url, content=b"{}", headers=WRITER).status_code == 400
    many = [("file", (f"{number}", io.BytesIO(b"1"))) for number in range(50)]
    assert httpx2.post(url, data={"name": "x"}, files=many, headers=WRITER).status_code == 400
