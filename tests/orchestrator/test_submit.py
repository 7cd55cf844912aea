"""Submission: what is frozen, and that a repeated one is one job."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from jobs import make_job

import fleetune
from clusters.base import ClusterStatus, SubmissionRefused, Unreachable
from clusters.local import Local
from fleetune import InputError
from orchestrator import backends, runs, submit
from orchestrator.planning import survey
from runfolder import chain
from runfolder.record import load_job, read_record
from runfolder.requests import cancel_requested, why_cancelled
from runfolder.secrets import read_secrets, remove_secrets

pytestmark = pytest.mark.usefixtures("home")


def queued() -> list[str]:
    return [entry.run_id for entry in Local.here().queue.list()]


def test_a_submission_is_frozen_and_queued(home: Path, tmp_path: Path) -> None:
    path = make_job(tmp_path)
    done = fleetune.submit(path, overrides=["train.lr=3e-4"])
    record = read_record(done.run_dir)
    job = load_job(done.run_dir)
    assert done.run_dir == home / "runs" / done.run_id
    assert queued() == [done.run_id]
    assert (job.base.model, job.data.train) == (str(tmp_path / "base"), str(tmp_path / "train.jsonl"))
    assert job.train.lr == 3e-4
    assert (record["run_id"], record["cluster"]) == (done.run_id, "local")
    assert set(record["versions"]) >= {"python", "fleetune"}
    assert re.fullmatch("[0-9a-f]{64}", record["digests"]["data.train"])
    assert re.fullmatch("[0-9a-f]{64}", record["digests"]["base"])
    assert record["git"] is None
    assert not list((home / "submitting").iterdir())


def test_paths_are_those_beside_the_file_else_those_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    path = make_job(there)
    make_job(here)
    (there / "train.jsonl").unlink()
    monkeypatch.chdir(here)
    job = load_job(fleetune.submit(path).run_dir)
    assert (job.base.model, job.data.train) == (str(there / "base"), str(here / "train.jsonl"))


def test_relative_folders_are_carried_as_absolute_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLEETUNE_HOME", "home")
    monkeypatch.setenv("FLEETUNE_CACHE", "cache")
    fleetune.submit(make_job(tmp_path))
    (entry,) = Local.here().queue.list()
    carried = {name: entry.environment[name] for name in ("FLEETUNE_HOME", "FLEETUNE_CACHE")}
    assert carried == {"FLEETUNE_HOME": str(tmp_path / "home"), "FLEETUNE_CACHE": str(tmp_path / "cache")}


def test_git_state_is_that_of_the_job(tmp_path: Path) -> None:
    path = make_job(tmp_path)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "job.yaml"], ["commit", "-qm", "a"]):
        subprocess.run(git + command, check=True)
    state = read_record(fleetune.submit(path).run_dir)["git"]
    assert re.fullmatch("[0-9a-f]{40}", state["commit"])
    assert state["dirty"] is True


def test_ids_are_labels_that_sort_by_time() -> None:
    found = [runs.new_id("a" * 32) for _ in range(50)]
    assert all(re.fullmatch(r"a{32}-[0-9a-z]{10}", run_id) and runs.RUN_ID.fullmatch(run_id) for run_id in found)
    assert [run_id[:-2] for run_id in found] == sorted(run_id[:-2] for run_id in found)
    assert runs.name_of(found[0]) == "a" * 32


def test_the_same_run_id_is_one_job(tmp_path: Path) -> None:
    path, run_id = make_job(tmp_path), runs.new_id("sums")
    first, again = (fleetune.submit(path, run_id=run_id) for _ in range(2))
    assert (first.run_id, first.adopted, again.run_id, again.adopted) == (run_id, False, run_id, True)
    assert queued() == runs.run_ids() == [run_id]


def test_a_run_id_is_not_given_to_another_job(tmp_path: Path) -> None:
    path, run_id = make_job(tmp_path), runs.new_id("sums")
    fleetune.submit(path, run_id=run_id)
    with pytest.raises(InputError, match="is taken by another job"):
        fleetune.submit(path, run_id=run_id, overrides=["train.steps=8"])
    for wrong in ("sums", "Sums-0123456789", "other-0123456789"):
        with pytest.raises(InputError, match="--run-id: found"):
            fleetune.submit(path, run_id=wrong)


def test_two_submissions_are_two_jobs(tmp_path: Path) -> None:
    path = make_job(tmp_path)
    assert len({fleetune.submit(path).run_id for _ in range(2)}) == 2
    assert len(queued()) == 2


def test_the_same_command_on_the_next_day_is_one_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_job(tmp_path)
    (tmp_path / "base" / "chat_template.jinja").write_text("{{ strftime_now('%d %B %Y') }}")

    def submit_on(day: int, **options: Any) -> submit.Submission:
        today = SimpleNamespace(today=lambda: date(2026, 11, day))
        monkeypatch.setattr(survey, "datetime", SimpleNamespace(date=today))
        return submit.submit(path, **options)

    def lose_answer(_: object) -> None:
        raise Unreachable("cut in the answer")

    with pytest.raises(Unreachable):
        submit_on(28, announce=lose_answer)
    done = submit_on(29)
    assert done.adopted and queued() == runs.run_ids() == [done.run_id]
    assert load_job(done.run_dir).data.date == date(2026, 11, 28)
    assert submit_on(30, run_id=done.run_id).adopted
    with pytest.raises(InputError, match="is taken by another job"):
        submit_on(30, run_id=done.run_id, overrides=["data.date=2026-11-28"])


def test_a_run_that_has_failed_is_not_gone_on_with(tmp_path: Path) -> None:
    path, run_id = make_job(tmp_path), runs.new_id("sums")
    chain.close(fleetune.submit(path, run_id=run_id).run_dir, {"state": "failed"})
    with pytest.raises(
        InputError, match=f"it has failed; go on with it: fleetune resume {run_id}; or submit it anew"
    ):
        fleetune.submit(path, run_id=run_id)


def test_a_run_that_its_cluster_has_lost_is_told_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, run_id = make_job(tmp_path), runs.new_id("sums")
    fleetune.submit(path, run_id=run_id)
    lost = ClusterStatus("unknown", "SLURM job 7 ended: FAILED; fleetune resume submits it again")
    monkeypatch.setattr(Local, "status", lambda *_: {run_id: lost})
    with pytest.raises(Unreachable, match=f"run {run_id}: {lost.reason}"):
        fleetune.submit(path, run_id=run_id)


def test_a_run_id_stays_on_its_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, run_id = make_job(tmp_path), runs.new_id("sums")
    monkeypatch.setitem(backends.CLUSTERS, "other", lambda: Local(tmp_path / "other"))
    fleetune.submit(path, run_id=run_id)
    with pytest.raises(InputError, match=f"--run-id: {run_id} is on cluster local; allowed: --cluster local"):
        fleetune.submit(path, run_id=run_id, cluster="other")
    assert not (tmp_path / "other" / "runs").exists()


def test_a_repetition_whose_answer_is_lost_names_how_to_give_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, run_id = make_job(tmp_path), runs.new_id("sums")

    def refuse(*_: object) -> None:
        raise Unreachable("SLURM: sbatch: Unspecified error")

    monkeypatch.setattr(Local, "submit", refuse)
    with pytest.raises(Unreachable) as first:
        fleetune.submit(path, run_id=run_id)
    assert "cancel" not in str(first.value)
    with pytest.raises(Unreachable, match=f"give it up: fleetune cancel {run_id}\nwhether it was"):
        fleetune.submit(path, run_id=run_id)


def test_a_resumption_that_is_refused_is_closed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = fleetune.submit(make_job(tmp_path)).run_dir

    def refuse(*_: object) -> None:
        raise SubmissionRefused("Job violates accounting/QOS policy")

    monkeypatch.setattr(Local, "submit", refuse)
    with pytest.raises(InputError, match="^Job violates accounting/QOS policy$"):
        fleetune.resume(run_dir.name)  # which goes on as it did
    assert not cancel_requested(run_dir)
    chain.close(run_dir, {"state": "failed"})

    def away(*_: object) -> None:
        raise Unreachable("no route")

    with (
        monkeypatch.context() as patch,
        pytest.raises(Unreachable, match="policy; whether .* is closed .*: no route"),
    ):
        patch.setattr(Local, "cancel", away)
        fleetune.resume(run_dir.name)
    chain.close(run_dir, {"state": "cancelled"})
    with pytest.raises(InputError, match=f"policy; {run_dir.name} is cancelled"):
        fleetune.resume(run_dir.name)
    assert cancel_requested(run_dir) and why_cancelled(run_dir) == "Job violates accounting/QOS policy"


CALLS = ("rename", "fsync", "link", "open", "mkdir", "unlink", "close")


def die_at(call: int, path: Path, answer: int) -> None:
    """Submit, and die by SIGKILL after so many calls that change files; tell the run id if one was announced."""
    count = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return wrapper

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    submit.submit(path, announce=lambda done: os.write(answer, done.run_id.encode()) and None)


def test_a_client_that_is_killed_anywhere_and_repeated_makes_one_job(home: Path, tmp_path: Path) -> None:
    path = make_job(tmp_path)
    known = 0
    for call in range(1, 200):
        answer, told = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                die_at(call, path, told)
            finally:
                os._exit(0)
        os.close(told)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        announced = os.read(answer, 100).decode()
        os.close(answer)
        if not killed or (announced and not list((home / "submitting").glob("[!.]*"))):
            break  # the submission was over
        repeated = fleetune.submit(path)
        known += 1
        assert not announced or repeated.run_id == announced
        assert len(queued()) == len(runs.run_ids()) == known
        assert queued()[-1] == repeated.run_id
    assert known > 10
    assert len(queued()) == known + 1


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"data": {"train": "none.jsonl", "seq_len": 8}}, r"data\.train: .*/none\.jsonl: found no such file"),
        ({"base": "./none"}, r"base\.model: .*"),
        (
            {"data": {"train": "train.jsonl", "seq_len": 65}, "train": {"steps": 7, "batch_tokens": 65}},
            r"data\.seq_len: found 65; allowed: at most 64 .*",
        ),
        ({"tracking": {"uri": "file:///x"}}, r"tracking\.uri: found .*"),
        ({"resources": {"gpus_per_node": 64}}, r"resources.*: found 64.*"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_begun(
    home: Path, tmp_path: Path, change: dict[str, Any], line: str
) -> None:
    path = make_job(tmp_path, **change)
    with pytest.raises(InputError) as error:
        fleetune.submit(path)
    assert re.match(line, str(error.value))
    assert "\n" not in str(error.value)
    assert runs.run_ids() == queued() == []
    assert not list((home / "submitting").glob("*"))


def test_a_dry_run_makes_nothing(home: Path, tmp_path: Path) -> None:
    text = fleetune.dry_run(make_job(tmp_path))
    assert yaml.safe_load(text)["workers"] == 2
    assert not (home / "runs").exists() and queued() == []


def test_unknown_clusters_are_told_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--cluster: found 'locale'; did you mean 'local'\\? allowed: local"):
        fleetune.submit(make_job(tmp_path), cluster="locale")


def test_a_secret_in_env_or_in_an_address_is_in_one_file_for_its_owner(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = {
        "HF_TOKEN": "hf_0",
        "MY_API_KEY": "hf_1",
        "HTTPS_PROXY": "http://bob:hf_2@proxy:3128",
        "NCCL_DEBUG": "INFO",
    }
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://hf_3@tracking")
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror/?api_key=hf_4")
    job = make_job(tmp_path, env=env)
    assert "hf_" not in fleetune.dry_run(job)
    run_dir = fleetune.submit(job).run_dir
    telling = [path for path in home.rglob("*") if path.is_file() and b"hf_" in path.read_bytes()]
    assert telling == [run_dir / "secrets.json"]
    assert telling[0].stat().st_mode & 0o077 == 0
    kept = json.loads(telling[0].read_text())
    assert kept == {name: value for name, value in env.items() if name != "NCCL_DEBUG"} | {
        "MLFLOW_TRACKING_URI": "https://hf_3@tracking",
        "HF_ENDPOINT": "https://mirror/?api_key=hf_4",
    }
    assert load_job(run_dir).env == {"NCCL_DEBUG": "INFO"}
    entry = json.loads((home / "local" / "queue" / f"{run_dir.name}.json").read_text())
    assert set(entry["secrets"]) == set(kept)
    chain.close(run_dir, {"state": "failed"})
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_shell")  # the job's comes before it
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror/?api_key=hf_5")  # the shell's is renewed
    fleetune.resume(run_dir.name)
    assert json.loads(telling[0].read_text()) == {**kept, "HF_ENDPOINT": "https://mirror/?api_key=hf_5"}


def test_a_run_whose_secrets_were_removed_gets_those_of_the_shell_or_stays_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path, env={"MY_API_KEY": "k1"}, tracking={"uri": "http://me:k2@tracking:5000"})
    run_dir = fleetune.submit(job).run_dir
    chain.close(run_dir, {"state": "failed"})
    remove_secrets(run_dir)
    with pytest.raises(
        InputError, match=f"{run_dir.name}: MY_API_KEY was removed when it ended; set it in this shell"
    ):
        fleetune.resume(run_dir.name)
    assert chain.result(run_dir)
    monkeypatch.setenv("MY_API_KEY", "k3")
    fleetune.resume(run_dir.name)
    assert chain.result(run_dir) is None and read_secrets(run_dir) == {"MY_API_KEY": "k3"}


@pytest.mark.parametrize(
    ("name", "value"), [("A=B", "x"), ("", "x"), ("1A", "x"), ("A", "x\0"), ("A", "x" * 200_000)]
)
def test_what_is_no_variable_is_refused(home: Path, tmp_path: Path, name: str, value: str) -> None:
    with pytest.raises(InputError, match="env"):
        fleetune.dry_run(make_job(tmp_path, env={name: value}))
    assert not (home / "runs").exists()
