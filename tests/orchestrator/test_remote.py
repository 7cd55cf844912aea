"""A cluster of another machine over a real sshd: its code is sent, its connection reused, and a cut is no failure."""

import json
import os
import random
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from cut_proxy import CutProxy, cut_somewhere
from evaluations import claimed, end, make_adapter, succeed
from jobs import make_job, only_queued
from readable import files_with, leaks, submit_unseen
from sampling import SEED
from ssh_server import WHY_NOT, SshServer, can_serve, close_far_sides, ssh_server
from waiting import until

import fleetune
from clusters.base import Unreachable
from clusters.local import Local
from clusters.remote.code import installed_code
from clusters.remote.link import sockets_folder
from orchestrator import backends
from runfolder.evaluation_job import EvaluationJob
from runfolder.record import load_any_job
from serving.folder import adapter_digest

pytestmark = [pytest.mark.skipif(not can_serve(), reason=WHY_NOT), pytest.mark.usefixtures("home")]


@pytest.fixture(scope="module")
def server() -> Iterator[SshServer]:
    """One server for all tests, in a short folder."""
    with tempfile.TemporaryDirectory(prefix="ft-") as folder, ssh_server(Path(folder) / "s") as server:
        yield server


@contextmanager
def other_machine(alias: str, server: SshServer, folder: Path) -> Iterator[Path]:
    """A clusters file with the local cluster of another machine; gives the FLEETUNE_HOME there."""
    root = folder / "there"
    clusters = {"there": {"kind": "local", "link": {"ssh": alias}, "root": str(root), "python": sys.executable}}
    (folder / "clusters.yaml").write_text(yaml.safe_dump(clusters))
    with pytest.MonkeyPatch.context() as patch, only_queued(root):
        patch.setenv("FLEETUNE_CLUSTERS", str(folder / "clusters.yaml"))
        patch.setenv("PATH", f"{server.binaries}:{os.environ['PATH']}")
        yield root
    close_far_sides()


@pytest.fixture
def there(server: SshServer, tmp_path: Path) -> Iterator[Path]:
    """The other machine, over a network that works."""
    with other_machine("there", server, tmp_path) as root:
        yield root


@pytest.fixture
def proxy(server: SshServer) -> Iterator[CutProxy]:
    """A network to it that can be cut: the host alias `far`."""
    proxy = CutProxy(server.port)
    server.alias("far", proxy.port)
    yield proxy
    proxy.close()


def test_a_job_is_there_as_it_was_submitted_with_its_files_and_the_code(there: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, env={"QUOTED": "a 'b' $(c) `d` \\ ü\n"})
    done = fleetune.submit(job, cluster="there")
    run_dir = there / "runs" / done.run_id
    record = yaml.safe_load((run_dir / "job.yaml").read_text())
    assert Path(record["job"]["data"]["train"]).is_relative_to(there / "files")
    assert record["job"]["env"] == {"QUOTED": "a 'b' $(c) `d` \\ ü\n"}
    assert [path.name for path in (there / "code").iterdir()] == [installed_code().digest]


def test_an_evaluation_is_done_there_with_what_is_sent_and_what_a_run_has_left(
    there: Path, tmp_path: Path, tiny_base: Path, sums: Path
) -> None:
    mine = make_adapter(tiny_base, tmp_path / "mine", 1)
    job_file = make_job(tmp_path, base=str(tiny_base), data={"train": str(sums), "seq_len": 64}, train=TRAIN)
    trained = fleetune.submit(job_file, cluster="there").run_id
    attempt = claimed(there / "runs" / trained)
    make_adapter(tiny_base, attempt.folder / "output", 2)
    end(attempt, "succeeded")
    task = tmp_path / "task.yaml"
    task.write_text(yaml.safe_dump({"kind": "exact_match", "data": str(sums), "max_new_tokens": 3}))

    def work(submission: fleetune.Submission) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FLEETUNE_HOME", str(there))
            succeed(submission.run_dir)

    report = fleetune.evaluate([str(mine), "sums"], [task], limit=3, cluster="there", announce=work)
    assert report.asked == 3 * 3
    output = there / "runs" / trained / "output"
    assert [(result.label, result.digest) for result in report.tasks[0].results[1:]] == [
        ("mine", adapter_digest(mine)),
        ("sums", adapter_digest(output)),
    ]
    (evaluated,) = set((there / "runs").iterdir()) - {there / "runs" / trained}
    job = load_any_job(evaluated)
    assert isinstance(job, EvaluationJob) and Path(job.adapters["sums"]) == output
    sent = [job.adapters["mine"], job.base.model, job.questions]
    assert [path for path in sent if not Path(path).is_relative_to(there / "files")] == []


TRAIN = {"steps": 7, "batch_tokens": 64}
LAPTOP = """
import sys
sys.modules["torch"] = None
import fleetune
fleetune.evaluate([], [sys.argv[1]], base=sys.argv[2], limit=3, cluster="there", announce=lambda _: sys.exit(7))
"""


def test_an_evaluation_is_submitted_from_where_there_is_no_torch(
    there: Path, tmp_path: Path, tiny_base: Path, sums: Path
) -> None:
    task = tmp_path / "task.yaml"
    task.write_text(yaml.safe_dump({"kind": "exact_match", "data": str(sums)}))
    ran = subprocess.run(
        [sys.executable, "-P", "-c", LAPTOP, str(task), str(tiny_base)], capture_output=True, text=True
    )
    assert ran.returncode == 7, ran.stderr
    (run_dir,) = (there / "runs").iterdir()
    job = load_any_job(run_dir)
    assert isinstance(job, EvaluationJob) and job.adapters == {}
    assert len(json.loads(Path(job.questions).read_text())["tasks"][0]["questions"]) == 3


def test_code_of_which_a_file_was_purged_is_sent_again(there: Path) -> None:
    assert fleetune.list_runs("there") == []
    code = there / "code" / installed_code().digest
    purged = code / "runfolder" / "appended.py"
    assert time.time() - purged.stat().st_mtime < 3600  # not that of 1970, the first that a purge would take
    purged.unlink()
    shutil.rmtree(code / "methods")
    close_far_sides()
    assert fleetune.list_runs("there") == []
    assert purged.exists() and {path.name for path in (there / "code").iterdir()} == {code.name}


def test_nobody_sees_the_secrets_of_a_submission(there: Path, tmp_path: Path) -> None:
    told = {
        "environment of sleep": ["env", "A=hf_told", "sleep", "9"],
        "command line of sh": ["sh", "-c", "cat", "hf_told"],
    }
    with leaks(b"hf_told", set()) as seen:
        for where, command in told.items():
            child = subprocess.Popen(command, stdin=subprocess.PIPE)
            until(lambda where=where: where in seen)
            child.kill()
            child.wait()
    secret = f"hf_{random.getrandbits(64)}"
    run_id = submit_unseen(make_job(tmp_path), "there", secret)
    (holder,) = files_with(secret, there, Path(os.environ["FLEETUNE_HOME"]))
    assert holder == there / "runs" / run_id / "secrets.json" and holder.stat().st_mode & 0o777 == 0o600


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
    output = far_side._process.stdout
    # ssh's shared connection holds it for a moment, and may hand an answer on until it lets go.
    until(lambda: bool(select.select([output], [], [], 0)[0]))
    found = fleetune.status(done.run_id)
    assert found.state == "unknown" and "cluster there" in str(found.reason)
    assert fleetune.status(done.run_id).state == "queued"


def test_a_network_that_is_cut_somewhere_makes_one_run_of_a_repeated_command(
    server: SshServer, proxy: CutProxy, tmp_path: Path
) -> None:
    rng = random.Random(SEED)
    make_job(tmp_path)
    with other_machine("far", server, tmp_path) as root:
        done = [fleetune.submit(tmp_path / "job.yaml", cluster="there").run_id]
        for number in range(3):
            cut_somewhere(proxy, rng, lambda: server.kill_connection("far", sockets_folder()))
            with pytest.raises(Unreachable, match="the same command again is safe, and makes one run$"):
                while not proxy.was_cut:
                    done.append(fleetune.submit(tmp_path / "job.yaml", cluster="there").run_id)
            done.append(fleetune.submit(tmp_path / "job.yaml", cluster="there").run_id)
            assert sorted(entry.run_id for entry in Local(root).queue.list()) == sorted(done), number


def test_the_command_says_that_it_came_to_nothing_and_may_be_repeated(
    server: SshServer, proxy: CutProxy, tmp_path: Path
) -> None:
    submit = [sys.executable, "-P", "-m", "orchestrator", "submit", str(make_job(tmp_path)), "--cluster", "there"]
    with other_machine("far", server, tmp_path) as root:
        fleetune.list_runs("there")
        proxy.cut_after("answer", 2_000)
        cut = subprocess.run(submit, capture_output=True, text=True)
        assert (cut.returncode, cut.stdout) == (3, ""), cut
        first, second = cut.stderr.splitlines()
        assert first.startswith("cluster there: ")
        assert second == "this try has submitted nothing; the same command again is safe, and makes one run"
        done = subprocess.run(submit, capture_output=True, text=True)
        (entry,) = Local(root).queue.list()
        assert (done.returncode, done.stdout) == (0, f"{entry.run_id}\n"), done


@pytest.mark.usefixtures("there")
def test_a_far_side_that_is_expected_starts_by_itself_and_once(server: SshServer) -> None:
    site = backends.open_cluster("there").site
    far_side = site.far_side  # type: ignore[attr-defined]
    site.ids()  # has the code sent
    far_side.close()
    site.expect()
    process = far_side._process
    assert process
    site.expect()
    assert site.ids() == []
    assert far_side._process is process
    far_side.close()
    server.close_connection("there", sockets_folder())
    with emptied(server.folder / "authorized_keys"):
        site.expect()
        with pytest.raises(Unreachable, match=r"Permission denied.*fleetune clusters connect there"):
            site.ids()
    assert site.ids() == []


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
    server: SshServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.close_connection("there", sockets_folder())
    refused = r"Permission denied.*fleetune clusters connect there"
    with emptied(server.folder / "authorized_keys"), pytest.raises(Unreachable, match=refused):
        fleetune.list_runs("there")
    nothing = "\nthis try has submitted nothing; the same command again is safe, and makes one run$"
    with emptied(server.folder / "authorized_keys"), pytest.raises(Unreachable, match=nothing):
        fleetune.submit(make_job(tmp_path), cluster="there")
    unknown = r"Host key verification failed.*ssh there"
    with emptied(server.folder / "known_hosts"), pytest.raises(Unreachable, match=unknown):
        fleetune.list_runs("there")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(Unreachable, match="ssh"):
        fleetune.list_runs("there")
