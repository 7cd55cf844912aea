"""Runs of another machine come to the MLflow of whoever compares: from their folders, each step once."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from another_home import AnotherHome, NoRoute, far_cluster
from mlflow_runs import runs_of, series
from mlflow_server import Server
from run_folders import claim, eval_row, expected, make_run, plan, step_row, steps

import fleetune
from clusters.controllers import COLLECTED, controller_command
from fleetune import InputError
from orchestrator import backends, runs
from orchestrator.comparison.run import load_runs
from orchestrator.tracking import store
from orchestrator.tracking.collect import deliver_all
from orchestrator.tracking.delivery import Delivery
from runfolder import chain, news
from runfolder.delivered import is_delivered, note_delivered, tracked_run
from runfolder.files import read_json
from runfolder.mirror import Mirror
from runfolder.record import create_run_folder
from runfolder.requests import request_cancel
from runfolder.row_results import RowResult, last_row_results, write_row_results
from runfolder.site import LocalSite
from runfolder.stages import StageNote, note_stage


@pytest.fixture(scope="module")
def far_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The FLEETUNE_HOME of another machine, which is the cluster `elsewhere`."""
    there = tmp_path_factory.mktemp("there")
    cluster = far_cluster("elsewhere", AnotherHome(there), there / "fleetune")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends.CLUSTERS, "elsewhere", lambda: cluster)
        yield there / "fleetune"
    cluster.far_side.close()
    assert not list(there.rglob("mlflow*.db")), "somebody opened a database there"


@pytest.fixture(autouse=True)
def nothing_known(home: Path) -> Iterator[None]:
    """Each test knows of its own runs alone."""
    yield
    shutil.rmtree(home / "known", ignore_errors=True)


def far_run(far_home: Path, name: str, uri: str | None = None) -> Path:
    """A run of another machine, of which this one knows."""
    run_dir = make_run(far_home / "runs", runs.new_id(name), uri)
    runs.remember(run_dir.name, "elsewhere")
    return run_dir


def mirror_of(run_dir: Path) -> Path:
    return Path(os.environ["FLEETUNE_HOME"]) / "mirrors" / "elsewhere" / run_dir.name


def test_a_run_that_goes_on_is_restarted_resumed_and_ends(far_home: Path) -> None:
    run_dir = far_run(far_home, "whole")
    first = claim(run_dir)
    plan(first)
    steps(first, 1, 10)
    (first.folder / "metrics.jsonl").open("a").write('{"step": 11, "time":')  # not whole yet
    assert deliver_all() == {}
    assert series(None, run_dir) == expected((1, 1, 10))
    (run,) = runs_of(None, run_dir)
    assert run.info.status == "RUNNING"
    assert run.data.tags["fleetune.run_dir"] == str(run_dir)
    assert run.data.tags["fleetune.plan.trained"] == "1234"

    second = claim(run_dir, start=6)
    step_row(first, 12, loss=666.0)  # a zombie, behind its seal
    steps(second, 7, 15)
    assert deliver_all() == {} == deliver_all()
    assert second.close({"state": "failed", "reason": "rank 0: too little memory"})
    assert fleetune.compare("fakes", None).undelivered == {}
    assert series(None, run_dir) == expected((1, 1, 10), (2, 11, 15))
    (ended,) = runs_of(None, run_dir)
    assert ended.info.status == "FAILED" and ended.data.tags["fleetune.reason"] == "rank 0: too little memory"
    assert fleetune.status(run_dir.name).mlflow_run_id == run.info.run_id

    assert chain.reopen(run_dir)
    fourth = chain.claim_next(run_dir, chain.Start(2, 15))
    assert fourth
    steps(fourth, 16, 20)
    assert deliver_all() == {}
    assert runs_of(None, run_dir)[0].info.status == "RUNNING"
    (fourth.folder / "output" / "deep").mkdir(parents=True)
    (fourth.folder / "output" / "deep" / "README.md").write_text("# card")
    (fourth.folder / "output" / "weights").write_bytes(bytes(2 << 20))
    assert fourth.close({"state": "succeeded"})
    assert deliver_all() == {}
    assert series(None, run_dir) == expected((1, 1, 10), (2, 11, 15), (fourth.number, 16, 20))
    (again,) = runs_of(None, run_dir)
    assert (again.info.run_id, again.info.status) == (run.info.run_id, "FINISHED")
    artifacts = Path(again.info.artifact_uri.removeprefix("file://"))
    files = {path.relative_to(artifacts).as_posix() for path in artifacts.rglob("*") if path.is_file()}
    assert files == {"job.yaml", "result.json", "output/deep/README.md"}
    assert read_json(artifacts / "result.json") == {"state": "succeeded"}
    assert not (run_dir / "mlflow").exists() and fleetune.status(run_dir.name).tracking is None


def test_what_is_delivered_costs_one_look(far_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        run_dir = far_run(far_home, f"many-{number}")
        steps(claim(run_dir), 1, 2)
        chain.last_attempt(run_dir).close({"state": "failed"})
    assert deliver_all() == {}
    asked: list[Any] = []
    far_side = backends.open_cluster("elsewhere").far_side  # type: ignore[attr-defined]
    ask = far_side.ask

    def counted(request: Any) -> Any:
        asked.append(request)
        return ask(request)

    monkeypatch.setattr(far_side, "ask", counted)
    assert deliver_all() == {}
    ((verb, known),) = [(request["verb"], request["known"]) for request in asked]
    assert verb == "news" and list(known.values()) == [2, 2, 2]


def test_two_laptops_deliver_each_into_its_own(
    far_home: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = far_run(far_home, "two")
    first = claim(run_dir)
    steps(first, 1, 4)
    assert deliver_all() == {}
    here = series(None, run_dir)
    shutil.copy(home / "mlflow.db", tmp_path / "mlflow.db")
    steps(first, 5, 8)
    assert first.close({"state": "succeeded"})
    with monkeypatch.context() as other:
        other.setenv("FLEETUNE_HOME", str(tmp_path))
        assert not runs.handles()
        assert fleetune.compare("fakes", None, "elsewhere").undelivered == {}
        assert series(None, run_dir) == expected((1, 1, 8))
        assert runs_of(None, run_dir)[0].info.status == "FINISHED"
    assert series(None, run_dir) == here == expected((1, 1, 4))
    assert deliver_all() == {}
    assert series(None, run_dir) == expected((1, 1, 8))


@dataclass(frozen=True)
class CutAfter(AnotherHome):
    """A link that is cut after so many bytes of answers, as long as a file is there."""

    size: int
    file: Path

    def process(self, command: Sequence[str]) -> list[str]:
        """The command behind a pipe that ends early."""
        script = f'if [ -e {self.file} ]; then "$@" | stdbuf -o0 head -c {self.size}; else exec "$@"; fi'
        return ["bash", "-o", "pipefail", "-c", script, "cut", *super().process(command)]


def test_a_transfer_that_was_cut_goes_on(far_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = tmp_path / "cut"
    cut.touch()
    link = CutAfter(far_home.parent, 7 << 20, cut)
    cluster = far_cluster("elsewhere", link, far_home)
    monkeypatch.setitem(backends.CLUSTERS, "elsewhere", lambda: cluster)
    run_dir = far_run(far_home, "cut")
    small = far_run(far_home, "small")  # newer, so it comes first
    steps(claim(small), 1, 3)
    only = claim(run_dir)
    for _ in range(12):
        only.event("filler", text="x" * (1 << 20))
    steps(only, 1, 9)
    only.close({"state": "failed"})
    assert list(deliver_all()) == ["elsewhere"]
    assert series(None, small) == expected((1, 1, 3))
    assert runs_of(None, run_dir) == []
    events = mirror_of(run_dir) / "attempts" / "1" / "events.jsonl"
    here = events.stat().st_size
    assert 3 << 20 < here < 5 << 20
    os.truncate(events, here - 1000)  # the laptop died, too, in the middle of a write
    cut.unlink()
    assert deliver_all() == {}
    assert events.read_bytes() == (only.folder / "events.jsonl").read_bytes()
    assert series(None, run_dir) == expected((1, 1, 9))
    assert is_delivered(mirror_of(run_dir))
    cluster.far_side.close()


def test_results_by_row_come_of_the_last_evaluation_once_a_run_has_ended(far_home: Path) -> None:
    run_dir = far_run(far_home, "judged")
    only = claim(run_dir)
    steps(only, 1, 3)
    for step in (1, 3):
        write_row_results(only, step, [RowResult(1, "a", loss=float(step), weight=1.0)])
        eval_row(only, step, eval_loss=float(step))
    assert deliver_all() == {}
    assert last_row_results(mirror_of(run_dir)) is None
    only.close({"state": "succeeded"})
    assert deliver_all() == {}
    path = last_row_results(mirror_of(run_dir))
    assert path and path.name == "step-3.jsonl"
    assert not (path.parent / "step-1.jsonl").exists()


def test_several_who_compare_at_once_send_each_step_once(far_home: Path) -> None:
    folders = [far_run(far_home, f"once-{number}") for number in range(3)]
    for run_dir in folders:
        steps(claim(run_dir), 1, 30)
    chain.last_attempt(folders[0]).close({"state": "failed"})
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: deliver_all(), range(3)))
    assert found == [{}, {}, {}]
    for run_dir in folders:
        assert series(None, run_dir) == expected((1, 1, 30))


def test_a_mirror_that_is_lost_or_spoiled_comes_again(far_home: Path) -> None:
    run_dir = far_run(far_home, "lost")
    first = claim(run_dir)
    steps(first, 1, 5)
    assert deliver_all() == {}
    shutil.rmtree(mirror_of(run_dir))
    assert deliver_all() == {}
    (mirror_of(run_dir) / "mlflow" / "run.json").write_text("[]")
    (mirror_of(run_dir) / "attempts" / "1" / "claim.json").write_text("{}")
    (mirror_of(run_dir) / "mirror.json").write_text("{}")
    steps(first, 6, 9)
    assert deliver_all() == {}
    assert series(None, run_dir) == expected((1, 1, 9))


def test_a_server_gets_half_from_the_controller_and_the_rest_from_here(far_home: Path, server: Server) -> None:
    run_dir = far_run(far_home, "half", server.uri)
    first = claim(run_dir)
    steps(first, 1, 6)
    controller = Delivery(run_dir, 1)
    controller.pump()
    steps(first, 7, 9)
    assert deliver_all() == {}
    steps(first, 10, 12)
    controller.pump()
    assert first.close({"state": "succeeded"})
    assert deliver_all() == {}
    assert series(server.uri, run_dir) == expected((1, 1, 12))
    assert runs_of(server.uri, run_dir)[0].info.status == "FINISHED"
    assert controller.finish("succeeded", 10)
    assert tracked_run(run_dir) and series(server.uri, run_dir) == expected((1, 1, 12))


def test_a_server_whose_run_was_made_from_here_is_adopted_there(far_home: Path, server: Server) -> None:
    run_dir = far_run(far_home, "adopted", server.uri)
    first = claim(run_dir)
    steps(first, 1, 3)
    assert deliver_all() == {}
    steps(first, 4, 6)
    controller = Delivery(run_dir, 1)
    controller.pump()
    assert first.close({"state": "failed"})
    assert controller.finish("failed", 10)
    assert deliver_all() == {}
    assert series(server.uri, run_dir) == expected((1, 1, 6))
    assert runs_of(server.uri, run_dir)[0].info.status == "FAILED"


def test_the_run_that_the_folder_names_counts_whichever_was_made_here(far_home: Path, server: Server) -> None:
    run_dir = far_run(far_home, "agreed", server.uri)
    first = claim(run_dir)
    steps(first, 1, 3)
    assert deliver_all() == {}
    (mine,) = runs_of(server.uri, run_dir)
    client = store.client(server.uri)
    theirs = store._create_mlflow_run(client, mine.info.experiment_id, run_dir)  # at the same time
    assert deliver_all() == {}
    assert {run.info.run_id for run in runs_of(server.uri, run_dir)} == {mine.info.run_id, theirs}
    record = {"mlflow_run_id": theirs, "uri": server.uri, "experiment_id": mine.info.experiment_id}
    store._claim_mlflow_run(run_dir, record)
    assert deliver_all() == {}
    assert [run.info.run_id for run in runs_of(server.uri, run_dir)] == [theirs]
    assert series(server.uri, run_dir) == expected((1, 1, 3))


def test_a_cluster_that_is_down_and_a_run_that_is_damaged_hold_up_nobody(
    far_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = far_run(far_home, "bad"), far_run(far_home, "good")
    for run_dir in (bad, good):
        steps(claim(run_dir), 1, 3)
    (bad / "attempts" / "1" / "claim.json").write_text("{")
    down = far_cluster("down", NoRoute(), far_home)
    monkeypatch.setitem(backends.CLUSTERS, "down", lambda: down)
    runs.remember(runs.new_id("gone"), "down")
    runs.remember(runs.new_id("unknown"), "nowhere")
    found = fleetune.compare("fakes", None).undelivered
    assert found.keys() == {bad.name, "down", "nowhere"}
    assert "claim.json: not JSON" in found[bad.name] and str(bad) in found[bad.name]
    assert found["down"] == "cluster down: no route"
    assert "--cluster: found 'nowhere'" in found["nowhere"]
    assert series(None, good) == expected((1, 1, 3))
    with pytest.raises(InputError, match="found 'nonsense'"):
        fleetune.compare(None, None, "nonsense")


def test_a_database_of_another_machine_is_left_to_it(far_home: Path, tmp_path: Path) -> None:
    run_dir = far_run(far_home, "theirs", f"sqlite:///{tmp_path}/theirs.db")
    steps(claim(run_dir), 1, 3)
    chain.last_attempt(run_dir).close({"state": "failed"})
    assert deliver_all() == {} == deliver_all()
    assert not (tmp_path / "theirs.db").exists() and runs_of(None, run_dir) == []


HOSTILE = """
import json, sys
sys.stdin.readline()
print("fleetune-answers", flush=True)
for line in sys.stdin:
    known = json.loads(line)["known"]
    news = {run_id: {"run_dir": "/there", "parts": [json.loads(sys.argv[1])], "gone": []} for run_id in known}
    print(json.dumps({"answer": {"runs": news, "more": []}}), flush=True)
"""


@dataclass(frozen=True)
class Hostile(AnotherHome):
    """A link behind which somebody answers what he likes."""

    answer: str

    def process(self, command: Sequence[str]) -> list[str]:  # noqa: ARG002
        """A process that speaks the protocol."""
        return [sys.executable, "-c", HOSTILE, self.answer]


@pytest.mark.parametrize(
    "part",
    [
        '{"path": "../../../evil", "offset": null, "data": "eA=="}',
        '{"path": "/tmp/evil", "offset": null, "data": "eA=="}',
        '{"path": "output/../../evil", "offset": null, "data": "eA=="}',
        '{"path": "mlflow.json", "offset": null, "data": "eA=="}',
        '{"path": "job.yaml", "offset": null, "data": "not base64"}',
        '{"path": "attempts/1/metrics.jsonl", "offset": 5, "data": "eA=="}',
        '{"path": "attempts/1/claim.json", "offset": null, "data": "eA==", "mode": 511}',
        '["job.yaml"]',
    ],
)
def test_a_far_side_writes_nowhere_but_in_its_mirror(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    hostile = far_cluster("hostile", Hostile(tmp_path, part), tmp_path)
    monkeypatch.setitem(backends.CLUSTERS, "hostile", lambda: hostile)
    run_id = runs.new_id("evil")
    runs.remember(run_id, "hostile")
    before = {path for path in home.rglob("*") if "mirrors" not in path.parts}
    (why,) = deliver_all().values()
    assert "\n" not in why
    assert {path for path in home.rglob("*") if "mirrors" not in path.parts} == before
    assert [path.name for path in (home / "mirrors" / "hostile").rglob("*") if path.is_file()] in (
        [".lock"],
        [".lock", "metrics.jsonl"],
    )
    shutil.rmtree(home / "mirrors" / "hostile")
    hostile.far_side.close()


def test_names_that_a_mirror_has() -> None:
    for path in ("job.yaml", "attempts/12/seals.json", "output/a b/ü.json", "output/..hidden", "mlflow/run.json"):
        assert news._is_mirrored(path) == path
    for path in ("", ".", "output", "output/", "output//x", "output/./x", "output/x\0", "output/x/..", "job.yaml\n"):
        with pytest.raises(ValueError, match="nothing that a mirror has"):
            news._is_mirrored(path)
    for path in ("attempts/0/claim.json", "attempts/01/claim.json", "attempts/1/logs/rank-0.log", "secrets.json"):
        with pytest.raises(ValueError, match="nothing that a mirror has"):
            news._is_mirrored(path)


def test_rows_of_an_attempt_whose_seal_is_being_written_wait(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "runs", runs.new_id("seal"), None)
    first = claim(run_dir)
    steps(first, 1, 3)
    found = news.news_of_runs(tmp_path / "runs", {run_dir.name: {}})
    assert "attempts/1/metrics.jsonl" in {part.path for part in found.runs[run_dir.name].parts} and not found.more
    second = claim(run_dir, start=2)
    seals = second.folder / "seals.json"
    written = seals.read_text()
    seals.unlink()  # taken, and its seals are not there yet
    found = news.news_of_runs(tmp_path / "runs", {run_dir.name: {}})
    assert "attempts/1/metrics.jsonl" not in {part.path for part in found.runs[run_dir.name].parts}
    assert found.more == [run_dir.name]
    site = LocalSite(tmp_path / "runs")
    told = dict(Mirror(tmp_path / "mirror").update(site, [run_dir.name]))
    assert told == {run_dir.name: "its folder changes just now; repeat it"}
    seals.write_text(written)
    assert dict(Mirror(tmp_path / "mirror").update(site, [run_dir.name])) == {run_dir.name: None}


def test_a_slot_that_is_taken_while_rows_are_read_makes_them_void(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = make_run(tmp_path / "runs", runs.new_id("late"), None)
    steps(claim(run_dir), 1, 3)
    refresh = news.refresh

    def taken_meanwhile(folder: Path) -> None:
        refresh(folder)
        if chain.last_slot(run_dir) == 1:
            claim(run_dir, start=2)

    monkeypatch.setattr(news, "refresh", taken_meanwhile)
    first = news.news_of_runs(tmp_path / "runs", {run_dir.name: {}})
    assert (first.runs[run_dir.name].parts, first.more) == ([], [run_dir.name])
    again = news.news_of_runs(tmp_path / "runs", {run_dir.name: {}})
    files = [part.path for part in again.runs[run_dir.name].parts]
    assert not again.more and {"attempts/1/metrics.jsonl", "attempts/2/seals.json"} < set(files)


def controller(run_dir: Path, far_home: Path, **variables: str) -> None:
    """Run a real controller to its end, as another user."""
    environment = os.environ | {"HOME": str(far_home.parent), "FLEETUNE_HOME": str(far_home)} | variables
    ran = subprocess.run(controller_command(str(run_dir)), env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_a_controller_there_opens_no_database(far_home: Path) -> None:
    run_dir = far_run(far_home, "closed")
    steps(claim(run_dir), 1, 3)
    request_cancel(run_dir)
    controller(run_dir, far_home, **COLLECTED)
    assert chain.result(run_dir) and is_delivered(run_dir) and tracked_run(run_dir) is None
    assert not (run_dir / "mlflow").exists()
    assert deliver_all() == {}
    assert series(None, run_dir) == expected((1, 1, 3))
    assert runs_of(None, run_dir)[0].info.status == "KILLED"


def test_what_a_controller_there_does_while_an_attempt_runs(far_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = far_run(far_home, "pumped")
    first = claim(run_dir)
    steps(first, 1, 6)
    second = claim(run_dir, start=3)
    steps(second, 4, 5)
    step_row(second, 6, loss=9.0)
    with monkeypatch.context() as there:
        there.setenv(*next(iter(COLLECTED.items())))
        there.setattr("orchestrator.tracking.environment.SAMPLE_S", 10.0)
        there.setenv("FLEETUNE_HOME", str(far_home))
        Delivery(run_dir, 2).pump()
    assert not (run_dir / "mlflow").exists()
    assert "redone_step_differs" in (second.folder / "events.jsonl").read_text()
    events = (second.folder / "events.jsonl").read_bytes()
    assert deliver_all() == {}
    assert (second.folder / "events.jsonl").read_bytes() == events
    assert events == (mirror_of(run_dir) / "attempts" / "2" / "events.jsonl").read_bytes()
    assert series(None, run_dir) == expected((1, 1, 6))
    assert len(series(None, run_dir, "system/cpu_utilization_percentage")) == 1
    assert runs_of(None, run_dir)[0].data.tags["fleetune.env.python"].startswith("3.")


def test_runs_of_another_root_of_this_machine_are_read_in_place(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clusters.yaml").write_text(f"beside: {{kind: local, root: {tmp_path / 'beside'}}}\n")
    monkeypatch.setenv("FLEETUNE_CLUSTERS", str(tmp_path / "clusters.yaml"))
    monkeypatch.setattr(backends, "_opened", {})
    run_dir = make_run(tmp_path / "beside" / "runs", runs.new_id("beside"), None)
    runs.remember(run_dir.name, "beside")
    first = claim(run_dir)
    steps(first, 1, 3)
    assert deliver_all() == {}
    steps(first, 4, 5)
    assert first.close({"state": "failed"})
    note_delivered(run_dir, None)  # as its controller does
    assert deliver_all() == {}
    assert series(None, run_dir) == expected((1, 1, 5))
    assert tracked_run(run_dir) == runs_of(None, run_dir)[0].info.run_id
    assert (
        not (home / "mirrors" / "beside" / run_dir.name).exists() and not (tmp_path / "beside" / "mlflow.db").exists()
    )


def test_what_somebody_there_has_in_a_database_comes_here_all_the_same(far_home: Path) -> None:
    run_dir = far_run(far_home, "both")
    first = claim(run_dir)
    steps(first, 1, 3)
    assert first.close({"state": "failed"})
    store._claim_mlflow_run(run_dir, {"mlflow_run_id": "theirs", "uri": "sqlite:////nowhere/mlflow.db"})
    note_delivered(run_dir, "theirs")
    assert deliver_all() == {}
    assert series(None, run_dir) == expected((1, 1, 3))
    assert tracked_run(run_dir) == "theirs"


def test_who_compares_on_the_other_machine_gets_what_laptops_submitted(home: Path) -> None:
    run_dir = make_run(home / "runs", runs.new_id("guest"), None)
    first = claim(run_dir)
    steps(first, 1, 3)
    assert first.close({"state": "failed"})
    note_delivered(run_dir, None)
    assert deliver_all() == {}
    assert series(None, run_dir) == expected((1, 1, 3))


def test_a_job_of_stages_is_one_run_with_those_of_its_stages_below_it(far_home: Path) -> None:
    folders = []
    for stage in ("sft", "dpo"):
        folder = make_run(far_home / "runs", runs.new_id(f"two-{stage}"), None)
        folders.append(folder)
    jobs = [yaml.safe_load((folder / "job.yaml").read_text())["job"] for folder in folders]
    whole = far_home / "runs" / runs.new_id("two")
    stages = dict(zip(("sft", "dpo"), jobs, strict=True))
    job = {"name": "two", "stages": stages, "tracking": jobs[0]["tracking"]}
    create_run_folder(whole, {"run_id": whole.name, "cluster": "elsewhere", "submitted": 1e9, "job": job})
    for stage, folder in zip(("sft", "dpo"), folders, strict=True):
        note_stage(whole, stage, StageNote(folder.name, "key", reused=False))
        record = yaml.safe_load((folder / "job.yaml").read_text())
        (folder / "job.yaml").write_text(yaml.safe_dump({**record, "stage_of": whole.name}))
        (folder / "run.json").unlink(missing_ok=True)
        attempt = claim(folder)
        steps(attempt, 1, 3)
        attempt.close({"state": "succeeded", "reason": None})
    chain.close(whole, {"state": "succeeded", "reason": None})
    runs.remember(whole.name, "elsewhere")
    assert deliver_all() == {}
    (parent,) = runs_of(None, whole)
    assert parent.info.status == "FINISHED" and parent.data.tags["fleetune.stages.dpo"] == folders[1].name
    for folder in folders:
        (child,) = runs_of(None, folder)
        assert child.data.tags[store.PARENT_TAG] == parent.info.run_id and child.info.status == "FINISHED"
        assert series(None, folder) == expected((1, 1, 3))
    assert deliver_all() == {} and len(runs_of(None, whole)) == 1
    compared = {run.run_id for run in load_runs(store.client(store.resolve(None)), "fakes", "")}
    assert compared >= {folder.name for folder in folders} and whole.name not in compared
