"""Two replicas through Ray Serve: an adapter on both, one killed under load; and who is chosen for what."""

import importlib
import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import httpx2
import openai
import pytest
import ray
from adapters import Exported
from gateway_server import KEYS, client_of, files_of, gateway
from ray import serve
from waiting import until

from k8s.rayservice import serve_config
from runfolder.service import ServiceSpec
from serving.gateway.routing import AHEAD, Router
from serving.gateway.server import EngineSizes
from serving.gateway.tenants import hash_of

SIZES = EngineSizes(residents=4, rows=8, positions=256, tokens=4096, adapter_bytes=2**21)


def test_requests_go_where_their_adapter_is_until_others_have_far_less_to_do() -> None:
    router = Router(3)
    first = router.choose("a")
    assert [router.choose("a") for _ in range(AHEAD)] == [first] * AHEAD
    second = router.choose("a")
    assert second != first and sorted(router.holders("a")) == sorted([first, second])
    other = router.choose("b")
    assert other not in (first, second)
    router.failed(first)
    assert router.holders("a") == [second] and router.choose("a") == second
    for number in (second, other):
        router.failed(number)
    assert router.choose("a") is None
    router.recovered(first)
    assert router.holders("a") == [] and router.choose("a") == first


def test_a_replica_is_killed_under_load_and_no_request_is_lost(tiny_base: Path, served: dict[str, Exported]) -> None:
    folders = {"lora": served["lora"].folder}
    with gateway(tiny_base, folders, sizes=SIZES) as server:
        client = client_of(server)
        expected = {("lora", length): answer(client, "lora", length) for length in (8, 100)}
    with gateway(tiny_base, folders, sizes=SIZES, replicas=2) as server:
        client = client_of(server)
        replicas = server.service.answering
        asked = [("lora", length) for length in (8, 100)] * 24
        with ThreadPoolExecutor(24) as threads:
            answers = [threads.submit(answer, client, *request) for request in asked]
            until(lambda: min(replicas.router.loads) >= 2)
            assert sorted(replicas.router.holders(digest_of(client, "lora"))) == [0, 1]
            _, victim = replicas.handles[0].about.remote().result()
            os.kill(victim, signal.SIGKILL)
            assert [found.result() for found in answers] == [expected[request] for request in asked]
        assert answer(client, "lora", 8) == expected["lora", 8]
        files = files_of(served["prompt"].folder)
        brought = httpx2.post(f"{server.address}/v1/adapters", data={"name": "mine"}, files=files, timeout=60)
        assert brought.status_code == 201, brought.text
        assert answer(client, "mine", 8)
        until(lambda: len(replicas.router.up) == 2, timeout_s=120)
        _, successor = replicas.handles[0].about.remote().result()
        assert successor != victim
        assert httpx2.get(f"{server.address}/metrics").status_code == 200


@pytest.mark.chaos
def test_the_application_for_a_ray_serve_of_others_answers_over_its_proxies(
    tiny_base: Path, served: dict[str, Exported], tmp_path: Path
) -> None:
    tenants = tmp_path / "tenants.yaml"
    tenants.write_text(f"tenants:\n- name: alice\n  keys: ['{hash_of(KEYS['alice'])}']\n  adapters: [lora]\n")
    spec = ServiceSpec(base=str(tiny_base), adapters={"lora": str(served["lora"].folder)}, tenants=str(tenants))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = serve_config(spec.dump() | {"engines": 1, "usage": str(tmp_path / "usage"), "sizes": asdict(SIZES)})
    (described,) = config["applications"]
    module, _, name = described["import_path"].partition(":")
    build = getattr(importlib.import_module(module), name)
    ray.init("local", include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build(described["args"]), name=described["name"], route_prefix=described["route_prefix"])
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEYS["alice"], max_retries=0)
        assert [model.id for model in client.models.list()] == ["lora"]
        assert answer(client, "lora", 60)[:8] == answer(client, "lora", 8)[:8] != ""
        with pytest.raises(openai.NotFoundError):
            answer(client, "tiny", 8)
    finally:
        serve.shutdown()
        ray.shutdown()


def answer(client: openai.OpenAI, model: str, tokens: int) -> str:
    """A greedy answer, read as a stream where it is long."""
    asked = {"model": model, "prompt": "1 + 2 =", "max_tokens": tokens, "temperature": 0, "timeout": 120}
    if tokens < 50:
        return client.completions.create(**asked).choices[0].text
    return "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True))


def digest_of(client: openai.OpenAI, model: str) -> str:
    return str(client.models.retrieve(model).model_extra["digest"])
