"""A job of stages is done once, wherever its controller dies, and what is wrong with one is said before it starts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jobs import make_job

import fleetune
from orchestrator import controller
from orchestrator.stages import work
from orchestrator.stages.planned import plan_stages
from orchestrator.submit import dry_run
from runfolder.chain import claim_next, last_attempt, result
from runfolder.outcome import final_word
from runfolder.record import load_any_job
from runfolder.requests import cancel_requested
from runfolder.site import LocalSite, Refused
from runfolder.staged_job import StagedJob
from runfolder.stages import stage_folders

WRITES = ("note_stage", "create_run_folder", "write_secrets", "close", "note_done")


class Killed(BaseException):
    """The controller is dead from here on."""


def write_stages(folder: Path, **changes: Any) -> Path:
    """A job of two stages, of which the second one begins with the model of the first."""
    plain = yaml.safe_load(make_job(folder).read_text())
    train = plain.pop("train")
    data = plain.pop("data")
    first = {"train": train, "data": data}
    plain["stages"] = {"first": first, "second": {**first, "base": "stage:first"}, **changes}
    return rewrite(folder / "stages.yaml", plain)


def rewrite(path: Path, plain: dict[str, Any]) -> Path:
    """A file of YAML without aliases, as JSON is."""
    path.write_text(json.dumps(plain))
    return path


def do(stage_dir: Path) -> None:
    """Do a stage, which leaves a model."""
    if result(stage_dir) is not None:
        return
    state = "cancelled" if cancel_requested(stage_dir) else "succeeded"
    attempt = claim_next(stage_dir, None) or last_attempt(stage_dir)
    merged = attempt.folder / "output" / "merged"
    merged.mkdir(parents=True)
    (merged / "config.json").write_text("{}")
    attempt.close(final_word(state, "", {"kind": state, "evidence": ""}, attempt.number))


def go_on(run_dir: Path, advance: Callable[[Path], None] = do) -> None:
    job = load_any_job(run_dir)
    assert isinstance(job, StagedJob)
    assert work.next_of_stages(run_dir, job, lambda stage_dir: advance(stage_dir)) is None


def test_wherever_the_controller_dies_each_stage_is_done_once(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(100):
        seeds = [f"stages.{stage}.train.seed={number}" for stage in ("first", "second")]
        run_dir = fleetune.submit(write_stages(tmp_path), overrides=seeds).run_dir
        before = set((home / "runs").iterdir())
        calls = 0

        def deadly(write: Callable[..., Any], dies_at: int = 2 * number) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                nonlocal calls
                calls += 2
                if calls == dies_at + 2:
                    raise Killed
                answer = write(*arguments)
                if calls == dies_at + 1:
                    raise Killed
                return answer

            return call

        with monkeypatch.context() as patch:
            for name in WRITES:
                patch.setattr(work, name, deadly(getattr(work, name)))
            try:
                go_on(run_dir, deadly(do))
            except Killed:
                pass
            else:
                break
        go_on(run_dir)
        ended = result(run_dir)
        assert ended is not None and ended["state"] == "succeeded", number
        stages = stage_folders(run_dir, ["first", "second"])
        assert set((home / "runs").iterdir()) - before - {home / "runs" / ".stages"} == set(stages.values())
        assert [last_attempt(folder).number for folder in stages.values()] == [1, 1], number
    assert number > 10, "it died at each of its writes"


def test_a_stage_fails_the_job_and_a_resumed_one_goes_on(home: Path, tmp_path: Path) -> None:
    run_dir = fleetune.submit(write_stages(tmp_path)).run_dir

    def fail(stage_dir: Path) -> None:
        attempt = claim_next(stage_dir, None)
        assert attempt is not None
        attempt.close(final_word("failed", "a bug", {"kind": "user_error", "evidence": ""}, 1))

    go_on(run_dir, fail)
    ended = result(run_dir)
    assert ended is not None and (ended["state"], ended["reason"]) == ("failed", "stage first: a bug")
    site = LocalSite(home / "runs")
    stage = stage_folders(run_dir, ["first"])["first"]
    with pytest.raises(Refused, match=f"is a stage of {run_dir.name}"):
        site.ask(stage.name, "reopen")
    site.ask(run_dir.name, "reopen")
    assert result(run_dir) is None and result(stage) is None
    go_on(run_dir)
    status = fleetune.status(run_dir.name)
    assert status.state == "succeeded" and status.stage is not None and status.stage["number"] == 2
    assert status.output_dir == f"{status.stage['run_dir']}/output"


def test_what_is_asked_of_a_job_is_asked_of_its_stage(home: Path, tmp_path: Path) -> None:
    run_dir = fleetune.submit(write_stages(tmp_path)).run_dir
    site = LocalSite(home / "runs")

    def cancel(stage_dir: Path) -> None:
        site.ask(run_dir.name, "cancel_saved")
        work.pass_on(run_dir, stage_dir)
        do(stage_dir)

    go_on(run_dir, cancel)
    ended = result(run_dir)
    assert ended is not None and ended["state"] == "cancelled"
    with pytest.raises(Refused, match="does not pause after a step"):
        site.ask(run_dir.name, "pause", 3)
    other = fleetune.submit(write_stages(tmp_path), overrides=["name=other"]).run_dir
    site.ask(other.name, "cancel")
    assert controller.take_further(other) == 0
    assert fleetune.status(other.name).state == "cancelled"
    assert not stage_folders(other, ["first", "second"]), "nothing was begun"


@pytest.mark.usefixtures("home")
def test_a_secret_reaches_the_stages_and_no_other_file(tmp_path: Path) -> None:
    plain = yaml.safe_load(write_stages(tmp_path).read_text())
    job = rewrite(tmp_path / "stages.yaml", {**plain, "env": {"MY_API_KEY": "kept-from-all"}})
    run_dir = fleetune.submit(job).run_dir
    go_on(run_dir)
    for folder in (run_dir, *stage_folders(run_dir, ["first", "second"]).values()):
        files = [path for path in folder.rglob("*") if path.is_file() and b"kept-from-all" in path.read_bytes()]
        assert files == [folder / "secrets.json"]


JUDGED = {"judge": "{first}?", "first": "prompt", "second": "prompt"}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"second": {"base": "stage:frist"}}, "stages.second.base.model: found stage:frist; allowed: an earlier"),
        ({"second": {"data": "stage:first"}}, "stages.second.data.train: found stage:first; allowed: a file of"),
        ({"second": {"tracking": {"experiment": "x"}}}, "stages.second.tracking: it is said once for all stages"),
        ({"First": {}}, "found 'First'; allowed: at most 20 of a-z"),
        ({"second": 3}, "stages.second: found 3; allowed: a mapping"),
        ({"second": {"method": {"kind": "lora", "rnk": 2}}}, r"stages.second: method.rnk: unknown key; did you mean"),
        ({"second": {"generate": {"rows": "train.jsonl", "columns": {"x": {"prompt": "{y}"}}}}}, "has no 'y'"),
        (
            {"second": {"generate": {"rows": "twice.jsonl", "columns": {"x": {"prompt": "{y}"}}}}},
            "twice.jsonl, row 3: found the id '1', which an earlier row has; allowed: one of its own",
        ),
        (
            {
                "second": {"generate": {"rows": "twice.jsonl", "columns": {"x": {"prompt": "{y}"}}}},
                "third": {"data": "stage:second/row.jsonl"},
            },
            "stages.third.data.train: found stage:second/row.jsonl; allowed: stage:second/rows.jsonl",
        ),
        (
            {"second": {"generate": {"rows": "train.jsonl", "columns": {"x": JUDGED}}}},
            "found columns that are both 'prompt'; allowed: two that differ",
        ),
        (
            {"second": {"generate": {"rows": "train.jsonl", "columns": {"x": {"prompt": "{principle.y}"}}}}},
            "found {principle.y} without generate.principles",
        ),
    ],
)
@pytest.mark.usefixtures("home")
def test_what_is_wrong_is_said_in_a_line(changes: dict[str, Any], problem: str, tmp_path: Path) -> None:
    plain = yaml.safe_load(write_stages(tmp_path).read_text())
    for stage, job in changes.items():
        own = {"train": plain["stages"]["first"]["train"], "data": plain["stages"]["first"]["data"]}
        plain["stages"][stage] = {**own, **job} if isinstance(job, dict) and "generate" not in job else job
    (tmp_path / "twice.jsonl").write_text('{"id": 1, "y": "a"}\n' * 2 + '{"id": 1, "y": "b"}\n')
    path = rewrite(tmp_path / "wrong.yaml", plain)
    with pytest.raises(fleetune.InputError) as error:
        dry_run(path)
    assert problem in str(error.value)


@pytest.mark.usefixtures("home")
def test_a_plan_refuses_what_a_submission_does(tmp_path: Path) -> None:
    plain = yaml.safe_load(write_stages(tmp_path).read_text())
    writes = {"generate": {"rows": "train.jsonl", "columns": {"x": {"prompt": "{y}"}}}}
    path = rewrite(tmp_path / "stages.yaml", {**plain, "stages": {"first": writes}})
    for look in (dry_run, lambda file: plan_stages(file, (), lambda *_: None, None, None)):
        with pytest.raises(fleetune.InputError, match=r"stages.first: generate.columns.x: row \w+ has no 'y'"):
            look(path)


@pytest.mark.usefixtures("home")
def test_a_method_that_cannot_be_merged_is_refused_where_a_stage_begins_with_it(tmp_path: Path) -> None:
    plain = yaml.safe_load(write_stages(tmp_path).read_text())
    path = rewrite(tmp_path / "stages.yaml", {**plain, "method": "prefix"})
    with pytest.raises(fleetune.InputError, match="prefix has no merged model"):
        dry_run(path)
