"""Delivery to a real MLflow: one run, every step once, whatever is killed, paused or unreachable."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from mlflow_runs import runs_of, series
from mlflow_server import Proxy, Server
from ports import free_port
from run_folders import claim, eval_row, expected, make_run, plan, step_row, steps

from orchestrator.comparison.compare import compare
from orchestrator.tracking import store
from orchestrator.tracking.delivery import CURSOR, Delivery, replay
from orchestrator.tracking.history import history
from orchestrator.tracking.store import check_uri, ui_command
from runfolder import chain
from runfolder.appended import read_lines
from runfolder.delivered import is_delivered
from runfolder.files import read_json
from runfolder.record import load_job


def events(run_dir: Path, number: int) -> list[str]:
    attempt = chain.Attempt(run_dir, number)
    return [event["event"] for event in read_lines(attempt, "events.jsonl")]


def test_history_takes_the_first_row_within_the_seals(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "run-a", None)
    first = claim(run_dir)
    steps(first, 1, 10)
    eval_row(first, 10, eval_loss=1.5)
    second = claim(run_dir, start=6)
    step_row(first, 11, loss=666.0)  # a zombie, behind its seal
    steps(second, 7, 12)
    found = history(run_dir)
    assert [(r["step"], r["kind"], r["attempt"]) for r in found] == [
        *[(step, "train", 1) for step in range(1, 11)],
        (10, "eval", 1),
        (11, "train", 2),
        (12, "train", 2),
    ]
    assert all(r["loss"] < 5 for r in found if r["kind"] == "train")


def test_history_stops_at_the_seal_of_a_closed_run(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "run-b", None)
    only = claim(run_dir)
    steps(only, 1, 3)
    (only.folder / "metrics.jsonl").open("a").write('{"step": 4, "time":')  # torn
    assert only.close({"state": "failed"})
    (only.folder / "metrics.jsonl").open("a").write(' 1, "loss": 2}\n')
    assert [r["step"] for r in history(run_dir)] == [1, 2, 3]


def test_a_whole_run_on_sqlite(home: Path, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "run-sqlite", None)
    attempt = claim(run_dir)
    delivery = Delivery(run_dir, attempt.number)
    steps(attempt, 1, 5)
    delivery.pump()
    assert [run.info.status for run in runs_of(None, run_dir)] == ["RUNNING"]
    plan(attempt)
    steps(attempt, 6, 7)
    eval_row(attempt, 7, eval_loss=1.25, eval_exact_match=0.5)
    (attempt.folder / "output").mkdir()
    (attempt.folder / "output" / "README.md").write_text("# card")
    assert attempt.close({"state": "succeeded"})
    assert not is_delivered(run_dir)
    assert delivery.finish("succeeded", 30)
    assert is_delivered(run_dir)

    (run,) = runs_of(None, run_dir)
    assert read_json(run_dir / "mlflow.json")["mlflow_run_id"] == run.info.run_id
    assert series(None, run_dir) == expected((1, 1, 7))
    assert run.info.status == "FINISHED"
    assert run.info.start_time == int(attempt.claim["time"] * 1000) <= run.info.end_time
    assert run.data.metrics["eval_exact_match"] == 0.5
    assert run.data.params["method.rank"] == "4"
    assert run.data.params["train.lr"] == str(load_job(run_dir).lr)
    assert run.data.params["data.train_digest"] == "1" * 64
    tags = run.data.tags
    assert (tags["fleetune.method"], tags["fleetune.version"]) == ("lora", "0.1.0")
    assert tags["mlflow.source.git.commit"] == "c0ffee"
    assert (tags["fleetune.git.dirty"], tags["fleetune.plan.trained"]) == ("True", "1234")
    assert tags["fleetune.env.python"].startswith("3.")
    assert [(i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs] == [("train.jsonl", "1" * 36)]
    client = store.client(store.resolve(None))
    assert {a.path for a in client.list_artifacts(run.info.run_id)} == {"job.yaml", "result.json", "output"}
    assert run.info.artifact_uri.startswith((home / "artifacts").as_uri())


def test_steps_that_were_done_again_are_compared_not_reported(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "run-redone", None)
    first = claim(run_dir)
    steps(first, 1, 10)
    Delivery(run_dir, 1).pump()
    steps(first, 11, 12)  # written, never delivered
    second = claim(run_dir, start=6)
    delivery = Delivery(run_dir, 2)
    steps(second, 7, 8)
    step_row(second, 9, loss=3.0)
    delivery.pump()
    steps(second, 10, 15)
    delivery.pump()
    assert series(None, run_dir) == expected((1, 1, 12), (2, 13, 15))
    differing = [
        (event["step"], event["key"], event["found"])
        for event in read_lines(second, "events.jsonl")
        if event["event"] == "redone_step_differs"
    ]
    assert differing == [(9, "loss", 3.0)]


def test_not_a_number_is_delivered_once(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "run-nan", None)
    first = claim(run_dir)
    step_row(first, 1, loss=float("nan"))
    Delivery(run_dir, 1).pump()
    second = claim(run_dir)
    step_row(second, 1, loss=float("nan"))
    Delivery(run_dir, 2).pump()
    assert len(series(None, run_dir)) == 1
    assert "redone_step_differs" not in events(run_dir, 2)


def test_system_metrics_are_delivered_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.tracking.environment.SAMPLE_S", 10.0)
    run_dir = make_run(tmp_path, "run-system", None)
    claim(run_dir)
    delivery = Delivery(run_dir, 1)
    delivery.pump()
    delivery.pump()
    assert len(series(None, run_dir, "system/cpu_utilization_percentage")) == 1
    assert series(None, run_dir, "system/system_memory_usage_percentage")[0][1] > 0


def test_server_down_from_the_start_then_up_then_killed_in_the_middle(stopped: Server, tmp_path: Path) -> None:
    stopped.kill()  # another test may have started it
    run_dir = make_run(tmp_path, "run-outage", stopped.uri)
    attempt = claim(run_dir)
    delivery = Delivery(run_dir, 1)
    steps(attempt, 1, 5)
    delivery.pump()
    assert not (run_dir / "mlflow.json").exists()
    stopped.start()
    delivery._next_try = 0.0
    delivery.pump()
    assert series(stopped.uri, run_dir) == expected((1, 1, 5))
    stopped.kill()
    steps(attempt, 6, 2000)
    delivery.pump()
    assert events(run_dir, 1) == ["tracking_outage", "tracking_restored", "tracking_outage"]
    assert attempt.close({"state": "failed"})
    assert not delivery.finish("failed", 1.0)
    assert not is_delivered(run_dir)
    stopped.start()
    assert replay(run_dir)
    (run_dir / "tracked.json").unlink()
    assert replay(run_dir)
    assert series(stopped.uri, run_dir) == expected((1, 1, 2000))
    assert runs_of(stopped.uri, run_dir)[0].info.status == "FAILED"


def test_a_paused_attempt_with_a_request_in_flight(server: Server, tmp_path: Path) -> None:
    proxy = Proxy(server.port, held=b"runs/log-batch")
    run_dir = make_run(tmp_path, "run-zombie", proxy.uri)
    zombie = claim(run_dir)
    steps(zombie, 1, 10)
    old = Delivery(run_dir, 1)
    proxy.holding = False
    old.pump()
    proxy.holding = True
    steps(zombie, 11, 14)
    pumping = threading.Thread(target=old.pump)
    pumping.start()
    assert proxy.caught.wait(20)  # its rows 11 to 14 are under way, and it is paused
    pumping.join(20)

    live = claim(run_dir, start=8)
    steps(zombie, 15, 20)  # it wakes and writes behind its seal
    proxy.holding = False
    new = Delivery(run_dir, 2)
    steps(live, 9, 18)
    new.pump()
    assert series(server.uri, run_dir) == expected((1, 1, 14), (2, 15, 18))
    old._next_try = 0.0
    old.pump()
    assert not old.finish("succeeded", 1.0)
    assert b"200" in proxy.release()  # now the request arrives, and is answered
    assert series(server.uri, run_dir) == expected((1, 1, 14), (2, 15, 18))
    assert runs_of(server.uri, run_dir)[0].info.status == "RUNNING"


def test_delivery_stops_between_batches_when_a_successor_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = make_run(tmp_path, "run-fenced", None)
    steps(claim(run_dir), 1, 900)
    client = store.client(store.resolve(None))
    send = client.log_batch

    def log_batch(*arguments: Any, metrics: Any = (), **others: Any) -> None:
        send(*arguments, metrics=metrics, **others)
        if metrics and chain.last_attempt(run_dir).number == 1:
            claim(run_dir, start=0)  # while the first attempt was paused in its first delivery

    monkeypatch.setattr(client, "log_batch", log_batch)
    monkeypatch.setattr("orchestrator.tracking.delivery.client", lambda _: client)
    Delivery(run_dir, 1).pump()
    assert series(None, run_dir) == expected((1, 1, 300))  # 900 metrics, three of a step
    Delivery(run_dir, 2).pump()
    assert series(None, run_dir) == expected((1, 1, 900))


def test_a_successor_repairs_what_a_late_cursor_says(server: Server, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "run-cursor", server.uri)
    steps(claim(run_dir), 1, 9)
    Delivery(run_dir, 1).pump()
    (run,) = runs_of(server.uri, run_dir)
    store.client(server.uri).set_tag(run.info.run_id, CURSOR, json.dumps({"metrics.jsonl": 3}))
    steps(claim(run_dir, start=9), 10, 11)
    Delivery(run_dir, 2).pump()
    assert series(server.uri, run_dir) == expected((1, 1, 9), (2, 10, 11))


def test_controllers_that_open_at_once_share_one_run(server: Server, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "run-race", server.uri)
    claim(run_dir)
    barrier, ids = threading.Barrier(4), []

    def open_() -> None:
        client = store.client(server.uri)
        barrier.wait()
        ids.append(store.open_run(client, run_dir, server.uri, fence=lambda: None).info.run_id)

    racers = [threading.Thread(target=open_) for _ in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    store.open_run(store.client(server.uri), run_dir, server.uri, fence=lambda: None)
    (run,) = runs_of(server.uri, run_dir)
    assert ids == [run.info.run_id] * 4


def test_a_run_made_by_a_killed_controller_is_adopted(server: Server, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "run-orphan", server.uri)
    claim(run_dir)
    client = store.client(server.uri)
    orphan = store._create_mlflow_run(client, store._experiment(client, "fakes", server.uri), run_dir)
    Delivery(run_dir, 1).pump()
    assert [run.info.run_id for run in runs_of(server.uri, run_dir)] == [orphan]


def test_several_controllers_on_one_sqlite_file(tmp_path: Path) -> None:
    folders = [make_run(tmp_path, f"run-many-{i}", None) for i in range(4)]

    def deliver(run_dir: Path) -> None:
        attempt = claim(run_dir)
        delivery = Delivery(run_dir, 1)
        for first in range(1, 60, 10):
            steps(attempt, first, first + 9)
            delivery.pump()
        attempt.close({"state": "cancelled"})
        assert delivery.finish("cancelled", 60)

    threads = [threading.Thread(target=deliver, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for folder in folders:
        assert series(None, folder) == expected((1, 1, 60))
        assert runs_of(None, folder)[0].info.status == "KILLED"


def test_a_reopened_run_goes_on_in_the_same_mlflow_run(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "run-reopened", None)
    first = claim(run_dir)
    steps(first, 1, 4)
    first.close({"state": "failed"})
    assert replay(run_dir)
    assert chain.reopen(run_dir)
    assert not is_delivered(run_dir)
    second = chain.claim_next(run_dir, chain.Start(1, 4))
    assert second
    delivery = Delivery(run_dir, second.number)
    steps(second, 5, 6)
    delivery.pump()
    assert runs_of(None, run_dir)[0].info.status == "RUNNING"
    assert not Delivery(run_dir, 1).finish("failed", 5)
    assert second.close({"state": "succeeded"})
    assert delivery.finish("succeeded", 30)
    assert series(None, run_dir) == expected((1, 1, 4), (second.number, 5, 6))
    assert runs_of(None, run_dir)[0].info.status == "FINISHED"


def test_a_run_that_never_started_is_said_to_be_killed(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "run-unstarted", None)
    assert not replay(run_dir)
    assert chain.close(run_dir, {"state": "cancelled"})
    assert replay(run_dir)
    assert runs_of(None, run_dir)[0].info.status == "KILLED"


@pytest.mark.parametrize("uri", [None, "sqlite:////srv/m.db", "http://host:5000", "postgresql+psycopg2://u:p@h/db"])
def test_uris_that_can_be_reached_from_everywhere(uri: str | None) -> None:
    check_uri(uri)


@pytest.mark.parametrize(
    "uri", ["./mlruns", "file:///tmp/mlruns", "sqlite:///m.db", "sqlite:///", "http://", "ftp://h"]
)
def test_other_uris_are_one_clear_line(uri: str) -> None:
    with pytest.raises(ValueError, match=r"^tracking\.uri: found .*; allowed: ") as error:
        check_uri(uri)
    assert uri in str(error.value)
    assert "\n" not in str(error.value)


def test_the_ui_command_of_a_server_says_that_it_is_one() -> None:
    with pytest.raises(ValueError, match="http://host:1 is a server already"):
        ui_command("http://host:1")
    command, settings = ui_command(None, port := free_port())
    assert command[command.index("--port") + 1] == str(port)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert settings["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"


def test_comparing_delivers_what_a_long_outage_held_up(home: Path) -> None:
    run_dir = make_run(home / "runs", "late-0123456789", None)
    attempt = claim(run_dir)
    steps(attempt, 1, 3)
    attempt.close({"state": "succeeded"})
    assert compare(None, None).runs
    assert is_delivered(run_dir)
    assert series(None, run_dir) == expected((1, 1, 3))
