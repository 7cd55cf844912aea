"""A service as a run: what is submitted, how its controller serves, and what ends it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from typer.testing import CliRunner
from waiting import until

from clusters.answer import answer
from clusters.base import ClusterStatus, Standing
from clusters.controllers import REQUEUE, REQUEUED
from clusters.local import Local
from clusters.remote.shelf import Shelf
from clusters.slurm import Slurm
from clusters.slurm_script import SlurmConfig
from orchestrator import backends
from orchestrator.commands.serve import serve_app
from orchestrator.errors import InputError
from orchestrator.forwarding import forwarding
from orchestrator.runs import new_id, remember
from orchestrator.serve import Serving
from orchestrator.serve_on_cluster import serve_on_cluster, service_resources
from orchestrator.status import Status, join_status
from orchestrator.terminal.status_text import output_lines, status_lines
from orchestrator.tracking.collect import deliver_all
from runfolder.chain import attempts, claim_next
from runfolder.files import Damaged
from runfolder.record import load_any_job, load_job
from runfolder.resources import Resources
from runfolder.service import ServiceSpec
from runfolder.site import LocalSite
from runfolder.snapshot import snapshot
from serving.gateway.tenants import hash_of

pytestmark = pytest.mark.usefixtures("home")
ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny"
GOLDEN = Path(__file__).parent / "golden" / "slurm_service.sh"
KEY = "ft-key-of-alice"


@pytest.fixture
def tenants(tmp_path: Path) -> Path:
    """A tenants file with Alice, who may ask the base."""
    path = tmp_path / "tenants.yaml"
    path.write_text(
        f"tenants:\n- name: alice\n  keys: ['{hash_of(KEY)}']\n  adapters: [tiny]\n  tokens_per_day: 500\n"
    )
    return path


def made(home: Path, **changes: Any) -> Path:
    """The run folder of a service."""
    service = ServiceSpec(name="mine", base=str(TINY), **changes)
    run_id = new_id("mine")
    site = LocalSite(home / "runs")
    site.create(run_id, {"cluster": "local", "submitted": 1.0, "digests": {}, "job": service.dump()})
    return site.root / run_id


@contextmanager
def controller(run_dir: Path, **variables: str) -> Iterator["subprocess.Popen[str]"]:
    """The controller of a run, as a batch job starts it."""
    command = [sys.executable, "-P", "-m", "orchestrator.controller", str(run_dir)]
    environment = os.environ | {"RAY_ADDRESS": "127.0.0.1:1", "PYTHONPATH": str(ROOT)} | variables
    with subprocess.Popen(command, env=environment, start_new_session=True, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def stands(run_dir: Path) -> Status:
    """How a run stands while its cluster has a job of it."""
    return join_status(Standing(snapshot(run_dir), ClusterStatus("running")))


def serving(run_dir: Path) -> Status:
    """How a service stands once it serves."""
    until(lambda: stands(run_dir).address)
    return stands(run_dir)


def ask(address: str | None, tokens: int = 5) -> httpx2.Response:
    """A completion of the base; the address has this machine's name, which may not be its own to resolve."""
    assert address
    port = address.rpartition(":")[2]
    body = {"model": "tiny", "prompt": "1 + 2 =", "max_tokens": tokens, "temperature": 0}
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx2.post(f"http://127.0.0.1:{port}/v1/completions", json=body, headers=headers, timeout=60)


def test_it_serves_over_attempts_that_share_its_quotas_until_it_is_cancelled(home: Path, tenants: Path) -> None:
    run_dir = made(home, tenants=str(tenants))
    with controller(run_dir, **REQUEUED) as first:
        found = serving(run_dir)
        assert found.state == "running" and found.activity and found.activity.doing == f"serving on {found.address}"
        assert ("address", found.address) in list(output_lines(found))
        assert "progress" not in dict(status_lines(found))
        assert ask(found.address, 300).status_code == 200
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == REQUEUE
    assert attempts(run_dir)[0].verdict["kind"] == "preemption"  # type: ignore[index]
    assert (stands(run_dir).state, stands(run_dir).address) == ("preempted", None)
    with controller(run_dir, **REQUEUED) as second:
        found = serving(run_dir)
        assert found.attempt == 2
        used = sum(ask(found.address, 1).json()["usage"]["total_tokens"] for _ in range(2))
        assert ask(found.address, 495 - used).status_code == 429, "what the first attempt gave still counts"
        LocalSite(home / "runs").ask(run_dir.name, "cancel")
        assert second.wait(60) == 0
    ended = stands(run_dir)
    assert (ended.state, ended.reason, ended.address) == ("cancelled", "cancelled by request", None)


def test_what_it_is_refused_for_ends_it_and_is_said(home: Path, tenants: Path, tmp_path: Path) -> None:
    run_dir = made(home, tenants=str(tenants), adapters={"a": str(tmp_path)})
    with controller(run_dir) as process:
        assert process.wait(60) == 0
    ended = stands(run_dir)
    assert (ended.state, ended.verdict) == ("failed", "user_error")
    assert "found no adapter_config.json" in (ended.reason or "")


def test_a_server_whose_controller_dies_ends_too(home: Path, tenants: Path) -> None:
    run_dir = made(home, tenants=str(tenants))
    with controller(run_dir) as process:
        found = serving(run_dir)
        process.kill()
        process.wait()

        def is_gone() -> bool:
            try:
                return ask(found.address).status_code == 503
            except httpx2.TransportError:
                return True

        until(is_gone)


def test_the_script_on_slurm_is_a_pure_function(tmp_path: Path) -> None:
    service = ServiceSpec(
        name="mine", base="b", tenants="/t.yaml", resources=Resources(gpus_per_node=4, walltime="8h", grace=60)
    )
    config = SlurmConfig(kind="slurm", partition="gpu")
    request = Slurm(config, tmp_path).request(service, "mine-0123456789", 1)
    text = request.text.replace(str(tmp_path), "HOME").replace(sys.executable, "PYTHON")
    assert text == GOLDEN.read_text()
    asked = {"verb": "request", "job": service.dump(), "run_id": request.run_id, "submission": 1, "secrets": []}
    over_a_link = answer(Slurm(config, tmp_path), Shelf(tmp_path / "files"), json.loads(json.dumps(asked)))
    assert over_a_link["text"] == request.text
    container = {"image": "/i.sif", "python": "/p"}
    inside = Slurm(SlurmConfig.model_validate({"kind": "slurm", "container": container}), tmp_path)
    (tmp_path / "a").mkdir()
    bound = service.model_copy(update={"adapters": {"a": "/usr/lib"}, "tenants": str(tmp_path / "a" / "t.yaml")})
    command = inside.request(bound, request.run_id, 1).text.splitlines()[-1]
    assert "--bind /usr/lib " in command and f"--bind {tmp_path} " in command and "--nv" in command


def test_a_service_is_no_job_that_trains(home: Path, tenants: Path) -> None:
    run_dir = made(home, tenants=str(tenants))
    spec = load_any_job(run_dir)
    assert isinstance(spec, ServiceSpec) and spec.base == str(TINY)
    with pytest.raises(Damaged, match="found a service; allowed: a job that trains"):
        load_job(run_dir)


def test_nothing_of_it_is_for_mlflow(home: Path, tenants: Path) -> None:
    run_dir = made(home, tenants=str(tenants))
    remember(run_dir.name, "elsewhere")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends.CLUSTERS, "elsewhere", Local.here)
        assert claim_next(run_dir, None) is not None
        assert deliver_all() == {}


def test_what_is_wrong_is_said_before_anything_is_submitted(home: Path, tenants: Path, tmp_path: Path) -> None:
    nobody = Serving(str(TINY), (), None, "127.0.0.1", 0, None)
    with pytest.raises(InputError, match="--tenants: missing; others reach the nodes"):
        serve_on_cluster(nobody, "local", "mine", Resources())
    named = Serving(str(TINY), (f"a={tmp_path}",), tenants, "127.0.0.1", 0, None)
    with pytest.raises(InputError, match="name: Value error, must be at most 32"):
        serve_on_cluster(named, "local", "Mine!", Resources())
    with pytest.raises(InputError, match="found no adapter_config.json"):
        serve_on_cluster(named, "local", "mine", Resources())
    with pytest.raises(InputError, match="--walltime: .*; allowed: like 90s, 30m, 8h, 2d"):
        service_resources(None, "long")
    assert not (home / "runs").exists() or list((home / "runs").iterdir()) == []


def test_options_that_would_say_nothing_are_refused(tenants: Path) -> None:
    command = ["serve", "--base", str(TINY), "--tenants", str(tenants)]
    for options, said in (
        (["--cluster", "hpc", "--port", "1", "--no-ray"], "--cluster: found with --port, --no-ray; allowed: without"),
        (["--gpus", "2"], "--gpus: allowed: with --cluster"),
    ):
        with pytest.raises(InputError, match=said):
            CliRunner().invoke(serve_app, [*command, *options], catch_exceptions=False)


def test_how_it_is_reached_from_a_laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clusters = {"far": {"kind": "slurm", "link": {"ssh": "me@login"}}, "near": {"kind": "slurm"}}
    (tmp_path / "clusters.yaml").write_text(yaml.safe_dump(clusters))
    monkeypatch.setenv("FLEETUNE_CLUSTERS", str(tmp_path / "clusters.yaml"))
    address = "http://node1:41235"
    assert forwarding("far", address) == "ssh -N -L 8000:node1:41235 me@login    # then http://127.0.0.1:8000"
    assert forwarding("near", address) == forwarding("local", address) == address
