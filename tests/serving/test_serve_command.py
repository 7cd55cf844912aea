"""`fleetune serve` as a process: what it refuses, and how it ends while answers are under way."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from adapters import Exported
from typer.testing import CliRunner

from orchestrator.errors import InputError
from orchestrator.serve import Serving, serve
from orchestrator.serve_commands import serve_app

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"host": "0.0.0.0"}, "--host: found 0.0.0.0 without --tenants; allowed: 127.0.0.1"),
        ({"adapters": ("lora",)}, "--adapters: found 'lora'; allowed: NAME=FOLDER, or NAME=RUN"),
        ({"adapters": ("a={folder}", "a={folder}")}, "--adapters: found the name a twice"),
        ({"adapters": ("a/b={folder}",)}, "adapter: found the name 'a/b'; allowed: letters"),
        ({"adapters": ("a={folder}/..",)}, "found no adapter_config.json"),
        ({"tenants_file": Path("nowhere.yaml")}, "nowhere.yaml"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_served(
    options: dict, said: str, tiny_base: Path, served: dict[str, Exported]
) -> None:
    folder = str(served["lora"].folder)
    if "adapters" in options:
        options = options | {"adapters": tuple(text.format(folder=folder) for text in options["adapters"])}
    asked = {"adapters": (), "tenants_file": None, "host": "127.0.0.1", "port": 0, "replicas": 1} | options
    with pytest.raises(InputError, match=said):
        serve(Serving(base=str(tiny_base), **asked))


def test_a_new_key_is_what_its_hash_says() -> None:
    from serving.gateway.tenants import hash_of

    lines = CliRunner().invoke(serve_app, ["key"]).stdout.split()
    assert hash_of(lines[1]) == lines[-1]


def test_it_drains_answers_what_it_has_and_ends_with_0(tiny_base: Path, served: dict[str, Exported]) -> None:
    command = [sys.executable, "-m", "orchestrator", "serve", "--base", str(tiny_base), "--port", "0", "--no-ray"]
    command += ["--adapters", f"mine={served['lora'].folder}"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            address = process.stdout.readline().removeprefix("serving on ").strip()
            asked = {"model": "mine", "prompt": "1", "max_tokens": 200, "stream": True, "temperature": 0}
            with httpx2.Client() as kept, httpx2.stream("POST", f"{address}/v1/completions", json=asked) as stream:
                assert kept.get(f"{address}/health").status_code == 200
                lines = stream.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            assert events[-1]["choices"][0]["finish_reason"] in ("length", "stop")
            assert process.wait(60) == 0
            with pytest.raises(httpx2.ConnectError):
                httpx2.get(f"{address}/health")
        finally:
            process.kill()
