"""What SLURM's commands are asked for a run, and what is made of their answers; programs stand for them."""

import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from programs import program

from clusters import closing, shared_lock, slurm_releases
from clusters import slurm as slurm_module
from clusters.base import Capacity, ClusterStatus, SubmissionRefused, Unreachable
from clusters.container_checkup import check_container
from clusters.job_start import JobStart
from clusters.package_checks import package_in
from clusters.slurm import Slurm
from clusters.slurm_checkup import check_slurm, run_test_job
from clusters.slurm_script import SlurmConfig
from orchestrator.backends import lock_for
from runfolder.chain import claim_next, close, reopen, result
from runfolder.job import Job
from runfolder.requests import request_cancel

RUN_ID = "sums-0123456789"
PLAIN = {"base": "b", "data": "d.jsonl", "train": {"steps": 1}}


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    """A site whose run root is `tmp_path`."""
    (tmp_path / "slurm").mkdir()
    (tmp_path / "runs" / RUN_ID).mkdir(parents=True)
    return Slurm(SlurmConfig(kind="slurm", root=str(tmp_path)), tmp_path)


def test_a_login_shells_variables_do_not_come_before_the_script(
    slurm: Slurm, asked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SBATCH_PARTITION", "SQUEUE_FORMAT", "SACCT_FORMAT", "SINFO_PARTITION", "SLURM_TIME_FORMAT"):
        monkeypatch.setenv(name, "other")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    for name in ("squeue", "sinfo", "sacct", "sbatch"):
        program(asked, name, f"env >> {asked}.env")
    slurm.submit(slurm.request(Job.model_validate(PLAIN), RUN_ID))
    slurm.status([RUN_ID])
    slurm.capacity()
    assert [check.name for check in check_slurm(slurm.config.model_dump())] == ["slurm", "partition"]
    said = Path(f"{asked}.env").read_text()
    assert "other" not in said and said.count("SLURM_CONF=/etc/slurm.conf") >= 5


def test_a_warning_during_the_setup_lines_ends_no_job(tmp_path: Path) -> None:
    lines = ("kill -USR1 $$", "echo set up $UNKNOWN_HERE")
    site = Slurm(SlurmConfig(kind="slurm", root=str(tmp_path), setup=lines), tmp_path)
    text = site.request(Job.model_validate(PLAIN), RUN_ID).text
    script = tmp_path / "script.sh"
    script.write_text(text.replace("\nexec ", "\nexec echo "))
    ran = subprocess.run(["bash", script], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith("set up\n") and "clusters.allocation" in ran.stdout


@pytest.mark.parametrize("state", ["RESV_DEL_HOLD", "SIGNALING", "STOPPED", "RESIZING", "UPDATE_DB", "OF_LATER"])
def test_a_job_in_a_state_that_is_not_known_has_not_ended(state: str, slurm: Slurm, asked: Path) -> None:
    (slurm.folder / f"{RUN_ID}-s1.job").write_text("77")
    program(asked, "squeue", f"echo '77|{state}|None|N/A|n/a||{RUN_ID}-s1'")
    program(asked, "sacct", "echo '77|RUNNING|Unknown'")
    assert slurm.status([RUN_ID])[RUN_ID].state in ("queued", "running")
    program(asked, "squeue", ":")
    assert slurm.status([RUN_ID])[RUN_ID].reason == "SLURM has no job 77 any more; fleetune resume submits it again"


def test_what_is_no_answer_of_squeue_is_passed_over(slurm: Slurm, asked: Path) -> None:
    lines = [b"Welcome to the", b"partition", b"5_[1-3]|PENDING|None|N/A|n/a||sums-0123456789-s1"]
    lines += [b"6|RUNNING|None|N/A|n/a||Z\xfcrich", b"7|RUNNING|None|N/A|n/a||a", b"b"]
    lines.append(b"8|PENDING|Priority|Unknown|n/a||sums-0123456789-s1")
    said = asked.with_name("said")
    said.write_bytes(b"\n".join(lines))
    program(asked, "squeue", f"cat {said}")
    status = slurm.status([RUN_ID])[RUN_ID]
    assert (status.state, status.reason) == ("queued", "SLURM job 8: others have a higher priority")


def test_what_is_no_answer_of_sinfo_is_passed_over(slurm: Slurm, asked: Path) -> None:
    full = "gpu:h100:4," + "x" * 489
    lines = ["sinfo: use slurminfo instead", f"idle {full}(null) 0/4/0/4", "plnd (null) (null) 0/4/0/4"]
    program(asked, "sinfo", "".join(f"echo '{line}'\n" for line in lines))
    assert slurm.capacity() == Capacity("cpu", 4, 4)


def test_of_gpus_of_several_names_the_ones_that_are_asked_for_count(slurm: Slurm, asked: Path) -> None:
    program(asked, "sinfo", "echo 'idle gpu:a100:4 gpu:a100:0 0/4/0/4'\necho 'idle gpu:h100:4 gpu:h100:0 0/4/0/4'\n")
    config = slurm.config.model_copy(update={"gpu_type": "h100"})
    assert slurm.capacity().gpu is None
    assert Slurm(config, slurm.site.root).capacity().gpu == "h100"


def test_a_doctor_reads_what_names_partitions(asked: Path) -> None:
    config = SlurmConfig(kind="slurm").model_dump()
    program(asked, "sinfo", "printf 'Welcome\\ngpu|up\\ncpu*|down\\n'")
    program(asked, "sbatch", ":")
    found = [(check.level, check.found) for check in check_slurm({**config, "partition": "gpu,cpu"})][1]
    assert found == ("ok", "gpu,cpu")
    found = [(check.level, check.found) for check in check_slurm({**config, "partition": "gpu,other"})][1]
    assert found == ("fail", "no 'other'; there are: gpu, cpu")


def test_a_test_job_looks_for_the_run_root_on_its_node(tmp_path: Path, asked: Path) -> None:
    config = SlurmConfig(kind="slurm", setup=("echo set up",)).model_dump()
    root = tmp_path / "root"
    program(asked, "sinfo", ":")
    program(asked, "srun", f'shift 3; mv {root} {root}.away; "$@"; mv {root}.away {root}')
    check = run_test_job(config, root)
    assert (check.level, check.found) == ("fail", f"its node does not have what is in {root} here")
    program(asked, "srun", "echo CPU only")
    assert run_test_job(config, root).level == "ok"
    assert not list(root.iterdir())


def test_a_doctor_looks_into_the_container(tmp_path: Path, asked: Path) -> None:
    def found(requirements: list[str]) -> list[tuple[str, str, str]]:
        container = {"image": str(tmp_path / "a.sif"), "python": "python3", "runtime": "apptainer"}
        return [(check.name, check.level, check.found) for check in check_container(container, requirements)]

    assert found([]) == [("image", "fail", f"{tmp_path}/a.sif is not there, or cannot be read")]
    (tmp_path / "a.sif").touch()
    assert found([])[1:] == [("container", "warn", "apptainer is not on PATH here")]
    program(asked, "apptainer", """echo 'INFO: a banner'; echo '{"torch": "2.11.0"}'""")
    inside = [found([requirement])[2] for requirement in ("torch>=2.8", "torch>=3", "ray[train]==2.60.0")]
    assert inside == [
        ("in the image", "ok", "torch 2.11.0"),
        ("in the image", "fail", "torch 2.11.0, wanted: torch>=3"),
        ("in the image", "fail", "no ray[train]==2.60.0"),
    ]
    assert asked.read_text().split()[-1] == "ray"
    program(asked, "apptainer", "echo 'FATAL: no user namespaces' >&2; exit 255")
    assert found([])[1:] == [("container", "fail", "FATAL: no user namespaces")]


def test_a_container_gets_the_code_that_is_installed_here(tmp_path: Path, asked: Path) -> None:
    program(asked, "squeue", ":")
    program(asked, "sbatch", "echo 4")
    site = Slurm(SlurmConfig.model_validate({"kind": "slurm", "container": "/images/a.sif"}), tmp_path)
    request = site.request(Job.model_validate(PLAIN), RUN_ID)
    assert not (tmp_path / "code").exists()
    for _ in range(2):
        site.submit(request)
    (code,) = (tmp_path / "code").iterdir()
    assert f"export PYTHONPATH={code}\n" in request.text
    assert (code / "clusters" / "slurm.py").read_bytes() == Path(slurm_module.__file__).read_bytes()
    question = "from clusters.remote.code import installed_code; print(installed_code().digest)"
    told = subprocess.check_output([sys.executable, "-P", "-c", question], env={"PYTHONPATH": str(code)}, text=True)
    assert told.strip() == code.name  # as it is on the machine of a cluster


def test_beside_a_container_plain_packages_are_enough() -> None:
    names = []
    for container in (None, "/images/a.sif"):
        config = SlurmConfig.model_validate({"kind": "slurm", "container": container})
        names.append({package_in(line) for line in lock_for(config).requirements.splitlines()})
    of_runs, plain = names
    assert "pydantic" in plain < of_runs and {"torch", "ray"} <= of_runs - plain


@pytest.mark.parametrize("said", ["to start at 14:35", "to start at Unknown"])
def test_a_forecast_that_says_no_time_is_none(said: str, slurm: Slurm, asked: Path) -> None:
    program(asked, "sbatch", f"echo 'sbatch: Job 1 {said} using 2 processors' >&2")
    assert slurm.forecast(slurm.request(Job.model_validate(PLAIN), RUN_ID)) is None


def test_a_forecast_is_how_long_it_takes(slurm: Slurm, asked: Path) -> None:
    program(asked, "sbatch", "date -d '+2 hours' '+sbatch: Job 1 to start at %Y-%m-%dT%H:%M:%S using 2' >&2")
    wait_s = slurm.forecast(slurm.request(Job.model_validate(PLAIN), RUN_ID))
    assert wait_s is not None and 7200 - 600 < wait_s <= 7200


def held(asked: Path, job_id: int = 4) -> None:
    """Have a job that SLURM holds since a node could not start it."""
    program(asked, "squeue", f"echo '{job_id}|PENDING|launch failed requeued held|N/A|n/a||{RUN_ID}-s1'")


def releases(asked: Path) -> int:
    """How often scontrol was asked to release a job."""
    return asked.read_text().count("release 4\n")


def test_a_job_that_slurm_holds_is_let_go_on_twice(
    slurm: Slurm, asked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held(asked)
    program(asked, "scontrol", ":")
    for _ in range(3):
        status = slurm.status([RUN_ID])[RUN_ID]
        assert (status.state, status.stuck) == ("queued", False)
        assert status.reason == "SLURM job 4: a node could not start it, and SLURM held it; it is let go on"
        assert releases(asked) == 1
    monkeypatch.setattr(slurm_releases, "_APART_S", 0.0)
    assert not slurm.status([RUN_ID])[RUN_ID].stuck and releases(asked) == 2
    status = slurm.status([RUN_ID])[RUN_ID]
    assert (status.state, status.stuck, releases(asked)) == ("queued", True, 2)
    assert "scontrol release 4" in status.reason


def test_jobs_that_slurm_holds_are_let_go_on_by_one_question(slurm: Slurm, asked: Path) -> None:
    row = "PENDING|launch failed requeued held|N/A|n/a|"
    program(asked, "squeue", f"echo '4|{row}|{RUN_ID}-s1'; echo '5|{row}|b-0123456789-s1'; echo '6|{row}|other'")
    program(asked, "scontrol", ":")
    slurm.status([RUN_ID, "b-0123456789"])
    assert asked.read_text().splitlines()[-1] == "release 4,5"


def test_a_status_does_not_wait_for_a_release(slurm: Slurm, asked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held(asked)
    program(asked, "scontrol", "exec sleep 60")
    monkeypatch.setattr(slurm_releases, "_RELEASE_S", 0.2)
    assert slurm.status([RUN_ID])[RUN_ID].state == "queued"


@pytest.mark.parametrize("reason", ["JobHoldMaxRequeue", "PartitionTimeLimit", "JobHeldUser"])
def test_a_job_that_goes_on_by_nothing_of_slurm_is_stuck(reason: str, slurm: Slurm, asked: Path) -> None:
    program(asked, "squeue", f"echo '4|PENDING|{reason}|N/A|n/a||{RUN_ID}-s1'")
    status = slurm.status([RUN_ID])[RUN_ID]
    assert status.stuck and reason not in status.reason


def test_endings_of_many_runs_are_two_questions(slurm: Slurm, asked: Path) -> None:
    run_ids = [f"r{number}-0123456789" for number in range(300)]
    for number, run_id in enumerate(run_ids):
        (slurm.folder / f"{run_id}-s1.job").write_text(str(number))
    program(asked, "squeue", ":")
    program(asked, "sacct", "echo '7|FAILED|2026-11-29T10:59:52'")
    statuses = slurm.status(run_ids)
    assert statuses[run_ids[7]].reason.startswith("SLURM job 7 ended: FAILED")
    assert statuses[run_ids[8]].reason.startswith("SLURM has no job 8 any more")
    assert len(asked.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("job", "site", "field"),
    [
        ("90s", None, None),
        ("2m", None, "resources.walltime: found 120 s; allowed on SLURM: more than 160 s"),
        ("3m", "1", None),
        (None, "2", "walltime of the cluster: found 120 s"),
        (None, "0:02:30", None),
        (None, "1-0", None),
        (None, "0", None),
        (None, "UNLIMITED", None),
    ],
)
def test_a_walltime_that_a_warning_takes_up_is_refused(
    job: str | None, site: str | None, field: str | None, tmp_path: Path
) -> None:
    grace = 20 if job == "90s" else 100
    slurm = Slurm(SlurmConfig(kind="slurm", root=str(tmp_path), walltime=site), tmp_path)
    wanted = Job.model_validate(PLAIN | {"resources": {"walltime": job, "grace": grace}})
    if field is None:
        assert f"#SBATCH --signal=B:USR1@{grace + 60}\n" in slurm.request(wanted, RUN_ID).text
    else:
        with pytest.raises(SubmissionRefused, match=field):
            slurm.request(wanted, RUN_ID)


def test_a_script_is_utf8_whatever_the_locale(tmp_path: Path, asked: Path) -> None:
    program(asked, "squeue", ":")
    program(asked, "sbatch", f'cp "$2" {asked}.script; echo 4')
    program_text = f"""
from pathlib import Path
from clusters.slurm import Slurm
from clusters.slurm_script import SlurmConfig
from runfolder.chain import claim_next, close, reopen, result
from runfolder.job import Job
from runfolder.requests import request_cancel
home = Path({str(tmp_path)!r})
slurm = Slurm(SlurmConfig(kind="slurm", env={{"CITY": "\\u65e5\\u672c"}}), home)
slurm.submit(slurm.request(Job.model_validate({PLAIN!r}), {RUN_ID!r}))
"""
    variables = {"PATH": os.environ["PATH"], "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", program_text], env=variables, check=True, cwd=Path(__file__).parents[2])
    assert "export CITY=\u65e5\u672c\n".encode() in Path(f"{asked}.script").read_bytes().replace(b"'", b"")


def test_one_client_submits_a_run_at_a_time(slurm: Slurm, asked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(asked, "squeue", ":")
    program(asked, "sbatch", "echo 4")
    monkeypatch.setattr(shared_lock, "_WAIT_S", 0.2)
    request = slurm.request(Job.model_validate(PLAIN), RUN_ID)
    path = slurm.folder / f"{RUN_ID}.lock"
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Unreachable, match=f"another command has held {path}"):
            slurm.submit(request)
    slurm.submit(request)
    assert (slurm.folder / f"{RUN_ID}-s1.job").read_text() == "4"


def test_a_file_system_without_locks_takes_submissions(
    slurm: Slurm, asked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    program(asked, "squeue", ":")
    program(asked, "sbatch", "echo 4")
    monkeypatch.setattr(fcntl, "flock", without)
    slurm.submit(slurm.request(Job.model_validate(PLAIN), RUN_ID))
    assert (slurm.folder / f"{RUN_ID}-s1.job").read_text() == "4"


def test_a_cancel_that_closes_nothing_says_so(slurm: Slurm, asked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(asked, "squeue", ":")
    monkeypatch.setattr(closing, "_CLOSE_S", 0.2)
    monkeypatch.setattr(closing, "controller_command", lambda _: ["sleep", "60"])
    with pytest.raises(Unreachable, match=f"did not close {RUN_ID}: it took more than 0 s; repeat this"):
        slurm.cancel(RUN_ID)
    monkeypatch.setattr(closing, "controller_command", lambda _: ["sh", "-c", "echo the disk is full >&2; exit 1"])
    with pytest.raises(Unreachable, match=f"did not close {RUN_ID}: the disk is full"):
        slurm.cancel(RUN_ID)
    monkeypatch.setattr(closing, "has_ended", lambda _: True)
    slurm.cancel(RUN_ID)


def test_a_sites_own_words_are_in_an_error(slurm: Slurm, asked: Path) -> None:
    program(asked, "squeue", ":")
    lines = ["sbatch: error: say which project pays", "sbatch: error: Batch job submission failed: Unspecified error"]
    program(asked, "sbatch", "".join(f"echo '{line}' >&2\n" for line in lines) + "exit 1")
    request = slurm.request(Job.model_validate(PLAIN), RUN_ID)
    for ask in (slurm.forecast, slurm.submit):
        with pytest.raises(SubmissionRefused, match="not take this job: say which project pays; Unspecified error"):
            ask(request)
    program(asked, "sinfo", "printf 'gpu*|up\n'")
    options = [*check_slurm({**slurm.config.model_dump(), "memory_per_worker": 8})][-1]
    assert options.level == "fail" and "say which project pays" in options.found
    assert asked.read_text().splitlines()[-1] == "--test-only --cpus-per-task=4 --mem=8G --wrap=true"


def submitted(asked: Path) -> int:
    """How many jobs sbatch was given."""
    return asked.read_text().count("--parsable")


def test_a_resumption_is_a_submission_of_its_own_whatever_was_purged(slurm: Slurm, asked: Path) -> None:
    run_dir = slurm.site.root / RUN_ID
    program(asked, "squeue", ":")
    program(asked, "sbatch", "echo 4")
    job = Job.model_validate(PLAIN)
    slurm.submit(slurm.request(job, RUN_ID))
    (run_dir / "submissions" / f"{RUN_ID}-s1").mkdir(parents=True)
    (run_dir / "submissions" / f"{RUN_ID}-s1" / "4").touch()
    for path in slurm.folder.iterdir():
        path.unlink()
    again = slurm.request(job, RUN_ID, None)
    slurm.submit(again)
    assert (again.submission, submitted(asked)) == (2, 2)
    (run_dir / "submissions").rename(run_dir / "elsewhere")
    (run_dir / "starts").mkdir()
    (run_dir / "starts" / "3.1").write_text("0")
    assert slurm.request(job, RUN_ID, None).submission == 4


def test_what_follows_a_job_at_its_end_is_not_known_yet(slurm: Slurm, asked: Path) -> None:
    program(asked, "sbatch", "echo 4")
    program(asked, "squeue", f"echo '7|COMPLETING|None|2026-11-29T10:59:52|node1|node1|{RUN_ID}-s1'")
    assert slurm.status([RUN_ID])[RUN_ID].reason == "SLURM job 7 is at its end"
    job = Job.model_validate(PLAIN)
    for submission in (1, 2):
        with pytest.raises(Unreachable, match="SLURM job 7 of this run is at its end, .* squeue -j 7 .* repeat this"):
            slurm.submit(slurm.request(job, RUN_ID, submission))
    program(asked, "squeue", f"echo '7|FAILED|NonZeroExitCode|2026-11-29T10:59:52|node1|node1|{RUN_ID}-s1'")
    slurm.submit(slurm.request(job, RUN_ID, 2))
    assert submitted(asked) == 1


def test_a_run_that_was_reopened_does_not_wait_for_the_end_of_what_closed_it(slurm: Slurm, asked: Path) -> None:
    run_dir = slurm.site.root / RUN_ID
    program(asked, "sbatch", "echo 8")
    job = Job.model_validate(PLAIN)
    JobStart(run_dir, 1, 0).note()
    close(run_dir, {"state": "failed"})
    reopen(run_dir)
    for state in ("RUNNING", "COMPLETING"):
        program(asked, "squeue", f"echo '7|{state}|None|2026-11-29T10:59:52|node1|node1|{RUN_ID}-s1'")
        slurm.submit(slurm.request(job, RUN_ID, None))
    assert submitted(asked) == 2
    started = f"echo '8|RUNNING|None|2026-11-29T11:59:52|node1|node1|{RUN_ID}-s2'"
    program(asked, "squeue", started)
    slurm.submit(slurm.request(job, RUN_ID, None))
    JobStart(run_dir, 2, 0).note()  # it has begun, and has no attempt yet
    slurm.submit(slurm.request(job, RUN_ID, None))
    assert submitted(asked) == 2


def runs_now(asked: Path, since: float) -> None:
    """Have squeue say that the run's job has run since then."""
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since))
    program(asked, "squeue", f"echo '7|RUNNING|None|{moment}|node1|node[1-2]|{RUN_ID}-s1'")


def test_a_cancel_ends_a_job_that_has_no_controller_yet(
    slurm: Slurm, asked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = slurm.site.root / RUN_ID
    closed = []
    monkeypatch.setattr(slurm_module, "close_cancelled", closed.append)
    program(asked, "scancel", ":")
    runs_now(asked, time.time() - 3600)
    slurm.cancel(RUN_ID)
    assert asked.read_text().splitlines().count("7") == len(closed) == 1
    attempt = claim_next(run_dir, None)
    assert attempt
    slurm.cancel(RUN_ID)
    assert len(closed) == 1  # by its controller
    runs_now(asked, time.time() + 3600)  # a later start of the job, whose attempt was lost with its node
    slurm.cancel(RUN_ID)
    runs_now(asked, time.time() - 3600)
    attempt.write_verdict({"kind": "node_lost"})
    slurm.cancel(RUN_ID)
    assert asked.read_text().splitlines().count("7") == len(closed) == 3


def test_a_cancel_between_two_jobs_of_a_chain_is_none_of_its_failures(slurm: Slurm, asked: Path) -> None:
    program(asked, "squeue", ":")
    run_dir = slurm.site.root / "sums-1123456789"
    slurm.site.create(run_dir.name, {"cluster": "hpc", "submitted": 0.0, "job": PLAIN})
    attempt = claim_next(run_dir, None)
    assert attempt
    attempt.write_verdict({"kind": "walltime"})
    request_cancel(run_dir)
    slurm.cancel(run_dir.name)
    ended = result(run_dir)
    assert ended and (ended["state"], ended["reason"]) == ("cancelled", "cancelled by request")


def test_a_job_that_lost_its_first_node_goes_back_to_the_queue(slurm: Slurm, asked: Path) -> None:
    program(asked, "scontrol", ":")
    lost = f"echo '7|RUNNING|None|2026-11-29T10:59:52|node1|node[2-3,05],other|{RUN_ID}-s1'"
    program(asked, "squeue", lost)
    status = slurm.status([RUN_ID])[RUN_ID]
    assert (status.state, status.reason) == (
        "queued",
        "SLURM job 7: its first node is lost; it goes back to the queue",
    )
    assert asked.read_text().splitlines()[-1] == "requeue 7"
    program(asked, "squeue", lost.replace("RUNNING", "COMPLETING"))  # it has given nodes back, and is over
    assert slurm.status([RUN_ID])[RUN_ID].reason == "SLURM job 7 is at its end"
    program(asked, "squeue", lost.replace("|node1|", "|node05|"))
    assert slurm.status([RUN_ID])[RUN_ID].state == "running"
    assert asked.read_text().count("requeue") == 1


def test_what_a_job_printed_before_any_attempt_is_told(slurm: Slurm, asked: Path) -> None:
    program(asked, "squeue", ":")
    program(asked, "sacct", "echo '7|FAILED|2026-11-29T10:59:52'")
    (slurm.folder / f"{RUN_ID}-s1.job").write_text("7")
    ended = "SLURM job 7 ended: FAILED at 2026-11-29T10:59:52; "
    again = "; fleetune resume submits it again"
    root = f"it printed nothing: fleetune doctor --test-job tells whether nodes have {slurm.home}"
    assert slurm.status([RUN_ID])[RUN_ID].reason == ended + root + again
    (slurm.folder / f"{RUN_ID}-s1.log").write_text("hello\nmodule: command not found\n\n")
    line = "the last line that it printed: module: command not found"
    assert slurm.status([RUN_ID])[RUN_ID].reason == ended + line + again
    request_cancel(slurm.site.root / RUN_ID)
    assert slurm.status([RUN_ID])[RUN_ID].reason == f"{ended}{line}; it is to end: fleetune cancel closes it"
    claim_next(slurm.site.root / RUN_ID, None)
    assert line not in slurm.status([RUN_ID])[RUN_ID].reason


def test_runs_that_have_ended_are_not_unknown_where_slurm_does_not_answer(slurm: Slurm, asked: Path) -> None:
    record = {"cluster": "hpc", "submitted": 0.0, "job": PLAIN}
    for run_id in ("done-0123456789", "open-0123456789"):
        slurm.site.create(run_id, record)
    close(slurm.site.root / "done-0123456789", {"state": "succeeded", "reason": None})
    program(asked, "squeue", "echo 'squeue: error: Unable to contact slurm controller' >&2; exit 1")
    standings = slurm.look(["done-0123456789", "open-0123456789"])
    assert standings["done-0123456789"].on_cluster.state == "ended"
    assert standings["open-0123456789"].on_cluster == ClusterStatus(
        "unknown", "SLURM: squeue: Unable to contact slurm controller"
    )
    before = asked.read_text()
    assert slurm.look(["done-0123456789"])["done-0123456789"].folder.result
    assert asked.read_text() == before  # there is nothing to ask about
