"""Any damage to any file of a run folder: that run is unknown, or ends with the reason, and all others are served."""

import contextlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from run_folders import claim, make_run, plan, steps

import fleetune
from clusters import answer, slurm
from clusters.entry import entry_text
from clusters.local import Local
from clusters.remote.shelf import Shelf
from clusters.slurm import Slurm
from clusters.slurm_script import SlurmConfig
from clusters.supervisor import Supervisor
from fleetune import InputError
from orchestrator import controller, runs
from orchestrator.status import ENDED
from orchestrator.terminal import render
from orchestrator.tracking.collect import troubles
from orchestrator.tracking.delivery import undelivered
from orchestrator.tracking.trouble import Trouble, note_trouble
from runfolder import chain
from runfolder.delivered import note_delivered
from runfolder.files import Damaged, write_json
from runfolder.requests import Stop, request_cancel, request_pause, request_stop
from runfolder.secrets import write_secrets

SEED = 0
CASES = 40
BYTES = (
    b"",
    b"{",
    b"[]",
    b"null",
    b"5",
    b'"text"',
    b"{}",
    b'{"format": 7}',
    b"\xff\xfe\x00\x9f",
    b"[" * 9000,
    b"nan\n",
)
VALUES: tuple[Any, ...] = (None, True, -1, 5, 10**40, 1e300, float("nan"), "text", "", [], [5], {}, {"x": 1})


def every_file_run(root: Path, closed: bool) -> Path:
    """A run whose folder has every kind of file: two attempts, with a failure and a reopening between them."""
    run_dir = make_run(root, runs.new_id("whole"), "http://127.0.0.1:9")
    write_secrets(run_dir, {"HF_TOKEN": "hf_of_nobody"})
    for start in (None, 3):
        attempt = claim(run_dir, start)
        plan(attempt)
        steps(attempt, (start or 0) + 1, (start or 0) + 4)
        attempt.event("saving", step=1)
        attempt.event("evaluating", step=1, began=1.0, what="rows", done=0, total=9)
        attempt.append("system.jsonl", {"step": 1, "time": 1.0, "system/cpu": 5.0})
        request_stop(attempt, Stop("walltime", "over", 1e9))
        attempt.write_verdict({"kind": "walltime", "reason": "over", "evidence": ""})
        write_json(attempt.folder / "outcome.json", {"failures": {}})
        (attempt.folder / "logs").mkdir()
        (attempt.folder / "logs" / "rank-0.log").write_text("line\n")
        if start is None:
            attempt.close({"state": "failed", "reason": None})
            chain.reopen(run_dir)
    request_pause(run_dir, 50)
    mlflow = {"mlflow_run_id": "a" * 32, "uri": "http://127.0.0.1:9", "experiment_id": "0"}
    (run_dir / "mlflow").mkdir()
    write_json(run_dir / "mlflow" / "run.json", mlflow)
    write_json(run_dir / "mlflow.json", mlflow)
    note_trouble(run_dir, Trouble(True, "no such server", "start it"))
    if closed:
        chain.last_attempt(run_dir).close({"state": "failed", "reason": "as it should be"})
        note_delivered(run_dir, "a" * 32)
    else:
        request_cancel(run_dir, save=True)
    return run_dir


def changed_json(rng: random.Random, content: bytes) -> bytes:
    """A file of JSON (or its last line) in which one value, at any depth, is another one or is not there."""
    *before, last = content.strip().split(b"\n") if content.startswith(b'{"') else [content]
    record = node = json.loads(last)
    while True:
        key = rng.choice([*node, "new"])
        if isinstance(node.get(key), dict) and rng.random() < 0.7:
            node = node[key]
            continue
        if rng.random() < 0.3:
            node.pop(key, None)
        else:
            node[key] = rng.choice(VALUES)
        return b"\n".join([*before, json.dumps(record).encode()]) + b"\n"


def damage(rng: random.Random, run_dir: Path) -> str:
    """Damage one file or folder of a run; says what was done."""
    paths = sorted(path for path in run_dir.rglob("*"))
    path = rng.choice(paths)
    name, is_json = str(path.relative_to(run_dir)), path.suffix in (".json", ".jsonl")
    if path.is_dir():
        shutil.rmtree(path)
        return f"{name}: {_replace(rng, path)}"
    content = path.read_bytes()
    kinds: list[Callable[[], bytes]] = [
        lambda: content[: rng.randrange(len(content))],
        lambda: rng.choice(BYTES),
        lambda: rng.randbytes(50),
    ]
    if is_json:
        kinds += [lambda: changed_json(rng, content)] * 5
    if rng.random() < 0.15:
        path.unlink()
        return f"{name}: {_replace(rng, path)}"
    new = rng.choice(kinds)()
    path.write_bytes(new)
    return f"{name}: {new[:300]!r}"


def _replace(rng: random.Random, path: Path) -> str:
    """Put something of another kind at a path, or nothing."""
    match rng.randrange(3):
        case 0:
            path.mkdir()
            return "an empty folder"
        case 1 if not path.suffix:
            path.write_text("a file")
            return "a file"
    return "nothing"


def added(rng: random.Random, run_dir: Path) -> str:
    """Put something into a run folder that nobody writes there."""
    name = rng.choice(["attempts/7", "attempts/²", "attempts/007", "requests/cancel-x.json", "requests/pause-.json"])
    (run_dir / name).mkdir() if rng.random() < 0.5 else (run_dir / name).write_text("x")
    return f"{name} was added"


@contextlib.contextmanager
def told_in_one_line() -> Iterator[None]:
    """Whatever a user asks of a damaged run is done, or refused in a line."""
    try:
        yield
    except (InputError, Damaged, OSError) as error:
        assert str(error) and "\n" not in str(error)


def check_everybody(local: Local, good: Path, bad: Path) -> None:
    """That every verb and a tick of the supervisor serve the good run, and tell of the bad one."""
    by_run = {status.run_id: status for status in fleetune.list_runs()}
    assert by_run[good.name].state == "queued"
    assert by_run[bad.name].state in ("queued", "starting", "preempted", "unknown", *ENDED)
    assert "\n" not in (by_run[bad.name].reason or "")
    with contextlib.redirect_stdout(io.StringIO()):
        render.show_runs(by_run.values())
        render.show_run(fleetune.status(bad.name))
    assert fleetune.status(good.name).reason
    request = {"verb": "snapshots", "run_ids": [bad.name, good.name], "in_full": False}
    far = answer.reply_to(local, Shelf(local.home / "files"), request)
    assert set(json.loads(json.dumps(far))["answer"]) == {good.name, bad.name}
    assert set(Slurm(SlurmConfig(kind="slurm"), local.home).status([bad.name, good.name])) == {good.name, bad.name}
    assert list(undelivered()) in ([], [bad])
    assert good.name not in troubles()
    started = []
    supervisor = Supervisor(local)
    supervisor._head.keep = lambda: "127.0.0.1:1"  # type: ignore[method-assign]
    supervisor._start = lambda entry, _: started.append(entry.run_id)  # type: ignore[method-assign]
    supervisor.tick()
    assert good.name in started
    assert local.taken_workers() == 0
    fleetune.logs(good.name)
    for verb in (fleetune.logs, fleetune.pause, fleetune.cancel, fleetune.resume):
        with told_in_one_line():
            verb(bad.name)
    with told_in_one_line():
        fleetune.fetch(bad.name, local.home / "fetched")


@patch.dict(os.environ)  # the controller takes secrets into it
@pytest.mark.parametrize("closed", [False, True])
def test_any_damage_is_that_runs_own(closed: bool, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "ask_slurm", lambda *_: "")
    monkeypatch.setattr(slurm, "call_slurm", lambda *_: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(controller, "deliver_rest", lambda _: 0)  # MLflow takes seconds
    local = Local.here()
    good = make_run(home / "runs", runs.new_id("good"), None)
    whole = every_file_run(home / "whole", closed)
    bad = home / "runs" / whole.name
    rng = random.Random(SEED)
    for _ in range(CASES):
        shutil.copytree(whole, bad)
        for run_dir in (good, bad):
            local.queue.add(run_dir.name, entry_text(run_dir, 1, {}))
        done = added(rng, bad) if rng.random() < 0.1 else damage(rng, bad)
        try:
            check_everybody(local, good, bad)
            with told_in_one_line():
                assert controller.main(bad) in (0, 1)
        except Exception as error:
            pytest.fail(f"{done}: {type(error).__name__}: {error}", pytrace=True)
        shutil.rmtree(bad)
        for entry in (home / "local" / "queue").iterdir():
            entry.unlink()
