"""What `compare` makes of runs, made up and tracked for real."""

import dataclasses
import io
import json
import sqlite3
from pathlib import Path

import pytest
from ports import free_port
from rich.console import Console
from run_folders import claim, eval_row, make_run, plan, steps
from tracked_runs import preferring, tracked

from orchestrator.comparison.compare import Comparison, arrange, compare
from orchestrator.comparison.measure import format_bytes, format_count, format_duration
from orchestrator.comparison.run import same_inputs
from orchestrator.comparison.sparks import spark_lines
from orchestrator.comparison.table import table
from orchestrator.tracking.delivery import replay
from orchestrator.tracking.facts import state_in_mlflow


def text(comparison: Comparison, width: int = 100) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table(comparison, width))
    return console.export_text()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def in_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEETUNE_HOME", str(home))


def test_only_differences_are_columns_and_seeds_are_grouped() -> None:
    seeds = [tracked("lora", 0.6, train__seed=seed) for seed in ("0", "1", "2")]
    other = tracked("dora", 0.8, method__kind="dora")
    found = arrange([*seeds, other], "e", "uri")
    assert found.columns == ["method.kind"]
    assert "method.kind" not in found.constant
    assert found.constant["method.rank"] == "16"
    assert "train.seed" not in found.constant
    assert [(row.label, row.seeds) for row in found.rows] == [("dora", ["0"]), ("lora", ["0", "1", "2"])]
    figure = found.rows[1].metric("eval_exact_match")
    assert figure
    assert (figure.mean, figure.std, figure.n) == (pytest.approx(0.59), pytest.approx(0.01), 3)


def test_the_same_file_at_another_path_is_no_difference() -> None:
    here = tracked("a", 0.5)
    there = tracked("a", 0.5, data__train="/scratch/files/5e5e/train.jsonl", train__seed="1")
    other = tracked("a", 0.6, data__train="/scratch/files/6f6f/train.jsonl", data__train_digest="6f" * 32)
    assert arrange(list(same_inputs([there, here])), "e", "uri").columns == []
    found = arrange(list(same_inputs([there, here, other])), "e", "uri")
    assert set(found.columns) == {"data.train", "data.train_digest"}
    assert [row.differences["data.train"] for row in found.rows if len(row.runs) == 2] == ["data/train.jsonl"]


def test_runs_of_one_seed_are_rows_of_their_own_and_show_no_spread() -> None:
    runs = [tracked("a", quality, train__seed=seed) for quality, seed in ((0.5, "0"), (0.6, "0"), (0.7, "1"))]
    runs[1] = dataclasses.replace(runs[1], run_id="a-0000000009")
    found = arrange(runs, "e", "uri")
    assert [(row.label, row.seeds) for row in found.rows] == [("a-0000000009", ["0"]), ("a-0000000000", ["0", "1"])]
    metric = found.rows[0].metric("eval_exact_match")
    assert metric and (metric.mean, metric.std, metric.n) == (0.6, 0.0, 1)


def test_a_failed_run_is_not_averaged_with_one_that_finished() -> None:
    found = arrange([tracked("a", 0.9, "failed"), tracked("a", 0.5, train__seed="1")], "e", "uri")
    assert [(row.state, len(row.runs)) for row in found.rows] == [("succeeded", 1), ("failed", 1)]


def test_rows_with_the_same_name_are_told_apart() -> None:
    found = arrange([tracked("a", 0.9), tracked("a", 0.5, train__lr="0.01")], "e", "uri")
    assert {row.label for row in found.rows} == {"a (0.0001)", "a (0.01)"}


def test_runs_on_preferences_have_their_curves_below_the_table() -> None:
    runs = [
        preferring("dpo", 0.8),
        preferring("kto", 0.7, kl=True, train__lr="0.1"),
        tracked("sft", 0.5, evals=False),
    ]
    found = arrange(runs, "e", "uri")
    assert found.quality.key == "eval_accuracy" and [row.label for row in found.rows] == ["dpo", "kto", "sft"]
    lines = [line.plain for line in spark_lines(found)]
    assert "\nAccuracy on held-out pairs" in lines and "\nKL to the reference" in lines
    held_out = lines.index("\nAccuracy on held-out pairs")
    assert lines[held_out + 1] == "  dpo  ▁▃▆█  50% → 80%"
    assert lines[held_out + 2] == "  kto  ▁▃▄▆  50% → 70%"
    kl = lines.index("\nKL to the reference")
    assert lines[kl + 1].startswith("  kto  ▁") and lines[kl + 1].endswith("0.01 → nan")
    assert "!" in lines[kl + 1] and len(lines[kl + 1]) < 80
    assert list(spark_lines(arrange([tracked("sft", 0.5)], "e", "uri"))) == []


def test_runs_on_answers_of_their_own_have_reward_divergence_and_length_below_the_table() -> None:
    curves = {"reward": (0.25, 0.75), "divergence": (0.0, 0.125), "answer_tokens": (40.0, 30.0)}
    points = {name: tuple(enumerate(values, 1)) for name, values in curves.items()}
    run = dataclasses.replace(tracked("grpo", 0.5), curves=points)
    lines = [line.plain for line in spark_lines(arrange([run], "e", "uri"))]
    assert lines[0::2] == ["\nReward of answers", "\nKL to the reference, per token", "\nTokens of answers"]
    assert [line.split("  ")[-1] for line in lines[1::2]] == ["0.25 → 0.75", "0 → 0.125", "40 → 30"]


def test_quality_falls_back_to_losses() -> None:
    assert arrange([tracked("a", 0.5)], "e", "uri").quality.key == "eval_exact_match"
    assert arrange([tracked("a", 0.5, evals=False)], "e", "uri").quality.key == "loss"
    runs = [tracked(name, quality, evals=False, train__lr=name) for name, quality in (("1", 0.5), ("2", 0.9))]
    assert [row.label for row in arrange(runs, "e", "uri").rows] == ["2", "1"]


@pytest.mark.parametrize("width", [80, 100, 160])
@pytest.mark.parametrize("differences", [1, 2, 5])
def test_the_table_fits_and_breaks_no_difference(differences: int, width: int) -> None:
    keys = ["method__kind", "method__rank", "train__lr", "train__steps", "data__train"][:differences]
    runs = [tracked(f"run-{i}", 0.5 + 0.1 * i, **dict.fromkeys(keys, f"value-{i}")) for i in range(3)]
    runs.append(dataclasses.replace(runs[2], state="failed", params={**runs[2].params, "train.seed": "7"}))
    shown = text(arrange(runs, "experiment", "uri"), width)
    assert all(len(line) <= width for line in shown.splitlines())
    for expected in ("run-0", "run-2", "value-2", "succeeded", "failed", "70.0%", "2 m 30 s", "1.5 M", "1.75 GiB"):
        assert expected in shown


def test_a_row_is_short_and_whole_where_there_is_no_room_for_a_table() -> None:
    changed = {"method__rank": "32", "train__lr": "0.00017394", "data__train": "data/other-train.jsonl"}
    runs = [tracked("gsm8k-lora-baseline", 0.6, train__seed=seed) for seed in ("0", "1", "2")]
    runs += [tracked("gsm8k-dora", 0.8, method__kind="dora", **changed), tracked("gsm8k-full", 0.4, "cancelled")]
    lines = [line.rstrip() for line in text(arrange(runs, "gsm8k", "uri"), 80).splitlines()]
    assert [line.split() for line in lines[1:3]] == [
        ["exact", "eval", "peak", "train"],
        ["match", "loss", "loss", "trained", "memory", "time", "state"],
    ]
    assert lines[3:11] == [
        "gsm8k-dora  train=data/other-train.jsonl  method=dora  rank=32  lr=0.00017394",
        "   80.0%    0.9665    0.7517    1.8 M  2.92 GiB  1 m 52 s  succeeded",
        "gsm8k-lora-baseline  seeds 0, 1, 2  train=data/train.jsonl  method=lora  rank=16",
        "    lr=0.0001",
        "   59.0%    1.2113    0.9311    1.6 M  2.08 GiB  2 m 30 s  succeeded",
        "  ± 1.0%  ± 0.0401  ± 0.0240",
        "gsm8k-full  train=data/train.jsonl  method=lora  rank=16  lr=0.0001",
        "   40.0%    1.7899    1.4519    1.4 M  1.48 GiB  3 m 45 s  cancelled",
    ]


def test_states_are_those_of_status() -> None:
    said = ["FINISHED", "FAILED", "KILLED", "RUNNING", "SCHEDULED"]
    assert list(map(state_in_mlflow, said)) == ["succeeded", "failed", "cancelled", "running", "scheduled"]


def test_names_are_not_markup() -> None:
    assert "[bold red]x[/bold red]" in text(arrange([tracked("[bold red]x[/bold red]", 0.5)], "[blink]", "uri"))


def test_json_has_no_value_that_json_does_not_know() -> None:
    run = tracked("a", 0.5)
    run = dataclasses.replace(run, metrics={**run.metrics, "loss": float("nan")})
    found = json.loads(json.dumps(arrange([run], "e", "uri").to_json(), allow_nan=False))
    assert found["rows"][0]["figures"]["loss"] == {"mean": None, "std": 0.0, "n": 1}
    assert found["rows"][0]["run_ids"] == ["a-0000000000"]


def test_units() -> None:
    assert [format_count(v) for v in (950, 1234, 8.03e9)] == ["950", "1.23 k", "8.03 B"]
    assert [format_bytes(v) for v in (512, 3 << 20, 5 << 29)] == ["512 B", "3 MiB", "2.50 GiB"]
    assert [format_duration(v) for v in (4.24, 185, 7800)] == ["4.2 s", "3 m 05 s", "2 h 10 m"]


def test_nothing_tracked_yet_and_an_unknown_experiment(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing was tracked yet: there is no .*mlflow\.db"):
        compare(None, None)
    for seed, state in ((0, "succeeded"), (1, "succeeded"), (2, "failed")):
        run_dir = make_run(
            tmp_path, f"real-{seed}", None, name="real", train={"steps": 100, "seed": seed, "precision": "fp32"}
        )
        attempt = claim(run_dir)
        plan(attempt, trained=4321)
        steps(attempt, 1, 20)
        eval_row(attempt, 20, eval_loss=1.0 + seed, eval_exact_match=0.5)
        attempt.close({"state": state})
        assert replay(run_dir)
    found = compare("fakes", None)
    assert compare(None, None).rows == found.rows
    assert [(row.state, row.seeds) for row in found.rows] == [("succeeded", ["0", "1"]), ("failed", ["2"])]
    best = found.rows[0]
    figures = {key: best.metric(key) for key in ("eval_loss", "trained", "train_s", "peak_memory_bytes", "best_loss")}
    assert {key: figure.mean for key, figure in figures.items() if figure} == {
        "eval_loss": 1.5,
        "trained": 4321,
        "train_s": 20.0,
        "peak_memory_bytes": 1 << 30,
        "best_loss": pytest.approx(4 / 3),
    }
    assert len(best.runs[0].curves["loss"]) == 20
    with pytest.raises(ValueError, match=r"experiment 'fake' is not at .*; there are: fakes") as error:
        compare("fake", None)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"experiment 'Default' at .* has no runs of Fleetune"):
        compare("Default", None)


def test_a_server_that_is_down_is_a_connection_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConnectionError, match=r"^MLflow at http://ada:\*\*\*@127\.0\.0\.1:\d+: ") as error:
        compare(None, f"http://ada:secret@127.0.0.1:{free_port()}")
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_database_of_something_else_is_a_connection_error(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "other.db") as database:
        database.execute("create table alembic_version (version_num text)")
        database.execute("insert into alembic_version values ('from the future')")
    with pytest.raises(ConnectionError, match=r"^MLflow at sqlite"):
        compare(None, f"sqlite:///{tmp_path}/other.db")
