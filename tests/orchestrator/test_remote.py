"""A cluster of another machine over a real sshd: its code is sent, its connection reused, and a cut is no failure."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from jobs import make_job, only_queued
from ssh_server import WHY_NOT, SshServer, can_serve, ssh_server

import fleetune
from clusters.base import Unreachable
from clusters.remote.code import installed_code
from clusters.remote.link import sockets_folder
from orchestrator import backends
from runfolder.requests import cancel_requested

pytestmark = [pytest.mark.skipif(not can_serve(), reason=WHY_NOT), pytest.mark.usefixtures("home")]


@pytest.fixture(scope="module")
def server() -> Iterator[SshServer]:
    """One server for all tests, in a short folder."""
    with tempfile.TemporaryDirectory(prefix="ft-") as folder, ssh_server(Path(folder) / "s") as server:
        yield server


@pytest.fixture
def there(server: SshServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A clusters file with the local cluster of another machine; gives the FLEETUNE_HOME there."""
    root = tmp_path / "there"
    clusters = {"there": {"kind": "local", "link": {"ssh": "there"}, "root": str(root), "python": sys.executable}}
    (tmp_path / "clusters.yaml").write_text(yaml.safe_dump(clusters))
    monkeypatch.setenv("FLEETUNE_CLUSTERS", str(tmp_path / "clusters.yaml"))
    monkeypatch.setenv("PATH", f"{server.binaries}:{os.environ['PATH']}")
    with only_queued(root):
        yield root
    for cluster in backends._opened.values():
        cluster.far_side.close()  # type: ignore[attr-defined]
    backends._opened.clear()


def test_a_job_is_submitted_found_again_and_cancelled(there: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, env={"QUOTED": "a 'b' $(c) `d` \\ ü\n"})
    done = fleetune.submit(job, cluster="there")
    run_dir = there / "runs" / done.run_id
    record = yaml.safe_load((run_dir / "job.yaml").read_text())
    assert Path(record["job"]["data"]["train"]).is_relative_to(there / "files")
    assert record["job"]["env"] == {"QUOTED": "a 'b' $(c) `d` \\ ü\n"}
    assert [path.name for path in (there / "code").iterdir()] == [installed_code().digest]
    found = fleetune.status(done.run_id)
    assert (found.cluster, found.state) == ("there", "queued")
    assert fleetune.submit(job, cluster="there", run_id=done.run_id).adopted
    fleetune.cancel(done.run_id)
    assert cancel_requested(run_dir)


@pytest.mark.usefixtures("there")
def test_commands_share_one_connection(server: SshServer) -> None:
    fleetune.list_runs("there")
    before = (server.folder / "log").read_text().count("Accepted publickey")
    command = [sys.executable, "-P", "-m", "orchestrator", "list", "--cluster", "there", "--json"]
    for _ in range(2):
        ran = subprocess.run(command, capture_output=True, text=True)
        assert (ran.returncode, ran.stdout.strip()) == (0, "[]"), ran.stderr
    assert (server.folder / "log").read_text().count("Accepted publickey") == before
    assert list(sockets_folder().iterdir())


@pytest.mark.usefixtures("there")
def test_a_cut_says_unknown_and_what_is_asked_next_goes_through(tmp_path: Path) -> None:
    done = fleetune.submit(make_job(tmp_path), cluster="there")
    far_side = backends.open_cluster("there").far_side  # type: ignore[attr-defined]
    far_side._process.kill()
    found = fleetune.status(done.run_id)
    assert found.state == "unknown" and "cluster there" in str(found.reason)
    assert fleetune.status(done.run_id).state == "queued"


@contextmanager
def emptied(file: Path) -> Iterator[None]:
    """Let a file be empty for a while."""
    before = file.read_text()
    file.write_text("")
    try:
        yield
    finally:
        file.write_text(before)


@pytest.mark.usefixtures("there")
def test_what_is_wrong_with_a_link_is_said_with_what_to_do(
    server: SshServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for socket in sockets_folder().iterdir():
        subprocess.run(["ssh", "-o", f"ControlPath={socket}", "-O", "exit", "there"], capture_output=True)
    refused = r"Permission denied.*fleetune clusters connect there"
    with emptied(server.folder / "authorized_keys"), pytest.raises(Unreachable, match=refused):
        fleetune.list_runs("there")
    unknown = r"Host key verification failed.*ssh there"
    with emptied(server.folder / "known_hosts"), pytest.raises(Unreachable, match=unknown):
        fleetune.list_runs("there")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(Unreachable, match="ssh"):
        fleetune.list_runs("there")
