"""An evaluation as a job: submitted once, gone on with by later attempts, and judged here as if done here.

The cluster only queues; what Ray would have its worker do is done by the test.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from evaluations import claimed, fail, make_adapter, succeed
from jobs import only_queued

import fleetune
from orchestrator.errors import InputError, JobFailed
from orchestrator.evaluation import process
from orchestrator.evaluation.attempt import EvaluationWork, evaluate_attempt
from orchestrator.submit import Submission
from runfolder.appended import read_lines
from runfolder.chain import Attempt, Start, attempts, last_attempt
from runfolder.record import load_any_job
from runfolder.requests import Stop, request_pause, request_stop
from runfolder.snapshot import snapshot
from serving.kept import AnswersFile, merge_answers

ROOT = Path(__file__).parents[3]
TINY = ROOT / "examples" / "tiny"
ROWS = 8
MIXTURE = [sys.executable, str(TINY / "generate.py"), "rows", "mixture", "--train", "2", "--eval", str(ROWS)]


Report = fleetune.EvaluationReport
# An evaluating process that has one answer, of how many ever, and never another one.
ENDLESS = """
import json, sys, time
request = json.load(sys.stdin)
for done in (0, 1):
    print(json.dumps({"done": done, "total": 2 * len(request["tasks"][0]["questions"])}), flush=True)
time.sleep(1000)
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty FLEETUNE_HOME whose local cluster starts nothing."""
    monkeypatch.setenv("FLEETUNE_HOME", str(tmp_path / "home"))
    with only_queued(tmp_path / "home"):
        yield tmp_path / "home"


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of some rows."""
    folder = tmp_path_factory.mktemp("mixture")
    subprocess.run([*MIXTURE, str(folder)], check=True)
    path = folder / "mixture.yaml"
    path.write_text(yaml.safe_dump({"kind": "generation", "data": "mixture-eval.jsonl", "max_new_tokens": 6}))
    return path


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The folders of two adapters that change what the base says."""
    folder = tmp_path_factory.mktemp("adapters")
    return [str(make_adapter(TINY, folder / name, seed)) for seed, name in enumerate(("first", "second"))]


def evaluate(adapters: list[str], task: Path, work: Callable[[Path], None] = succeed, **options: Any) -> Any:
    """Evaluate on the cluster, which does this work once it has the job; what is closed needs none."""
    submissions = []

    def announce(submission: Submission) -> None:
        submissions.append(submission)
        if snapshot(submission.run_dir).result is None:
            work(submission.run_dir)

    report = fleetune.evaluate(adapters, [task], base=str(TINY), cluster="local", announce=announce, **options)
    return report, submissions[-1]


@pytest.fixture(scope="module")
def here(task: Path, adapters: list[str], tmp_path_factory: pytest.TempPathFactory) -> Report:
    """What comes of both adapters on this machine."""
    return fleetune.evaluate(adapters, [task], base=str(TINY), out=tmp_path_factory.mktemp("here"))


def assert_same(report: Report, expected: Report) -> None:
    """Compare what came of an evaluation; log-likelihoods are rounded by the company in the batch."""
    for result, other in zip(report.tasks[0].results, expected.tasks[0].results, strict=True):
        assert (result.label, result.digest) == (other.label, other.digest)
        assert [(score.right, score.shown) for score in result.scores] == [
            (score.right, score.shown) for score in other.scores
        ]
        assert [score.nats for score in result.scores] == pytest.approx(
            [score.nats for score in other.scores], rel=1e-4
        )
        assert (result.change is None) == (other.change is None)


def test_it_is_worth_what_it_is_here_and_is_made_once(
    home: Path, task: Path, adapters: list[str], here: Report
) -> None:
    evaluate(adapters[:1], task, limit=3)
    report, submission = evaluate(adapters, task, out=home / "elsewhere")
    assert_same(report, here)
    assert len({result.scores for result in here.tasks[0].results}) == 3
    assert report.asked == 3 * ROWS - 2 * 3, "what was answered before on this cluster is asked again"
    run = fleetune.status(submission.run_id)
    assert (run.name, run.state, run.step, run.steps) == ("evaluate", "succeeded", 3 * ROWS, 3 * ROWS)
    again, same = evaluate(adapters, task)
    assert (same.run_id, same.adopted) == (submission.run_id, True)
    assert_same(again, report)
    assert len(list((home / "runs").iterdir())) == 2


def test_what_an_attempt_has_saved_is_not_asked_again(
    home: Path, task: Path, adapters: list[str], here: Report
) -> None:
    answered = Path(here.tasks[0].results[1].file)
    place = Path(*answered.parts[-3:])

    def interrupted(run_dir: Path) -> None:
        first = claimed(run_dir)
        merge_answers(answered, first.folder / "answers" / place)
        saved = EvaluationWork(first, first.folder / "answers", 3 * ROWS)
        saved.count(ROWS)
        saved.save()
        succeed(run_dir)

    report, submission = evaluate(adapters, task, work=interrupted)
    assert_same(report, here)
    assert report.asked == 2 * ROWS
    second = attempts(home / "runs" / submission.run_id)[1]
    assert second.start and (second.start.attempt, second.start.step) == (1, ROWS)
    rows = read_lines(second, "metrics.jsonl")
    assert (rows[0]["step"], rows[-1]["step"]) == (ROWS, 3 * ROWS)


@pytest.mark.parametrize("what", ["warned", "paused"])
def test_an_attempt_that_is_asked_to_stop_saves_and_does(
    what: str, home: Path, task: Path, adapters: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "EVALUATOR", [sys.executable, "-I", "-S", "-c", ENDLESS])
    stopped: list[Attempt] = []

    def stop(run_dir: Path) -> None:
        attempt = claimed(run_dir)
        stopped.append(attempt)
        if what == "warned":
            request_stop(attempt, Stop("preemption", "", 1e10))
        else:
            request_pause(run_dir, 1)
        assert not evaluate_attempt(run_dir, attempt.number)
        fail(run_dir)

    with pytest.raises(JobFailed):
        evaluate(adapters[:1], task, work=stop)
    (attempt,) = stopped
    assert read_lines(attempt, "events.jsonl")[-1]["event"] == "stopped"
    assert not (attempt.folder / "output").exists()
    successor = last_attempt(home / "runs" / attempt.run_dir.name)
    saved = Start(1, 1) if what == "paused" else None  # else nothing was answered yet
    assert (successor.number, successor.start) == (2, saved)


def test_one_that_failed_is_told_and_made_anew_or_resumed(home: Path, task: Path, adapters: list[str]) -> None:
    for number in (1, 2):
        with pytest.raises(JobFailed, match="evaluate-.* failed: a bug\nsee: fleetune logs evaluate-"):
            evaluate(adapters, task, work=fail)
        assert len(list((home / "runs").iterdir())) == number
    newest = max((home / "runs").iterdir(), key=lambda run_dir: run_dir.name[-10:]).name
    assert fleetune.resume(newest) == newest
    with pytest.raises(JobFailed, match=f"{newest} failed: a bug"):  # one that was resumed is gone on with
        evaluate(adapters, task, work=fail)


def test_its_job_says_what_it_needs(home: Path, task: Path, adapters: list[str]) -> None:
    with pytest.raises(JobFailed):
        evaluate(adapters[:1], task, work=fail, overrides=["resources.walltime=1h", "env.X_Y=on demand"])
    (run_dir,) = (home / "runs").iterdir()
    job = load_any_job(run_dir)
    assert (job.resources.walltime, job.env) == (3600, {"X_Y": "on demand"})
    with pytest.raises(InputError, match="^evaluate: resources: .*an evaluation has one worker"):
        evaluate(adapters[:1], task, overrides=["resources.nodes=2"])
    with pytest.raises(InputError, match="^evaluate: name: "):
        evaluate(adapters[:1], task, overrides=["name=an evaluation"])
    with pytest.raises(InputError, match="^evaluate: train: "):
        evaluate(adapters[:1], task, overrides=["train.steps=2"])
    with pytest.raises(InputError, match="tasks of lm_eval: are asked on this machine alone"):
        fleetune.evaluate(adapters, ["lm_eval:arc_easy"], base=str(TINY), cluster="local")
    assert len(list((home / "runs").iterdir())) == 1


def test_merged_answers_are_whole(tmp_path: Path) -> None:
    source, target = tmp_path / "source.jsonl", tmp_path / "below" / "target.jsonl"
    answer = {"text": "yes", "tokens": 1, "log_likelihoods": [], "without_room": False}
    lines = [{"task": "t"}, {"key": "a", **answer}, {"key": "b", **answer}]
    source.write_text("\n".join(map(json.dumps, lines)) + '\n{"key": "c", "te')
    merge_answers(source, target)
    other = tmp_path / "other.jsonl"
    other.write_text(
        "\n".join(map(json.dumps, [{"task": "u"}, {"key": "b", **answer, "text": "no"}, {"key": "d", **answer}]))
    )
    merge_answers(other, target)
    merged = AnswersFile(target)
    assert merged.head == {"task": "t"} and list(merged.answers) == ["a", "b", "d"]
    assert merged.answers["b"].text == "yes" and [path.name for path in target.parent.iterdir()] == ["target.jsonl"]
