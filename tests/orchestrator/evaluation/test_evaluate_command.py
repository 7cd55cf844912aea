"""The whole of it: runs that were trained, evaluated in one pass, tracked in MLflow, shown to people."""

import json
import re
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from run_folders import make_run
from safetensors.torch import load_file, save_file

import fleetune
from orchestrator import runs
from orchestrator.errors import InputError
from orchestrator.evaluation import process
from orchestrator.evaluation.page import write_page
from orchestrator.tracking import store
from orchestrator.tracking.delivery import Delivery
from trainer.export import results

ROOT = Path(__file__).parents[3]
TINY = ROOT / "examples" / "tiny"
JOB: dict[str, Any] = {
    "base": str(TINY),
    "train": {"steps": 3, "batch_tokens": 512, "lr": 3e-3, "precision": "fp32"},
    "evaluation": {"max_new_tokens": 12, "before": False},
}
ROWS = 20
OPPOSITES = {"hot": "cold", "big": "small", "fast": "slow", "old": "new", "wet": "dry"}
MIXTURE = [sys.executable, str(TINY / "generate.py"), "rows", "mixture", "--train", "60", "--eval", str(ROWS)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows of the tiny base's mixture, some of which it does not know, and a task for them."""
    folder = tmp_path_factory.mktemp("mixture")
    subprocess.run([*MIXTURE, str(folder)], check=True)
    task = {"kind": "generation", "data": "mixture-eval.jsonl", "max_new_tokens": 12}
    (folder / "mixture.yaml").write_text(yaml.safe_dump(task))
    return folder


def children_of(mlflow_run_id: str) -> list[Any]:
    client = store.client(store.resolve(None))
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments, f"tags.`mlflow.parentRunId` = '{mlflow_run_id}'"))


def test_adapters_of_runs_score_what_their_trainers_said(
    data: Path, home: Path, launch: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = {"train": str(data / "mixture-train.jsonl"), "eval": str(data / "mixture-eval.jsonl"), "seq_len": 96}
    run_dirs = {
        kind: make_run(home / "runs", runs.new_id(kind), None, name=kind, method=method, data=sources, **JOB)
        for kind, method in {"lora": {"kind": "lora", "rank": 4}, "prefix": {"kind": "prefix", "tokens": 3}}.items()
    }
    launch(1, *run_dirs.values())
    parents = {}
    for kind, run_dir in run_dirs.items():
        delivery = Delivery(run_dir, 1)
        assert delivery.finish("succeeded", 60)
        parents[kind] = store.counting_run(run_dir)["mlflow_run_id"]

    task = data / "mixture.yaml"
    report = fleetune.evaluate([run_dirs["lora"].name, "prefix"], [task])
    assert (report.asked, report.warnings) == (3 * ROWS, [])
    (evaluated,) = report.tasks
    assert [result.label for result in evaluated.results] == ["base", "lora", "prefix"]
    for result in evaluated.results[1:]:
        said = results(run_dirs[result.label])
        found = evaluated.estimates(result)
        assert found["exact_match"].value == pytest.approx(said["eval_exact_match"])
        assert found["loss"].value == pytest.approx(said["eval_loss"], rel=1e-5)
        (child,) = children_of(parents[result.label])
        assert child.info.run_id == result.mlflow_run_id and child.info.status == "FINISHED"
        assert child.data.metrics["exact_match"] == found["exact_match"].value
        assert child.data.metrics["loss_to_base_low"] == evaluated.to_base(result)["loss"].low
        assert child.data.params["rows"] == str(ROWS)
        client = store.client(store.resolve(None))
        assert [file.path for file in client.list_artifacts(child.info.run_id)] == [Path(result.file).name]
    assert len({result.share_right for result in evaluated.results}) > 1, "nothing to tell apart"

    shutil.copytree(run_dirs["lora"] / "output", tmp_path / "inert")
    weights = load_file(tmp_path / "inert" / "adapter_model.safetensors")
    inert = {name: torch.zeros_like(w) if "lora_B" in name else w for name, w in weights.items()}
    save_file(inert, tmp_path / "inert" / "adapter_model.safetensors")
    more = fleetune.evaluate(["lora", str(tmp_path / "inert"), str(run_dirs["prefix"])], [task])
    assert more.asked == ROWS
    assert more.warnings == ["inert changes nothing: its logits are those of the base"]
    by_label = {result.label: result for result in more.tasks[0].results}
    assert by_label["inert"].scores == by_label["base"].scores
    assert by_label["inert"].mlflow_run_id is None
    assert {kind: len(children_of(parent)) for kind, parent in parents.items()} == {"lora": 1, "prefix": 1}
    comparison = fleetune.compare("fakes", None)
    assert sorted(run.run_id for run in comparison.runs) == sorted(run_dir.name for run_dir in run_dirs.values())
    shown_to_people(more, task, tmp_path, capsys)


def shown_to_people(
    report: fleetune.EvaluationReport, task: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """JSON by the command, and a page, of what was answered before."""
    page = folder / "answers.html"
    command = ["evaluate", "--adapters", "lora", "prefix", "--tasks", str(task), "--limit", "7", "--json"]
    code, out, _ = call(capsys, *command)
    plain = json.loads(out)
    assert (code, plain["asked"], plain["tasks"][0]["rows"]) == (0, 0, 7)
    assert [result["label"] for result in plain["tasks"][0]["results"]] == ["base", "lora", "prefix"]
    write_page(report, page)
    text = page.read_text()
    assert not re.search(r"(src|href|@import|url\((?!#)|fetch\(|https?:)", text)
    embedded = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    assert embedded
    (shown,) = json.loads(embedded[1])
    rows = [json.loads(line) for line in islice((task.parent / "mixture-eval.jsonl").open(), ROWS)]
    assert [(row["prompt"].strip(), row["expected"]) for row in shown["rows"]] == [
        (row["prompt"].strip(), row["completion"].strip()) for row in rows
    ]


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run a command; gives exit code, output and errors."""
    from orchestrator import cli

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fleetune", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_what_cannot_be_evaluated_is_refused_before_anything_is_asked(
    data: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinished = make_run(home / "runs", runs.new_id("waiting"), None, name="waiting").name
    (tmp_path / "nothing").mkdir()
    task = data / "mixture.yaml"
    with pytest.raises(InputError) as caught:
        fleetune.evaluate([unfinished, "unheard-of", str(tmp_path / "nothing")], [task])
    lines = str(caught.value).splitlines()
    assert lines[0] == f"run {unfinished}: found no output; allowed: a run that has succeeded"
    assert lines[1].startswith("run 'unheard-of': no such run")
    assert "found no adapter_config.json or bottleneck_config.json" in lines[2]
    (tmp_path / "nothing" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(InputError, match="--base: missing; no run says which it is"):
        fleetune.evaluate([str(tmp_path / "nothing")], [task])
    with pytest.raises(InputError, match="nothing: found no weights; allowed: adapter_model.safetensors"):
        fleetune.evaluate([str(tmp_path / "nothing")], [task], base=str(TINY))
    code, _, err = call(capsys, "evaluate", "--base", str(tmp_path / "no"), "--tasks", str(task))
    assert code == 2 and err.startswith("--base: ")
    assert not (home / "evaluations" / "mixture").exists()


def test_a_process_that_is_killed_is_told_as_that(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    killer = (
        "import os, sys; sys.stdin.read(); print('loading', file=sys.stderr, flush=True); os.kill(os.getpid(), 9)"
    )
    monkeypatch.setattr(process, "EVALUATOR", [sys.executable, "-c", killer])
    command = ("evaluate", "--base", str(TINY), "--tasks", str(data / "mixture.yaml"), "--out", str(tmp_path))
    code, _, err = call(capsys, *command)
    assert code == 1 and err.splitlines()[-1] == (
        "the evaluation has failed: its process was ended by SIGKILL; the same command goes on where it stopped"
    )


def test_tasks_of_the_harness_are_compared_as_all_others(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'fleetune[harness]'")
    rows = [
        {"q": f"opposite of {word} ->", "options": [right, "pen"], "gold": 0} for word, right in OPPOSITES.items()
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "opposites",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "q",
        "doc_to_choice": "options",
        "doc_to_target": "gold",
    }
    (tmp_path / "opposites.yaml").write_text(yaml.safe_dump(task))
    task["output_type"], task["task"], task["doc_to_target"] = "loglikelihood_rolling", "whole", "q"
    del task["doc_to_choice"]
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(task))
    command = ["evaluate", "--base", str(TINY), "--out", str(tmp_path / "out"), "--tasks"]
    code, out, _ = call(capsys, *command, f"lm_eval:{tmp_path}/opposites.yaml", str(data / "mixture.yaml"), "--json")
    assert code == 0
    plain = json.loads(out)
    assert [(t["task"], t["rows"]) for t in plain["tasks"]] == [("mixture", ROWS), ("opposites", len(rows))]
    assert plain["tasks"][1]["results"][0]["measures"]["exact_match"]["value"] > 0.9
    assert plain["asked"] == ROWS + len(rows)
    again = json.loads(call(capsys, *command, f"lm_eval:{tmp_path}/opposites.yaml", "--json")[1])
    assert again["asked"] == 0 and again["tasks"][0]["results"] == plain["tasks"][1]["results"]
    code, _, err = call(capsys, *command, f"lm_eval:{tmp_path}/whole.yaml")
    assert code == 2 and "found the measures" in err and "allowed: exact_match or acc" in err
    code, _, err = call(capsys, *command, "lm_eval:no_such_task")
    assert code == 2 and "task lm_eval:no_such_task: " in err
