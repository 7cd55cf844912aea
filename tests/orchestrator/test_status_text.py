"""What people see of runs, at the widths of their terminals."""

import io
import os
import pty
import select
import subprocess
import sys
import termios
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from jobs import make_job
from rich.console import Console
from rich.table import Table
from run_folders import T0, claim, make_run, plan, steps

from orchestrator import progress
from orchestrator.status import Status
from orchestrator.terminal.render import run_view
from orchestrator.terminal.run_list import age, list_lines
from orchestrator.terminal.status_text import status_lines
from orchestrator.terminal.wrapped import WrappedText, wrapped_lines
from runfolder.activity import Activity
from runfolder.chain import close
from runfolder.figures import Figures
from runfolder.goodput import Goodput

GOLDEN = Path(__file__).parent / "golden" / "status.txt"
RUN = Status(
    run_id="sql-1r3vg4ggs1",
    name="sql",
    cluster="hpc",
    state="running",
    reason=None,
    step=1200,
    steps=4000,
    attempt=2,
    verdict=None,
    mlflow_run_id="2f2c195c3ee24f629baebd77c59dc28c",
    run_dir="/lustre/projects/a-team/fleetune/runs/sql-1r3vg4ggs1",
    output_dir=None,
    submitted=T0,
    looked_at=T0 + 7300,
    data={"rows": 8000, "examples": 7998, "dropped": 2, "longest": 512, "unused": ["id", "source"]},
    figures=Figures(
        goodput=Goodput(queued=600, starting=300, training=7200, repeated=180, stalled=720),
        tokens_per_second=123456.7,
        seconds_per_step=4.25,
        since_last_step_s=2.5,
        peak_memory_bytes=17 << 30,
        last_evaluation={"step": 1000, "eval_loss": 0.4321, "eval_exact_match": 0.615, "eval_accuracy": 0.25},
        best_evaluation={"step": 800, "eval_loss": 0.4111, "eval_exact_match": 0.62},
    ),
    remaining_s=11900.0,
    activity=Activity("evaluating after step 1,200: 120 of 500 rows", T0 + 7300 - 185, T0 + 7300 - 3),
)
ENDED = replace(
    RUN,
    state="failed",
    reason="rank 1: the output was kept in output.rejected: its logits differ from the trained model's by 0.01",
    step=4000,
    verdict="user_error",
    evidence="Traceback (most recent call last):\n  ...\ntrainer.verify.OutputDiffers: its logits differ",
    output_dir=f"{RUN.run_dir}/output",
    figures=replace(RUN.figures, best_evaluation=RUN.figures.last_evaluation) if RUN.figures else None,
    remaining_s=None,
    activity=Activity("delivering to MLflow", T0 + 7200, T0 + 7200),
    loading=(
        "model = AutoModelForCausalLM.from_pretrained('meta-llama/Llama-3.2-3B')",
        f"model = PeftModel.from_pretrained(model, '{RUN.run_dir}/output')",
    ),
)
QUEUED = Status(
    run_id="sql-1r3vg4ggs1",
    name="sql",
    cluster="local",
    state="queued",
    reason="needs 2, 0 of 2 cpus are free",
    step=0,
    steps=None,
    attempt=0,
    verdict=None,
    mlflow_run_id=None,
    run_dir="/home/me/.fleetune/runs/sql-1r3vg4ggs1",
    output_dir=None,
    submitted=T0,
    looked_at=T0 + 7300,
)


LOST = replace(QUEUED, cluster="hpc", state="unknown", reason="cluster hpc: no route", run_dir="", submitted=0.0)


@pytest.fixture
def _utc(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on the wall that shows the same everywhere."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()


def shown(run: Status, width: int) -> str:
    """A run as a terminal of this width shows it."""
    screen = io.StringIO()
    console = Console(file=screen, width=width, highlight=False)
    console.print(run_view(run), crop=False)
    return "".join(f"{line.rstrip()}\n" for line in screen.getvalue().splitlines())


@pytest.mark.usefixtures("_utc")
def test_a_status_at_80_columns() -> None:
    texts = [shown(run, 80) for run in (RUN, ENDED, QUEUED, LOST)]
    assert "\n".join(texts) == GOLDEN.read_text()


@pytest.mark.parametrize(
    ("state", "pause_s", "step_s", "silent"),
    [
        ("running", 70, 4, True),
        ("running", 50, 0.1, False),
        ("running", 70, 30, False),
        ("succeeded", 70, 1, False),
        ("starting", 70, 1, True),
    ],
)
def test_a_run_that_writes_nothing_for_long_is_silent(
    state: str, pause_s: float, step_s: float, silent: bool
) -> None:
    assert RUN.figures
    figures = replace(RUN.figures, since_last_step_s=pause_s, seconds_per_step=step_s)
    activity = Activity("exporting the output", T0, RUN.looked_at - pause_s)
    text = shown(replace(RUN, state=state, figures=figures, activity=activity, remaining_s=60.0), 80)
    assert ("silent" in text) == silent
    assert ("remaining" in text) != silent, "by the pace of its steps nothing can be said of one that takes none"


def test_a_run_that_does_something_else_than_steps_is_not_silent() -> None:
    """It evaluates for an hour, and has said so a moment ago."""
    assert RUN.figures
    figures = replace(RUN.figures, since_last_step_s=3600.0)
    text = shown(replace(RUN, figures=figures), 80)
    assert "now          evaluating after step 1,200: 120 of 500 rows, for 3 m 05 s" in text
    assert "silent" not in text


def test_what_is_copied_is_in_one_line() -> None:
    lines = shown(ENDED, 40).splitlines()
    assert f"output       {ENDED.output_dir}" in lines
    assert f"load it      {ENDED.loading[0]}" in lines
    assert f"             {ENDED.loading[1]}" in lines


LONGEST = replace(RUN, run_id="a-name-that-is-as-long-as-may-be-1r3vg4ggs1", state="succeeded", step=100_000)
RUNS = [replace(LONGEST, steps=100_000), ENDED, QUEUED]


@pytest.mark.parametrize("width", [80, 100, 160])
def test_a_list_fits_and_cuts_no_run_id(width: int) -> None:
    lines = list(list_lines(RUNS, width))
    assert max(map(len, lines)) <= width
    assert all(any(run.run_id in line for line in lines) for run in RUNS)
    assert any("rank 1: the output was kept in output.rejected" in line for line in lines)


def test_a_list_at_80_columns() -> None:
    assert list(list_lines(RUNS[1:], 80)) == [
        "run             state   step       attempt  age  cluster",
        "sql-1r3vg4ggs1  failed  4000/4000  2        2 h  hpc",
        "    rank 1: the output was kept in output.rejected: its logits differ from the",
        "    trained model's by 0.01",
        "sql-1r3vg4ggs1  queued  0/?        0        2 h  local",
        "    needs 2, 0 of 2 cpus are free",
    ]


FORECAST = (
    "SLURM job 123456: nodes that it needs are down, drained, or for jobs before it; "
    "SLURM expects its start at 2026-11-29 22:10 +0000"
)


@pytest.mark.parametrize("width", [80, 100, 160, 240])
def test_a_list_shows_when_a_run_is_expected_to_start(width: int) -> None:
    lines = list(list_lines([replace(QUEUED, reason=FORECAST), RUN], width))
    assert max(map(len, lines)) <= width
    assert FORECAST in " ".join(" ".join(lines).split())


def test_a_reason_without_end_is_cut_between_words() -> None:
    lines = list(list_lines([replace(QUEUED, reason="as before, " * 80)], 80))
    assert len(lines) == 5 and lines[-1].endswith(" …") and max(map(len, lines)) <= 80
    (heading, _) = list_lines([RUN], 80)
    assert heading.split()[-1] == "cluster"  # no column of reasons where there are none


def test_what_cannot_be_reached_has_no_age() -> None:
    (_, line) = list_lines([LOST], 80)
    assert line.split() == ["sql-1r3vg4ggs1", "unknown", "0/?", "0", "?", "hpc", *str(LOST.reason).split()]


def test_a_list_at_160_columns_has_one_line_a_run() -> None:
    heading, first, second = list_lines(RUNS[1:], 160)
    assert heading.endswith("age  cluster  reason")
    assert first.endswith("2 h  hpc      " + " ".join(str(ENDED.reason).split()))
    assert second.endswith("2 h  local    needs 2, 0 of 2 cpus are free")


@pytest.mark.parametrize(
    ("seconds", "text"), [(-5, "0 m"), (59, "0 m"), (60, "1 m"), (7199, "1 h"), (86_400, "1 d"), (1e7, "115 d")]
)
def test_ages(seconds: float, text: str) -> None:
    assert age(seconds) == text


def on_terminal(home: Path, *arguments: str, code: int = 0, **environment: str) -> str:
    """What a command prints on a terminal of 80 columns, before it ends with this exit code."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    command = [sys.executable, "-P", "-m", "orchestrator", *arguments]
    variables = {"PATH": "/usr/bin:/bin", "TERM": "xterm-256color", "COLUMNS": "80", "FLEETUNE_HOME": str(home)}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=variables | environment)
    os.close(theirs)
    data = b""
    while select.select([ours], [], [], 60)[0]:
        try:
            data += os.read(ours, 1 << 16)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    assert process.wait(timeout=60) == code, data
    return data.decode().replace("\r\n", "\n")


def test_an_error_is_broken_between_words(home: Path, tmp_path: Path) -> None:
    text = on_terminal(home, "plan", str(make_job(tmp_path)), "--set", "train.lrr=1", code=2)
    message = "unknown key; did you mean 'lr'? allowed: steps, epochs, batch_tokens, micro_batch, lr, schedule"
    assert message in " ".join(text.split()) and message not in text
    at_file, *lines = text.splitlines()  # a path is left whole
    assert at_file.endswith("job.yaml:") and max(map(len, lines)) <= 80
    piped = subprocess.run(
        [sys.executable, "-P", "-m", "orchestrator", "plan", str(tmp_path / "job.yaml"), "--set", "train.lrr=1"],
        env={"PATH": "/usr/bin:/bin", "FLEETUNE_HOME": str(home)},
        capture_output=True,
        text=True,
    )
    assert message in piped.stderr  # on one line


def test_no_line_ends_between_a_number_and_its_unit() -> None:
    text = "5.83 MiB without activations: weights 3.99 MiB, gradients 628 KiB, 12 m 05 s, trained 15.4 %, at 8 tokens"
    for width in range(14, 60):
        lines = wrapped_lines(text, width)
        assert " ".join(lines) == text and max(map(len, lines)) <= width
        assert not [line for line in lines if line[-1].isdigit() and not line.endswith(" 8")]
        console = Console(file=io.StringIO(), width=width + 10)
        grid = Table.grid(padding=(0, 2))
        grid.add_row("12345678", WrappedText(text))
        console.print(grid)
        shown_lines = console.file.getvalue().splitlines()
        assert [line[10:].rstrip() for line in shown_lines] == lines
    packages = "torch 2.13.0+cpu, transformers 5.23.0"
    assert wrapped_lines(packages, 34) == ["torch 2.13.0+cpu,", "transformers 5.23.0"]
    assert wrapped_lines("see /a/path/that/is/longer/than/a/line\n\nor", 12, "  ") == [
        "see",
        "  /a/path/that/is/longer/than/a/line",
        "",
        "or",
    ]


def test_colours_are_for_terminals_that_want_them(home: Path) -> None:
    run_dir = make_run(home / "runs", "fake-0000000001", None)
    attempt = claim(run_dir)
    plan(attempt)
    steps(attempt, 1, 100)
    close(run_dir, {"state": "failed", "reason": "boom"})
    for command in (["list"], ["status", "fake"]):
        assert "\x1b[31mfailed\x1b[0m" in on_terminal(home, *command)
        plain = on_terminal(home, *command, NO_COLOR="1")
        assert "failed" in plain and "\x1b" not in plain
        piped = subprocess.run(
            [sys.executable, "-P", "-m", "orchestrator", *command],
            env={"PATH": "/usr/bin:/bin", "FLEETUNE_HOME": str(home)},
            capture_output=True,
            text=True,
        )
        assert "failed" in piped.stdout and "\x1b" not in piped.stdout


def test_who_follows_a_run_sees_what_it_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    for display in (progress._bar_display, partial(progress._line_display, quiet=False)):
        with display() as show:
            show(RUN, {"loss": 0.5}, "")
        shown_lines = capsys.readouterr().out
        assert "evaluating after step 1,200: 120 of 500 rows, for 3 m 05 s" in shown_lines
        with display() as show:
            show(ENDED, {}, "")
        assert "MLflow" not in capsys.readouterr().out


def test_a_line_follows_where_something_else_is_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LINE_S", 0.0)
    with progress._line_display(quiet=False) as show:
        for doing in ("training step 1,201", "exporting the output", "exporting the output"):
            show(replace(RUN, activity=Activity(doing, T0, T0)), {}, "")
    first, second = capsys.readouterr().out.splitlines()
    assert "training step 1,201" in first and "exporting the output" in second


def test_an_evaluation_that_says_nothing_is_left_out() -> None:
    assert RUN.figures
    written = replace(RUN.figures, last_evaluation={"step": 32}, best_evaluation={"step": 32})
    names = [name for name, _ in status_lines(replace(RUN, figures=written))]
    assert "memory" in names
    assert not {"evaluation", "best so far"} & set(names)
