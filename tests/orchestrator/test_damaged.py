"""Folders that are damaged, or of another version: named in one line, and in nobody's way."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from run_folders import claim, make_run, steps

import fleetune
from fleetune import InputError
from orchestrator import cli, runs
from orchestrator.controller import main
from orchestrator.tracking.delivery import undelivered
from orchestrator.tracking.trouble import trouble_of_run
from runfolder.chain import result
from runfolder.files import Damaged
from runfolder.requests import request_cancel

FILES: dict[str, tuple[str, str | bytes]] = {
    "job.yaml: found NoneType; allowed: an object": ("job.yaml", ""),
    "job.yaml: found list; allowed: an object": ("job.yaml", "- 1"),
    "job.yaml: found format 7; allowed: 1": ("job.yaml", "format: 7"),
    "job.yaml: not YAML: while parsing": ("job.yaml", "{"),
    "job.yaml: not YAML": ("job.yaml", b"\xff\xfe\x00"),
    "job.yaml: submitted: Input should be a valid number": ("job.yaml", "job: {train: {steps: 1}}"),
    "job.yaml: steps: Input should be": ("job.yaml", "{cluster: local, submitted: 1, job: {train: {steps: -3}}}"),
    "job.yaml: job: Input should be": ("job.yaml", "{cluster: local, submitted: 1, job: 3}"),
    "run.json: not JSON": ("run.json", "{torn"),
    "run.json: submitted: Input should be less": ("run.json", '{"cluster": null, "submitted": 1e30, "steps": 1}'),
    "claim.json: not JSON": ("attempts/1/claim.json", ""),
    "claim.json: found list": ("attempts/1/claim.json", "[]"),
    "claim.json: Unable to extract tag using discriminator 'kind'": ("attempts/1/claim.json", "{}"),
    "attempts/7: found no claim.json": ("attempts/7/other", ""),
    "verdict.json: not JSON": ("attempts/1/verdict.json", "{torn"),
    "verdict.json: kind: Field required": ("attempts/1/verdict.json", '{"x": 1}'),
    "mlflow.json: not JSON": ("mlflow.json", "{torn"),
    "mlflow.json: mlflow_run_id: Field required": ("mlflow.json", '{"x": 1}'),
    "events.jsonl: a line is not JSON": ("attempts/1/events.jsonl", "no JSON\n"),
    "metrics.jsonl: in a line: step: Input should be": ("attempts/1/metrics.jsonl", '{"step": "x", "time": 1}\n'),
}


def test_a_damaged_folder_is_unknown_with_the_reason_and_others_are_listed(home: Path) -> None:
    fine = make_run(home / "runs", runs.new_id("fine"), None)
    for why, (name, content) in FILES.items():
        run_dir = make_run(home / "runs", runs.new_id("bad"), None)
        steps(claim(run_dir), 1, 3)
        if name == "job.yaml":
            (run_dir / "run.json").unlink()  # as in folders of before there was one
        (run_dir / name).parent.mkdir(exist_ok=True)
        (run_dir / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        found = fleetune.status(run_dir.name)
        assert (found.run_id, found.state) == (run_dir.name, "unknown")
        assert why in str(found.reason)
        assert run_dir.name in str(found.reason)
        assert "\n" not in str(found.reason)
        assert fleetune.status(fine.name).steps == 100
    assert len(fleetune.list_runs()) == len(FILES) + 1
    assert list(undelivered()) == []


def test_a_folder_of_another_version_is_listed_and_resumed_by_none(home: Path) -> None:
    run_dir = make_run(home / "runs", runs.new_id("newer"), None)
    record: dict[str, Any] = yaml.safe_load((run_dir / "job.yaml").read_text())
    record["job"]["train"]["orbit"] = 7
    (run_dir / "job.yaml").write_text(yaml.safe_dump(record))
    assert fleetune.status(run_dir.name).steps == 100
    with pytest.raises(Damaged, match=r"job\.yaml: train\.orbit: Extra inputs are not permitted \(is it of another"):
        fleetune.resume(run_dir.name)
    # Its controller ends it, rather than to keep its workers from others for ever.
    assert main(run_dir) == 0
    ended = result(run_dir)
    assert ended and (ended["state"], ended["verdict"], ended["attempt"]) == ("failed", "user_error", 0)
    assert "train.orbit" in ended["reason"]


@pytest.mark.parametrize("name", ["secrets.json", "attempts/1/verdict.json", "attempts/1/claim.json"])
def test_the_controller_closes_a_run_that_is_damaged(home: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    run_dir = make_run(home / "runs", runs.new_id("bad"), None)
    for start in (None, 2):
        claim(run_dir, start).write_verdict({"kind": "node_lost"})
    (run_dir / name).write_text("{torn")
    assert main(run_dir) == 0
    ended = result(run_dir)
    assert ended and ended["state"] == "failed"
    assert ended["reason"].startswith(f"{run_dir / name}: not JSON")
    assert main(run_dir) == 0  # as the supervisor asks while MLflow has not got it


def test_a_run_that_cannot_be_read_ends_as_it_was_asked_to(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    run_dir = make_run(home / "runs", runs.new_id("newer"), None)
    text = (run_dir / "job.yaml").read_text()
    (run_dir / "job.yaml").write_text(text.replace("job:\n", "job:\n  orbit: 3\n"))  # of a later version
    request_cancel(run_dir)
    assert main(run_dir) == 0
    ended = result(run_dir)
    assert ended and ended["state"] == "cancelled"
    assert "orbit" in ended["reason"]


def test_a_run_whose_newest_slot_is_damaged_stays_as_it_is(home: Path) -> None:
    run_dir = make_run(home / "runs", runs.new_id("bad"), None)
    claim(run_dir)
    (run_dir / "attempts" / "1" / "claim.json").write_text("{torn")
    with pytest.raises(Damaged, match=r"claim\.json: not JSON"):
        main(run_dir)
    assert [path.name for path in (run_dir / "attempts").iterdir()] == ["1"]


def test_what_is_asked_of_a_damaged_run_is_answered_in_a_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = make_run(home / "runs", runs.new_id("bad"), None)
    (run_dir / "job.yaml").write_text("{")
    monkeypatch.setattr("sys.argv", ["fleetune", "resume", "bad"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr().err
    assert (ended.value.code, told.count("\n")) == (2, 1)
    assert told.startswith(f"{run_dir}/job.yaml: not YAML: ")


def test_word_of_trouble_that_cannot_be_read(home: Path) -> None:
    run_dir = make_run(home / "runs", runs.new_id("bad"), None)
    for text in ("{torn", '{"of": "another version"}'):
        (run_dir / "undelivered.json").write_text(text)
        trouble = trouble_of_run(run_dir)
        assert trouble and trouble.reason == f"{run_dir}/undelivered.json cannot be read"
        assert fleetune.status(run_dir.name).state == "unknown"
        with pytest.raises(InputError, match="nothing was tracked yet"):
            fleetune.compare(None, None)
