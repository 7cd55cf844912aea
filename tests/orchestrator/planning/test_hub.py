"""Bases that are not in a folder: in the hub's cache, or on a hub (here a server on loopback)."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from jobs import CONFIG, make_base

from orchestrator.errors import InputError
from orchestrator.planning.base import find_model
from orchestrator.planning.model import parameter_count
from runfolder.job import Job

PAGES = {
    "/good/base/resolve/main/config.json": (200, json.dumps(CONFIG).encode()),
    "/good/base/resolve/v2/config.json": (200, json.dumps({**CONFIG, "num_hidden_layers": 1}).encode()),
    "/gptq/base/resolve/main/config.json": (
        200,
        json.dumps({**CONFIG, "quantization_config": {"quant_method": "gptq"}}).encode(),
    ),
    "/t5/base/resolve/main/config.json": (200, b'{"model_type": "t5"}'),
    "/gated/base/resolve/main/config.json": (401, b""),
    "/broken/base/resolve/main/config.json": (200, b"<html>"),
    "/list/base/resolve/main/config.json": (200, b"[]"),
}


MOVED = "/moved"  # a prefix of paths that are answered with another place
seen: list[tuple[str, str, str | None]] = []  # host, path and Authorization of every request


class Hub(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        host = self.headers["Host"].partition(":")[0]
        seen.append((host, self.path, self.headers.get("Authorization")))
        code, body = PAGES.get(self.path, (404, b""))
        if self.path.startswith(MOVED):
            code = 307
        self.send_response(code)
        if code == 307:
            there = {"/moved-away": f"http://localhost:{self.server.server_address[1]}"}
            owner = self.path.split("/")[1]
            self.send_header("Location", there.get(f"/{owner}", "") + self.path.replace(owner, "good"))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub with a few configs, and an empty cache."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield
    server.shutdown()


def job(base: str, revision: str | None = None) -> Job:
    found = {"base": {"model": base, "revision": revision}, "data": "/x.jsonl", "train": {"steps": 3}}
    return Job.model_validate(found)


def refusal(base: str) -> str:
    with pytest.raises(InputError) as error:
        find_model(job(base))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_shapes_come_from_the_config_on_the_hub() -> None:
    whole, half = find_model(job("good/base")), find_model(job("good/base", "v2"))
    assert whole.folder is None and whole.config["max_position_embeddings"] == 64
    assert parameter_count(whole.shapes) > parameter_count(half.shapes)


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        ("none/base", "404, no such model or revision"),
        ("gated/base", "401, not allowed or no such model (set HF_TOKEN for a gated one)"),
        ("broken/base", "gives no config.json"),
        ("list/base", "gives a config.json that is no object"),
    ],
)
def test_a_hub_that_refuses(base: str, reason: str) -> None:
    assert reason in refusal(base)


@pytest.mark.parametrize("base", ["./base", "a/b/c", "/none", "-x/y", "a b"])
def test_what_is_no_id_is_not_asked_for(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert (
        refusal(base) == f"base.model: found {base!r}, which is no folder; allowed: a folder, or a hub id owner/name"
    )


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert "Connection refused" in refusal("good/base")
    monkeypatch.setenv("HF_ENDPOINT", "hub.example.org")
    assert "hub.example.org gives no config.json: unknown url type" in refusal("good/base")


def test_the_token_stays_with_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """`localhost` is another host than 127.0.0.1; a model that was only renamed stays on the same one."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for owner, follows in (("moved", "Bearer hf_secret"), ("moved-away", None)):
        seen.clear()
        assert find_model(job(f"{owner}/base")).config["model_type"] == CONFIG["model_type"]
        assert [token for _, _, token in seen] == ["Bearer hf_secret", follows]


def test_offline_only_the_cache_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in refusal("good/base")
    repository = tmp_path / "hf" / "hub" / "models--good--base"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c0ffee")
    make_base(repository / "snapshots" / "c0ffee")
    assert find_model(job("good/base")).folder == repository / "snapshots" / "c0ffee"
    assert find_model(job("good/base", "c0ffee")).folder == repository / "snapshots" / "c0ffee"


def test_a_cached_adapter_is_no_base(tmp_path: Path) -> None:
    repository = tmp_path / "hf" / "hub" / "models--some--adapter"
    snapshot = repository / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c0ffee")
    (snapshot / "adapter_config.json").write_text('{"base_model_name_or_path": "good/base"}')
    assert "found an adapter (adapter_config.json) and no base; name its base (good/base)" in refusal("some/adapter")


@pytest.mark.parametrize(
    ("base", "reason"),
    [("gptq/base", "it is quantised already (gptq)"), ("t5/base", "an encoder with a decoder")],
)
def test_what_the_config_on_the_hub_shows(base: str, reason: str) -> None:
    assert reason in refusal(base)
