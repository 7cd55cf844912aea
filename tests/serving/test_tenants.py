"""Tenants are kept apart: keys, adapters of one's own, quotas, rates, and what operators see."""

import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx2
import openai
import pytest
from adapters import Exported, export
from gateway_server import KEYS, client_of, files_of, gateway, tenants_of
from waiting import until

from serving.gateway.account import Account
from serving.gateway.refusal import ApiRefusal
from serving.gateway.server import Server
from serving.gateway.tenants import Tenant, TenantsRefused, hash_of, new_key, read_tenants


@pytest.fixture(scope="module")
def server(tiny_base: Path, served: dict[str, Exported]) -> Iterator[Server]:
    """A gateway with tenants."""
    folders = {name: served[name].folder for name in ("lora", "dora")}
    with gateway(tiny_base, folders, tenants_of()) as started:
        yield started


def bring(server: Server, who: str, name: str, folder: Path) -> httpx2.Response:
    """Upload an adapter as its owner."""
    headers = {"Authorization": f"Bearer {KEYS[who]}"}
    return httpx2.post(f"{server.address}/v1/adapters", data={"name": name}, files=files_of(folder), headers=headers)


def drop(server: Server, who: str, name: str) -> httpx2.Response:
    """Delete an adapter as somebody."""
    headers = {"Authorization": f"Bearer {KEYS[who]}"}
    return httpx2.delete(f"{server.address}/v1/adapters/{name}", headers=headers)


def ask(server: Server, who: str, model: str, prompt: str = "1 + 2 =") -> str:
    """A greedy completion."""
    client = client_of(server, who)
    return client.completions.create(model=model, prompt=prompt, max_tokens=12, temperature=0).choices[0].text


def test_each_sees_and_uses_what_is_allowed_and_nothing_else(server: Server) -> None:
    assert [model.id for model in client_of(server, "alice").models.list()] == ["tiny", "lora"]
    assert [model.id for model in client_of(server, "bob").models.list()] == ["dora"]
    assert list(client_of(server, "eve").models.list()) == []
    assert ask(server, "alice", "lora")
    for who, model in (("alice", "dora"), ("bob", "lora"), ("bob", "tiny"), ("eve", "lora"), ("bob", "nothing")):
        with pytest.raises(openai.NotFoundError, match="which is not here or not yours"):
            ask(server, who, model)
    with pytest.raises(openai.AuthenticationError):
        ask(server, "nobody", "lora")


def test_two_tenants_have_an_adapter_each_of_one_name(
    server: Server, served: dict[str, Exported], tiny_base: Path, tmp_path: Path
) -> None:
    other = export(tiny_base, "lora", tmp_path / "other", seed=5)
    assert bring(server, "alice", "mine", served["lora"].folder).status_code == 201
    assert bring(server, "bob", "mine", other.folder).status_code == 201
    assert ask(server, "alice", "mine") == ask(server, "alice", "lora") != ask(server, "bob", "mine")
    assert drop(server, "eve", "mine").status_code == 404
    assert drop(server, "bob", "mine").json() == {"id": "mine", "object": "model", "deleted": True}
    with pytest.raises(openai.NotFoundError):
        ask(server, "bob", "mine")
    assert ask(server, "alice", "mine") == ask(server, "alice", "lora")
    assert drop(server, "alice", "mine").status_code == 200
    assert drop(server, "alice", "lora").status_code == 404  # what is shared is the operator's


def test_a_name_that_is_brought_anew_serves_the_new_weights(
    server: Server, served: dict[str, Exported], tiny_base: Path, tmp_path: Path
) -> None:
    again = export(tiny_base, "lora", tmp_path / "again", seed=9)
    assert bring(server, "bob", "fresh", again.folder).status_code == 201
    new = ask(server, "bob", "fresh")
    assert drop(server, "bob", "fresh").status_code == 200
    first = bring(server, "alice", "task", served["lora"].folder).json()["digest"]
    old = ask(server, "alice", "task")
    asked = {"model": "task", "prompt": "1 + 2 =", "max_tokens": 100, "temperature": 0, "stream": True}
    chunks = iter(client_of(server, "alice").completions.create(**asked))
    begun = next(chunks).choices[0].text
    assert bring(server, "alice", "task", again.folder).json()["digest"] != first
    assert ask(server, "alice", "task") == new != old
    under_way = begun + "".join(chunk.choices[0].text for chunk in chunks)
    assert under_way.startswith(old)  # a request keeps the weights that it began with
    assert drop(server, "alice", "task").status_code == 200


def test_adapters_of_ones_own_are_limited_and_take_no_name_of_others(
    server: Server, served: dict[str, Exported]
) -> None:
    folder = served["lora"].folder
    assert bring(server, "alice", "lora", folder).status_code == 409
    assert bring(server, "eve", "one", folder).status_code == 403
    host, _, port = server.address.removeprefix("http://").partition(":")
    head = f"POST /v1/adapters HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEYS['eve']}\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(f"{head}Content-Length: {10**9}\r\n\r\n".encode())
        assert b" 403 " in connection.recv(64), "what nobody may bring is not waited for"
    for name in ("a", "b", "c"):
        assert bring(server, "bob", name, folder).status_code == 201
    refused = bring(server, "bob", "d", folder)
    assert refused.status_code == 403 and "found 3; allowed: 3 of your own" in refused.json()["error"]["message"]
    assert bring(server, "bob", "c", folder).status_code == 201
    for name in ("a", "b", "c"):
        drop(server, "bob", name)


def test_operators_read_tokens_and_residency_by_tenant_and_adapter(
    server: Server, served: dict[str, Exported]
) -> None:
    bring(server, "bob", "counted", served["dora"].folder)
    ask(server, "bob", "counted")
    url = f"{server.address}/metrics"
    assert httpx2.get(url).status_code == 401
    assert httpx2.get(url, headers={"Authorization": f"Bearer {KEYS['alice']}"}).status_code == 403
    operator = {"Authorization": f"Bearer {KEYS['operator']}"}
    text = httpx2.get(url, headers=operator).text
    assert re.search(r'^fleetune_answer_tokens_total{adapter="counted",tenant="bob"} [1-9]', text, re.MULTILINE)
    assert 'fleetune_adapter_resident{adapter="counted",tenant="bob"} 1.0' in text
    assert re.search(r'^fleetune_time_to_first_token_seconds_count{tenant="bob"} [1-9]', text, re.MULTILINE)
    drop(server, "bob", "counted")
    assert 'adapter="counted"' not in httpx2.get(url, headers=operator).text


def test_quotas_and_rates_refuse_and_say_when_to_come_back(tiny_base: Path, served: dict[str, Exported]) -> None:
    tenants = tenants_of(alice={"tokens_per_day": 60}, bob={"requests_per_minute": 2})
    with gateway(tiny_base, {name: served[name].folder for name in ("lora", "dora")}, tenants) as server:
        ask(server, "alice", "lora")  # takes at most 12 and its prompt, and gives the rest back
        with pytest.raises(openai.RateLimitError, match="left of 60 today") as over:
            client_of(server, "alice").completions.create(model="lora", prompt="1", max_tokens=60)
        assert 1 <= int(over.value.response.headers["retry-after"]) <= 86401
        ask(server, "bob", "dora")
        ask(server, "bob", "dora")
        with pytest.raises(openai.RateLimitError, match="more than 2 in a minute") as over:
            ask(server, "bob", "dora")
        assert 1 <= int(over.value.response.headers["retry-after"]) <= 31
        assert bring(server, "bob", "more", served["lora"].folder).status_code == 429
        assert ask(server, "alice", "lora")


def test_who_asks_for_too_much_at_once_fills_the_queue_for_nobody_else(
    tiny_base: Path, served: dict[str, Exported], monkeypatch: pytest.MonkeyPatch
) -> None:
    with gateway(tiny_base, {"lora": served["lora"].folder}, tenants_of(bob={"adapters": ["lora"]})) as server:
        engine = server.service.answering.engine
        monkeypatch.setattr(engine, "step", lambda: time.sleep(0.01))
        client = client_of(server, "bob")
        with ThreadPoolExecutor(2) as threads:
            asked = {"model": "lora", "prompt": "1", "n": 32, "max_tokens": 2}
            taken = [threads.submit(client.completions.create, **asked) for _ in range(2)]
            until(lambda: server.service.under_way == 64)
            with pytest.raises(openai.RateLimitError, match="found 64 and 32 more at once; allowed: 64"):
                client.completions.create(**asked)
            monkeypatch.undo()
            assert ask(server, "alice", "lora")
            assert [len(reply.result().choices) for reply in taken] == [32, 32]


def test_answers_at_once_are_limited() -> None:
    account = Account(Tenant(name="a", answers_at_once=1))
    account.begin()
    with pytest.raises(ApiRefusal, match="found 1 and 1 more at once; allowed: 1"):
        account.begin()


def test_adapters_on_their_way_are_few_as_they_lie_on_the_disk() -> None:
    account = Account(Tenant(name="a", uploads=100))
    with ExitStack() as under_way:
        for _ in range(4):
            under_way.enter_context(account.uploading())
        with pytest.raises(ApiRefusal, match="found 4 on their way; allowed: 4 at once"), account.uploading():
            pass
        assert account.answers == 4
    assert (account.answers, account.uploads) == (0, 0)


def test_a_tenants_file_is_checked(tmp_path: Path) -> None:
    key, path = new_key(), tmp_path / "tenants.yaml"
    path.write_text(f"tenants:\n- name: alice\n  keys: ['{hash_of(key)}']\n  adapters: ['support-*']\n")
    tenants = read_tenants(path)
    found = tenants.of_key(key)
    assert found and found.may_use("support-1") and not found.may_use("other")
    assert tenants.of_key(key + "x") is None
    for text, said in (
        (f"tenants:\n- name: alice\n  keys: ['{key}']\n", "tenants.0.keys.0: String should match"),
        ("tenants:\n- name: Alice\n", "tenants.0.name: String should match"),
        ("tenants:\n- name: a\n  quota: 3\n", "tenants.0.quota: Extra inputs are not permitted"),
        ("tenants:\n- name: a\n- name: a\n", "found the tenant a twice"),
        ("tenants: [", "tenants.yaml"),
        ("", "Input should be"),
    ):
        path.write_text(text)
        with pytest.raises(TenantsRefused, match=re.escape(said)):
            read_tenants(path)
