"""The command line: exit codes, what goes to which stream, JSON, and what is imported."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import make_job
from rich.console import Console
from run_folders import claim, make_run, plan, steps

from methods.options import KINDS
from orchestrator import cli, describe, doctor, progress, runs
from orchestrator.terminal import render
from runfolder.chain import close

ROOT = Path(__file__).parents[2]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: Path) -> Call:  # noqa: ARG001
    """Run a command; gives exit code, output and errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fleetune", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def finished(home: Path, state: str, reason: str | None, ranks: int = 0, verdict: str | None = None) -> str:
    run_dir = make_run(home / "runs", runs.new_id("fake"), None)
    attempt = claim(run_dir)
    plan(attempt)
    steps(attempt, 1, 100)
    (attempt.folder / "output").mkdir()
    logs = attempt.folder / "logs"
    logs.mkdir()
    for rank in range(ranks):
        (logs / f"rank-{rank}.log").write_text(f"pid {rank}\n")
    if verdict:
        attempt.write_verdict({"kind": verdict})
    close(run_dir, {"state": state, "reason": reason})
    return run_dir.name


def test_submit_prints_the_run_id_alone(call: Call, tmp_path: Path) -> None:
    code, out, err = call("submit", str(make_job(tmp_path)), "--set", "name=other", "--set", "train.precision=bf16")
    assert (code, out) == (0, f"{runs.run_ids()[0]}\n")
    assert out.startswith("other-")
    assert err.startswith("warning: train.precision")


def test_every_reading_command_speaks_json(call: Call, tmp_path: Path, home: Path) -> None:
    path = str(make_job(tmp_path))
    run_id = finished(home, "succeeded", None)

    def read(*arguments: str) -> Any:
        code, out, _ = call(*arguments, "--json")
        assert code == 0
        return json.loads(out)

    status = read("status", run_id)
    keys = {"run_id", "name", "cluster", "state", "reason", "step", "steps", "attempt", "verdict", "mlflow_run_id"}
    assert keys | {"run_dir", "output_dir"} <= set(status)
    assert (status["state"], status["step"], status["output_dir"]) == (
        "succeeded",
        100,
        f"{status['run_dir']}/output",
    )
    assert status["figures"]["goodput"]["queued"] > 0 and status["figures"]["peak_memory_bytes"] == 1 << 30
    (listed,) = read("list")
    assert listed == {**status, "figures": None, "looked_at": listed["looked_at"]}  # each looks when it is asked
    assert read("logs", run_id) == {"run_id": run_id, "rank": 0, "text": ""}
    assert read("logs", run_id, "--all-ranks") == {"run_id": run_id, "rank": None, "text": ""}
    assert read("plan", path)["sizes"]["trained"] > 0
    assert {method["kind"] for method in read("methods")} >= {"full", "lora", "rslora", "dora"}
    assert {check["level"] for check in read("doctor")} <= {"ok", "warn", "fail"}
    assert read("cluster", "status")["capacity"]["total"] >= 1
    assert read("submit", path)["run_id"] in runs.run_ids()


def test_people_get_tables(call: Call, tmp_path: Path, home: Path) -> None:
    run_id = finished(home, "failed", "rank 0: [bold]boom[/]")
    assert "rank 0: [bold]boom[/]" in call("list")[1]
    assert "rank 0: [bold]boom[/]" in call("status", run_id)[1]
    assert "about" in call("plan", str(make_job(tmp_path)))[1]
    assert "in 4 bits" not in call("plan", str(make_job(tmp_path)))[1]
    four_bits = call("plan", str(make_job(tmp_path)), "--set", "method=qlora")[1]
    assert "of the weights, which each worker holds at every ZeRO stage" in four_bits
    assert "on the host" not in four_bits
    offloading = ("--set", "method=full", "--set", "sharding={offload: optimizer}")
    planned = call("plan", str(make_job(tmp_path)), *offloading)[1]
    assert "of each worker's optimizer, which its device does not hold" in planned
    listing = call("methods")[1]
    assert "rank-stabilised" in listing and "0.0002 *" in listing
    assert len(listing.splitlines()) == len(KINDS) + 3
    assert "* on a base of hidden size 2048" in listing
    assert "Take it for ranks of 64 and more" not in listing
    one = call("methods", "rslora")[1]
    assert "Take it for ranks of 64 and more" in one and "ZeRO 0-3" in one
    assert "*" not in call("methods", "prompt")[1]


def test_a_method_takes_a_line_at_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(render, "_console", lambda: Console(width=80))
    render.show_methods(describe.methods())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-2]] == list(KINDS)


def test_the_cluster_on_this_machine_is_told_in_sentences(call: Call, home: Path) -> None:
    queue = home / "local" / "queue"
    queue.mkdir(parents=True, exist_ok=True)
    (queue / "broken-0123456789.json").write_text("{")
    code, out, _ = call("cluster", "status")
    assert code == 0
    assert "runs as process" in out and "does not run; the supervisor starts it" in out and "no run waits" in out
    assert "broken-0123456789: " in out
    assert not set("{}[]") & set(out) and "None" not in out


def test_the_module_of_the_command_line_is_a_program_too() -> None:
    command = [sys.executable, "-m", "orchestrator.cli", "methods", "lora", "--json"]
    answered = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(answered.stdout)[0]["kind"] == "lora"


def test_the_clusters_file_is_named_and_listed_in_few_words(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEETUNE_CLUSTERS", "none")
    path = tmp_path / "mine.yaml"
    path.write_text(f"tower: {{kind: local, root: {tmp_path}/tower}}")
    assert "tower" in call("--clusters", str(path), "clusters")[1]
    listed = json.loads(call("--clusters", str(path), "clusters", "list", "--json")[1])
    assert [cluster["name"] for cluster in listed] == ["local", "tower"]
    assert call("--clusters", "none.yaml", "clusters")[0] == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["submit", "none.yaml"],
        ["submit"],
        ["submit", "{job}", "--set", "train.lr=fast"],
        ["submit", "{job}", "--set", "data.train=none.jsonl"],
        ["submit", "{job}", "--cluster", "moon"],
        ["submit", "{job}", "--dry-run", "--set", "base=./none"],
        ["submit", "{job}", "--cluster", "local,moon"],
        ["plan", "{job}", "--set", "method=lorra"],
        ["status", "none"],
        ["logs", "none"],
        ["cancel", "none"],
        ["resume", "none"],
        ["logs", "none", "-f"],
        ["logs", "none", "--rank", "0", "--all-ranks"],
        ["stauts", "none"],
        ["compare", "--experiment", "none"],
    ],
)
def test_wrong_input_is_exit_code_2_and_no_traceback(call: Call, tmp_path: Path, arguments: list[str]) -> None:
    job = str(make_job(tmp_path))
    code, out, err = call(*(job if argument == "{job}" else argument for argument in arguments))
    assert (code, out) == (2, "")
    assert err and "Traceback" not in err
    assert runs.run_ids() == []


def test_the_logs_of_all_ranks_are_printed_and_followed(call: Call, home: Path) -> None:
    run_id = finished(home, "succeeded", None, ranks=2)
    merged = "=== attempt 1 ===\nrank 0 | pid 0\nrank 1 | pid 1\n"
    for options in ([], ["-f"]):
        assert call("logs", run_id, "--all-ranks", *options)[:2] == (0, merged)


def test_waiting_tells_success_and_failure(call: Call, home: Path) -> None:
    good, bad = finished(home, "succeeded", None), finished(home, "failed", "rank 0: boom")
    assert call("logs", "-f", good)[0] == 0
    code, _, err = call("logs", "-f", bad)
    assert code == 1
    assert err == f"{bad} failed: rank 0: boom\nsee: fleetune status {bad}\n"


def test_a_pause_and_a_cancellation_are_no_failures(call: Call, home: Path) -> None:
    paused = finished(home, "cancelled", "paused at step 100; fleetune resume goes on from there", verdict="paused")
    assert call("logs", "-f", paused)[::2] == (
        4,
        f"{paused} cancelled (paused): paused at step 100; fleetune resume goes on from there\n",
    )
    assert "cancelled (paused)" in call("status", paused)[1]
    assert json.loads(call("status", paused, "--json")[1])["state"] == "cancelled"
    cancelled = finished(home, "cancelled", "cancelled by request", verdict="cancelled")
    assert call("logs", "-f", cancelled)[::2] == (4, f"{cancelled} cancelled: cancelled by request\n")


def test_a_run_that_nobody_knows_is_exit_code_3(call: Call, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_FOLLOW_TIMEOUT_S", 0.0)
    run_dir = make_run(home / "runs", runs.new_id("fake"), None)
    code, _, err = call("logs", "-f", run_dir.name)
    assert code == 3
    assert run_dir.name in err


def test_a_cluster_that_cannot_start_is_told_everywhere_and_not_waited_for(
    call: Call, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_FOLLOW_TIMEOUT_S", 0.0)
    failure = home / "local" / "ray.failed"
    failure.write_text(json.dumps({"starts": 3, "reason": "OSError: no space"}))
    told = f"Ray did not start, 3 times in a row: OSError: no space (see {home}/local/ray.log)"
    code, out, err = call("submit", str(make_job(tmp_path)), "--wait")
    (run_id,) = runs.run_ids()
    assert (code, err) == (3, f"run {run_id}: {told}; look again with: fleetune status\n")
    assert f"queued ({told})" in out
    assert call("logs", "-f", run_id)[0] == 3
    assert told in call("status", run_id)[1]
    assert told in call("list")[1]
    assert told in call("cluster", "status")[1]
    (check,) = doctor._cluster()
    assert (check.level, check.found) == ("fail", told)
    failure.unlink()
    assert json.loads(call("status", run_id, "--json")[1])["reason"] == "needs 2 cpus, Ray is starting"


HEAVY = ["torch", "ray", "mlflow", "transformers", "datasets", "numpy", "pandas", "psutil", "deepspeed", "peft"]


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        (["--help"], [*HEAVY, "pydantic", "yaml"]),
        (["submit", "--help"], [*HEAVY, "yaml"]),
        (["list"], HEAVY),
        (["methods"], HEAVY),
        (["submit", "{job}", "--dry-run"], HEAVY),
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(
    tmp_path: Path, arguments: list[str], heavy: list[str]
) -> None:
    job = str(make_job(tmp_path))
    code = f"""
import sys
from orchestrator.cli import main
sys.argv = ["fleetune", *{[job if argument == "{job}" else argument for argument in arguments]}]
try:
    main()
except SystemExit as ended:
    print("found", ended.code, [name for name in {heavy} if name in sys.modules])
"""
    environment = {"FLEETUNE_HOME": str(tmp_path / "home"), "PATH": ""}
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines()[-1] == "found 0 []", done.stderr
