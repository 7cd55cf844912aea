"""MLflow is not there from the start, comes, and is killed: training goes on, and afterwards nothing is missing."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow_server import Server
from scene import REPORTED, delivered, mlflow_run, reported, rows, until

from orchestrator.control import cancel
from orchestrator.submit import submit
from runfolder.appended import read_lines
from runfolder.chain import attempts, last_attempt, result
from runfolder.delivered import is_delivered


@pytest.fixture
def server(home: Path) -> Iterator[Server]:
    """A server that is not started."""
    made = Server(f"sqlite:///{home}/server.db")
    yield made
    made.kill()


@pytest.mark.chaos  # orchestrator/tracking/ has each part of it in make test
@pytest.mark.usefixtures("cluster")
def test_training_goes_on_without_mlflow(server: Server, tiny_base: Path, sums: Path) -> None:
    job = {
        "name": "outage",
        "base": str(tiny_base),
        "method": {"kind": "lora", "rank": 4},
        "data": {"train": str(sums), "seq_len": 64},
        "train": {"steps": 100_000, "batch_tokens": 512, "lr": 1e-3},
        "resources": {"workers_per_node": 1},
        "tracking": {"uri": server.uri},
    }
    run_dir = submit(job).run_dir
    further(run_dir, 10)
    assert not (run_dir / "mlflow.json").exists()
    server.start()
    until(lambda: "tracking_restored" in said(run_dir))
    server.kill()
    until(lambda: said(run_dir)[-1] == "tracking_outage")
    further(run_dir, 20)
    cancel(run_dir.name)
    assert until(lambda: result(run_dir))["state"] == "cancelled"
    assert not is_delivered(run_dir)

    server.start()
    until(lambda: is_delivered(run_dir))
    for key in REPORTED:
        assert delivered(server.uri, run_dir, key) == reported(run_dir, key)
    assert [step for step, _ in reported(run_dir)] == list(range(1, len(rows(run_dir)) + 1))
    assert mlflow_run(server.uri, run_dir).info.status == "KILLED"
    assert len(attempts(run_dir)) == 1
    assert said(run_dir) == ["tracking_outage", "tracking_restored", "tracking_outage"]


def said(run_dir: Path) -> list[str]:
    """What the only attempt noted about MLflow."""
    noted = [event["event"] for event in read_lines(last_attempt(run_dir), "events.jsonl")]
    return [kind for kind in noted if kind.startswith("tracking")]


def further(run_dir: Path, steps: int) -> None:
    """Wait until the run has taken so many more steps."""
    known = len(rows(run_dir))
    until(lambda: len(rows(run_dir)) >= known + steps)
