"""The environment of another machine, over a real sshd, with a real venv and pip: made once, whole or not at all."""

import io
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from jobs import make_job, only_queued
from package_index import LOCK, PackageIndex, package_index
from ssh_server import WHY_NOT, SshServer, can_serve, close_far_sides, ssh_server
from waiting import until

import fleetune
from clusters.base import Unreachable
from clusters.checks import Check
from clusters.local import Local
from clusters.remote import scripts
from clusters.remote.link import sockets_folder
from clusters.remote.lock import installed_lock
from orchestrator import backends, cli, cluster_doctor
from orchestrator.cluster_setup import set_up_cluster

pytestmark = [pytest.mark.skipif(not can_serve(), reason=WHY_NOT), pytest.mark.usefixtures("home")]
PYTHON = shlex.quote(sys._base_executable)  # type: ignore[attr-defined]
# It runs `python -c PROGRAM` as an old Python would.
OLD = f"exec {PYTHON} -c 'import sys; sys.version_info = (3, 9, 18); exec(sys.argv[1])' \"$2\""


@pytest.fixture(scope="module")
def server() -> Iterator[SshServer]:
    """One server for all tests, in a short folder."""
    with tempfile.TemporaryDirectory(prefix="ft-") as folder, ssh_server(Path(folder) / "s") as server:
        yield server


@pytest.fixture
def index() -> Iterator[PackageIndex]:
    """Where pip finds its one package."""
    with package_index() as index:
        yield index


@pytest.fixture
def root(server: SshServer, index: PackageIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The run root of a cluster whose environment has one small package, and whose setup lines name a Python."""
    write_pythons(tmp_path / "bin", f'exec {PYTHON} "$@"')
    write_clusters(tmp_path, env={"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": index.url})
    monkeypatch.setenv("FLEETUNE_CLUSTERS", str(tmp_path / "clusters.yaml"))
    monkeypatch.setenv("PATH", f"{server.binaries}:{os.environ['PATH']}")
    for module in (backends, cluster_doctor):
        monkeypatch.setattr(module, "installed_lock", lambda: LOCK)
    with only_queued(tmp_path / "there"):
        yield tmp_path / "there"
    close_far_sides()


def write_pythons(folder: Path, script: str) -> None:
    """A folder with a script for each name that a Python may have."""
    folder.mkdir(exist_ok=True)
    for name in ("python3.11", "python3.12", "python3.13", "python3"):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)


def write_clusters(folder: Path, **changes: object) -> None:
    """A clusters file with the local cluster of another machine."""
    setup = [f"PATH={shlex.quote(str(folder / 'bin'))}:$PATH"]
    config = {"kind": "local", "link": {"ssh": "there"}, "root": str(folder / "there"), "setup": setup, **changes}
    (folder / "clusters.yaml").write_text(yaml.safe_dump({"there": config}))


def set_up(show: list[str]) -> None:
    """Have the environment of the cluster made; lines of its log are added to a list."""
    backends.far_machine("there", backends.config_of("there")).set_up(show.append)


def made(root: Path) -> list[Path]:
    """The environments that there are, half-made ones too."""
    return [*(root / "environments").glob("*/made-*")]


def test_two_at_once_make_one_and_runs_use_it(root: Path, index: PackageIndex, tmp_path: Path) -> None:
    logs: list[list[str]] = [[], []]
    with ThreadPoolExecutor() as pool, index.held():
        first = pool.submit(set_up, logs[0])
        assert index.asked.wait(60)
        with pytest.raises(Unreachable, match="fleetune clusters setup there"):  # a half-made one is none
            fleetune.submit(make_job(tmp_path), cluster="there")
        second = pool.submit(set_up, logs[1])
        until(lambda: logs[1])
        assert not first.done() and not second.done()
        index.open.set()
        first.result()
        second.result()
    assert logs[0] == logs[1] and "Successfully installed tiny-packages-1" in logs[0][-1]
    assert (index.downloads, len(made(root))) == (1, 1)
    fleetune.submit(tmp_path / "job.yaml", cluster="there")
    (entry,) = Local(root).queue.list()
    python = Path(entry.command[0])
    assert python.is_relative_to(root / "environments") and python.parts[-3:] == ("ready", "bin", "python")
    assert python.parts[-4].startswith(f"{LOCK.digest}-py3.")
    assert not set_up_cluster("there", yes=False)
    assert index.downloads == 1


def test_it_goes_on_when_the_link_is_cut_and_is_found_again(
    root: Path, index: PackageIndex, server: SshServer
) -> None:
    lines: list[str] = []
    with ThreadPoolExecutor() as pool, index.held():
        cut: Future[None] = pool.submit(set_up, [])
        assert index.asked.wait(60)
        server.close_connection("there", sockets_folder())
        with pytest.raises(Unreachable, match="cluster there: "):
            cut.result(60)
        again = pool.submit(set_up, lines)
        until(lambda: lines)
        index.open.set()
        again.result()
    assert "Successfully installed tiny-packages-1" in lines[-1]
    assert (index.downloads, len(made(root))) == (1, 1)


class Terminal(io.StringIO):
    """Somebody who types an answer."""

    def isatty(self) -> bool:
        """A terminal is what it stands for."""
        return True


def test_submit_asks_and_what_fails_says_why(
    root: Path,
    index: PackageIndex,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def submit(*arguments: str, typed: io.StringIO) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fleetune", "submit", str(job), "--cluster", "there", *arguments])
        monkeypatch.setattr(sys, "stdin", typed)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), capfd.readouterr().err

    job = make_job(tmp_path)
    code, said = submit(typed=io.StringIO())
    assert code == 3 and said.count("\n") == 1 and "fleetune clusters setup there (--yes" in said
    code, said = submit(typed=Terminal("n\n"))
    assert code == 3 and "Install them now? [y/N]" in said
    for told in (f"in {root}/environments, and changes nothing else", "about 6 GB, which takes 5 to 30 minutes"):
        assert told in said
    assert not made(root)
    index.is_empty = True
    code, said = submit("--yes", typed=io.StringIO())
    assert code == 3
    assert "No matching distribution found for tiny-packages==1; can pip reach its index" in said.splitlines()[-1]
    assert not (root / "runs").exists()
    index.is_empty = False
    code, said = submit(typed=Terminal("y\n"))
    assert code == 0 and "Successfully installed tiny-packages-1" in said
    assert len(made(root)) == 1 and len([*(root / "runs").iterdir()]) == 1


def test_what_cannot_be_set_up_is_said(root: Path, tmp_path: Path) -> None:
    write_pythons(tmp_path / "bin", OLD)
    wanted = "cluster there: python3 there is 3.9; Fleetune needs Python 3.11 or newer there: load one in `setup`"
    with pytest.raises(Unreachable) as refused:
        set_up_cluster("there", yes=True)
    assert str(refused.value).startswith(wanted) and not (root / "environments").exists()
    assert [check.name for check in fleetune.doctor("there") if check.level == "fail"] == ["python"]
    write_clusters(tmp_path, python=str(tmp_path / "bin" / "python3"))
    with pytest.raises(Unreachable, match=r"bin/python3 there is 3\.9; Fleetune needs"):
        fleetune.list_runs("there")
    with pytest.raises(fleetune.InputError, match="python: found .* which is used as it is"):
        set_up_cluster("there", yes=True)
    write_pythons(tmp_path / "bin", f'exec {PYTHON} -S "$@"')  # without packages
    with pytest.raises(Unreachable, match="No module named 'pydantic'; see .* fleetune doctor --cluster there"):
        fleetune.list_runs("there")
    (packages,) = [check for check in fleetune.doctor("there") if check.level == "fail"]
    assert (packages.name, packages.found) == ("packages", "no tiny-packages==1")
    assert "remove `python` from the cluster" in packages.mend
    write_clusters(tmp_path, link="local")
    with pytest.raises(fleetune.InputError, match="it is on this machine"):
        set_up_cluster("there", yes=True)


def test_a_python_below_the_home_is_found(tmp_path: Path) -> None:
    (tmp_path / "code" / "0123").mkdir(parents=True)
    write_pythons(tmp_path / "bin", "echo it runs")
    arguments = [str(tmp_path), "0123", "~/bin/python3", "4567", "0"]
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    command = ["bash", "-c", scripts.ANSWER, "fleetune", *arguments]
    assert subprocess.run(command, env=environment, capture_output=True, text=True).stdout == "it runs\n"


def test_the_doctor_looks_there(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root.chmod(0o755)
    checks = {check.name: check for check in fleetune.doctor("there")}
    assert [*checks] == ["link", "run root", "disk", "python", "environment"]
    assert checks["run root"] == Check("run root", "warn", f"{root} is open to others (0755)", f"chmod 700 {root}")
    assert checks["environment"] == Check("environment", "fail", "not made yet", "fleetune clusters setup there")
    root.chmod(0o700)
    monkeypatch.setattr(backends, "installed_lock", installed_lock)
    write_clusters(tmp_path, python=sys.executable)
    checks = {check.name: check for check in fleetune.doctor("there")}
    assert {check.level for check in checks.values()} <= {"ok", "warn"}, checks
    assert checks["run root"].level == "ok" and "torch 2." in checks["packages"].found
    monkeypatch.setenv("PATH", "/nowhere")
    (link,) = fleetune.doctor("there")
    assert (link.name, link.level) == ("link", "fail") and "ssh there" in link.mend


def test_a_root_without_space_is_told_and_left_as_it_was(root: Path, tmp_path: Path) -> None:
    tar = tmp_path / "bin" / "tar"
    tar.write_text("#!/bin/sh\necho 'tar: fleetune.py: Cannot write: No space left on device' >&2\nexit 2\n")
    tar.chmod(0o755)
    (check,) = fleetune.doctor("there")
    assert (check.name, check.level) == ("run root", "fail")
    assert "No space left on device" in check.found and check.mend.startswith("free some space there")
    assert [*(root / "code").iterdir()] == []


def test_the_lock_has_what_runs_need() -> None:
    lock = installed_lock()
    for package in ("torch>=", "deepspeed==", "transformers<", "pydantic>=", "fastapi>=", "python-multipart>="):
        assert f"\n{package}" in f"\n{lock.requirements}"
    assert "pytest" not in lock.requirements
    assert "\ntorch==" in lock.constraints
