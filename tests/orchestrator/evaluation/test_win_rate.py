"""Win rates: orders, ties and intervals; a model that judges, and a reward model as plain libraries load it."""

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from evaluations import make_adapter
from run_folders import make_run
from sampling import each_sampled

import fleetune
from orchestrator import runs
from orchestrator.comparison.estimates import win_rate
from orchestrator.errors import InputError
from orchestrator.evaluation.judging import Duel, DuelEnd, ModelJudge
from orchestrator.evaluation.losses import too_much_lost
from orchestrator.evaluation.page import answers_page
from orchestrator.evaluation.questions import Preparation, PreparedTask
from orchestrator.evaluation.report import TaskResult, Wins
from orchestrator.evaluation.table import win_texts
from orchestrator.evaluation.task import TaskSpec
from orchestrator.tracking import store
from orchestrator.tracking.delivery import Delivery
from serving.kept import KeptAnswer
from trainer.data.rows import Row
from trainer.data.tokenizer import load_tokenizer

TINY = Path(__file__).parents[3] / "examples" / "tiny"
ROWS = 8


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of sums, of which the tiny base writes something."""
    rng = random.Random(4)
    folder = tmp_path_factory.mktemp("sums")
    rows = []
    for _ in range(ROWS):
        numbers = [rng.randrange(50), rng.randrange(50)]
        rows.append({"prompt": f"{numbers[0]} + {numbers[1]} =", "completion": f" {sum(numbers)}"})
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = {"kind": "exact_match", "data": "sums.jsonl", "max_new_tokens": 6}
    (folder / "sums.yaml").write_text(yaml.safe_dump(spec))
    return folder / "sums.yaml"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two adapters that change what the tiny base says."""
    folder = tmp_path_factory.mktemp("adapters")
    return [str(make_adapter(TINY, folder / f"adapter-{seed}", seed)) for seed in (1, 2)]


def by_label(report: fleetune.EvaluationReport) -> dict[str, TaskResult]:
    (found,) = report.tasks
    return {result.label: result for result in found.results}


def test_a_tie_is_one_half_and_an_interval_knows_of_few_rows() -> None:
    assert win_rate([1, 0, 0.5, 0.5]).value == 0.5
    assert win_rate([1, 1, 1, 0.5]).value == 0.875
    few, many = win_rate([1, 1, 0]), win_rate([1, 1, 0] * 40)
    assert few.value == many.value and few.low < 0.5 < many.low < many.value < many.high < few.high <= 1
    ties = win_rate([0.5] * 40)
    assert ties.low < ties.value == 0.5 < ties.high


@pytest.mark.parametrize(
    ("choices", "verdict"),
    [
        ("AB", DuelEnd(1.0)),  # the adapter's answer, wherever it stands
        ("BA", DuelEnd(0.0)),
        ("AA", DuelEnd(0.5, flipped=True)),  # the first one, whatever it is
        ("BB", DuelEnd(0.5, flipped=True)),
        ("  ", DuelEnd(0.5, unread=True)),
    ],
)
def test_a_choice_counts_where_both_orders_agree(choices: str, verdict: DuelEnd) -> None:
    asked: list[PreparedTask] = []

    def answer(prepared: PreparedTask) -> Any:
        asked.append(prepared)
        answers = {}
        for row, choice in zip(prepared.rows, choices, strict=True):
            key = row.question.key
            answers[key] = KeptAnswer(key, None, 0, (-1.0, -2.0) if choice == "A" else (-2.0, -1.0), choice == " ")
        return SimpleNamespace(sheets=[SimpleNamespace(file=SimpleNamespace(answers=answers))])

    tokenizer = load_tokenizer(SimpleNamespace(model=str(TINY), revision=None))  # type: ignore[arg-type]
    judge = ModelJudge("scripted", Preparation(tokenizer, (tokenizer.eos_token_id,)), False, answer)
    spec = TaskSpec(name="sums", kind="exact_match", data="sums.jsonl", criterion="shorter")
    same = Duel(spec, Row(1, "1 + 1 =", " 2"), " 2", "2 ")
    other = replace(same.row, prompt="2 + 2 =")
    assert judge.decide([same, Duel(spec, other, " 4", " 22")]) == [DuelEnd(0.5), verdict]
    (prepared,) = asked
    first, second = (row.prompt for row in prepared.rows)
    assert "shorter" in first and "2 + 2 =" in first and "1 + 1" not in first
    assert first.index("\n4\n") < first.index("\n22\n") and second.index("\n22\n") < second.index("\n4\n")


def test_a_model_judges_alike_whoever_is_compared_with_whom(task: Path, adapters: list[str], tmp_path: Path) -> None:
    one, two = (Path(adapter).name for adapter in adapters)
    found = fleetune.evaluate(adapters, [task], base=str(TINY), out=tmp_path, judge="base", against=one)
    results = by_label(found)
    assert results[one].wins is None
    for_two, for_base = results[two].wins, results["base"].wins
    assert for_two and for_base and (for_two.judge, for_two.against) == ("base", one)
    assert {*for_two.of_rows, *for_base.of_rows} <= {0.0, 0.5, 1.0}
    again = fleetune.evaluate(adapters, [task], base=str(TINY), out=tmp_path, judge=str(TINY), against=adapters[1])
    assert found.asked > 3 * ROWS and again.asked < found.asked
    of_one = by_label(again)[one].wins
    assert of_one and of_one.of_rows == tuple(1 - won for won in for_two.of_rows)
    assert of_one.flipped == for_two.flipped > 0  # as small a judge likes one of the letters
    plain = found.to_json()["tasks"][0]["results"][2]["wins"]
    assert plain["win_rate"] == for_two.rate.to_json() and plain["flipped"] == for_two.flipped
    (said, _) = win_texts(found.tasks[0])
    assert said.startswith(f"base wins {for_base.rate.value:.1%} (") and f"against {one}, judged by base" in said
    assert said in answers_page(found)


def test_an_adapter_that_loses_more_than_it_may_is_named(task: Path, adapters: list[str], tmp_path: Path) -> None:
    watched = tmp_path / "watched.yaml"
    spec = {**yaml.safe_load(task.read_text()), "data": str(task.parent / "sums.jsonl"), "may_lose": 2}
    watched.write_text(yaml.safe_dump(spec))
    found = fleetune.evaluate(adapters, [watched], base=str(TINY), out=tmp_path)
    (evaluated,) = found.tasks
    gains = [evaluated.to_base(result)["exact_match"].value for result in evaluated.results[1:]]
    assert len(found.warnings) == sum(gain < -0.02 for gain in gains)
    base, one, two = evaluated.results
    lost, kept = Wins("judge", "base", (0.0,) * 5 + (1.0,) * 3), Wins("judge", "base", (0.5,) * 8)
    judged = replace(evaluated, results=[base, replace(one, wins=lost), replace(two, wins=kept)])
    low, high = 100 * (0.5 - lost.rate.high), 100 * (0.5 - lost.rate.low)
    points = f"12.5 points ({low:.1f} to {high:.1f})"
    said = f"task watched: {one.label} loses {points} to base before judge; may_lose allows 2"
    assert set(too_much_lost(judged)) - set(found.warnings) == {said}
    right = replace(base, scores=[replace(score, right=True) for score in base.scores])
    wrong = replace(one, scores=[replace(score, right=False) for score in base.scores])
    (said,) = too_much_lost(replace(evaluated, results=[right, wrong, replace(right, label="as good")]))
    start = f"task watched: {one.label} loses 100.0 points ("
    assert said.startswith(start) and said.endswith(") to base; may_lose allows 2")


@pytest.mark.parametrize("kind", each_sampled(["lora", "full"]))
def test_a_reward_model_judges_by_the_scores_that_plain_libraries_give(
    kind: str, task: Path, home: Path, launch: Any, tmp_path: Path
) -> None:
    rows = [{"prompt": f"{n} + 1 =", "chosen": f" {n + 1}", "rejected": f" {n}{n}{n}"} for n in range(40)]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts: dict[str, Any] = {"base": str(TINY), "data": {"train": str(pairs), "seq_len": 64}}
    train = {"steps": 6, "batch_tokens": 400, "lr": 1e-3, "precision": "fp32"}
    method = {"kind": kind} | ({"rank": 4} if kind == "lora" else {})
    judge = make_run(
        home / "runs",
        runs.new_id("judge"),
        None,
        name="judge",
        objective="reward",
        method=method,
        train=train,
        **parts,
    )
    parts["data"] = {"train": str(task.parent / "sums.jsonl"), "seq_len": 64}
    train = {**train, "steps": 2, "lr": 1e-2}
    judged = make_run(home / "runs", runs.new_id("tuned"), None, name="tuned", train=train, **parts)
    launch(1, judge, judged)
    delivery = Delivery(judged, 1)
    assert delivery.finish("succeeded", 60)
    report = fleetune.evaluate(["tuned"], [task], out=tmp_path / "out", judge=judge.name)
    results = by_label(report)
    wins = results["tuned"].wins
    assert wins and wins.judge == "judge" and wins.against == "base"

    tokenizer = load_tokenizer(SimpleNamespace(model=str(TINY), revision=None))  # type: ignore[arg-type]
    model = plain_reward_model(judge / "output", kind)

    def score(prompt: str, written: str) -> float:
        ids = [*tokenizer(prompt + written).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            return float(model(input_ids=torch.tensor([ids])).logits)

    asked = [json.loads(line)["prompt"] for line in (task.parent / "sums.jsonl").read_text().splitlines()]
    both = zip(asked, results["tuned"].scores, results["base"].scores, strict=True)
    leads = [score(prompt, mine.written) - score(prompt, theirs.written) for prompt, mine, theirs in both]
    assert max(map(abs, leads)) > 1e-4
    assert wins.of_rows == tuple(0.5 if abs(lead) < 1e-6 else float(lead > 0) for lead in leads)

    client = store.client(store.resolve(None))
    child = client.get_run(results["tuned"].mlflow_run_id)
    assert child.data.metrics["win_rate"] == wins.rate.value
    assert child.data.metrics["win_rate_low"] == wins.rate.low
    assert (child.data.params["judge"], child.data.params["judged_against"]) == ("judge", "base")
    again = fleetune.evaluate(["tuned"], [task], out=tmp_path / "out", judge=str(judge / "output"))
    assert again.asked == 0 and by_label(again)["tuned"].wins == replace(wins, judge=by_judge(again))


def by_judge(report: fleetune.EvaluationReport) -> str:
    wins = by_label(report)["tuned"].wins
    assert wins
    return wins.judge


def plain_reward_model(folder: Path, kind: str) -> Any:
    """A reward model as its users load it."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification

    place = folder if kind == "full" else TINY
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(place, config=config, dtype=torch.float32)
    if kind != "full":
        model = PeftModel.from_pretrained(model, folder)
    return model.eval()


def test_what_cannot_judge_is_refused_in_one_line(task: Path, adapters: list[str], tmp_path: Path) -> None:
    (tmp_path / "choice.jsonl").write_text('{"q": "a", "options": ["b", "c"], "gold": 0}\n')
    choice = {"kind": "choice", "data": "choice.jsonl", "prompt": "{q}", "choices": "options", "answer": "gold"}
    (tmp_path / "choice.yaml").write_text(yaml.safe_dump(choice))
    for options, message in (
        ({"against": "base"}, "--against: found no --judge; allowed: with --judge"),
        ({"judge": "base", "against": "nobody"}, "--against: found nobody; allowed: base, adapter-1, adapter-2"),
        ({"judge": adapters[0]}, f"--judge: {adapters[0]}: found an adapter that writes; allowed: base, a folder"),
        ({"judge": "nobody"}, "run 'nobody': "),
        ({"judge": "base", "tasks": [tmp_path / "choice.yaml"]}, "--judge: task choice is of kind choice; allowed:"),
    ):
        with pytest.raises(InputError) as caught:
            fleetune.evaluate(adapters, base=str(TINY), out=tmp_path / "out", **{"tasks": [task], **options})
        assert str(caught.value).startswith(message) and len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()
