"""What came of an evaluation, for people: the verdict, a table that fits, and a page that is safe with any text."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.evaluation.page import answers_page
from orchestrator.evaluation.questions import AskedRow, PreparedTask
from orchestrator.evaluation.report import EvaluatedTask, EvaluationReport, TaskResult
from orchestrator.evaluation.scores import Score
from orchestrator.evaluation.table import asked_text, evaluation_table, verdict_on
from orchestrator.evaluation.task import TaskSpec
from serving.question import Question

HOSTILE = "</script><script>alert('x')</script>\"&' ${plot} $title \u2028"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]


def evaluated(right: dict[str, str], kind: str = "exact_match", text: str = "an answer") -> EvaluatedTask:
    """A task in which each has these rows right (1) or wrong (0); the first one is the base."""
    count = len(next(iter(right.values())))
    rows = tuple(AskedRow(n + 1, f"prompt {n}", f"expected {n}", Question((n,))) for n in range(count))
    spec = TaskSpec.model_validate({"name": "sums", "kind": kind, "data": "rows.jsonl"})
    results = []
    for label, flags in right.items():
        scores = tuple(Score(f == "1", f"{text} {f}", nats=2.0 + n % 2, tokens=3) for n, f in enumerate(flags))
        results.append(TaskResult(label, "d" * 64, scores, "/out/base/sums/d.jsonl"))
    return EvaluatedTask(PreparedTask(spec, rows), results)


def test_the_verdict_names_what_cannot_be_told_apart() -> None:
    task = evaluated({"base": "0" * 40, "good": "1" * 36 + "0" * 4, "as good": "1" * 34 + "0" * 6})
    assert [leader.label for leader in task.leaders] == ["good", "as good"]
    assert verdict_on(task) == "best: good with 90.0% exact match; these rows do not tell it apart from as good"
    clear = evaluated({"base": "0" * 40, "good": "1" * 40, "half": "10" * 20})
    assert verdict_on(clear) == "best: good with 100.0% exact match, better than all others"
    assert verdict_on(evaluated({"base": "10"})) == "best: base with 50.0% exact match"


def test_what_holds_for_two_need_not_hold_for_many_at_once() -> None:
    rows = {"base": "1" * 20 + "0" * 20, "best": "1" * 28 + "0" * 12}
    assert [leader.label for leader in evaluated(rows).leaders] == ["best"]
    many = rows | {f"poor {n}": "0" * 40 for n in range(30)}
    assert [leader.label for leader in evaluated(many).leaders] == ["best", "base"]


def test_differences_are_on_the_same_rows() -> None:
    task = evaluated({"base": "1" * 10 + "0" * 30, "more": "1" * 20 + "0" * 20, "other": "0" * 20 + "1" * 20})
    plain = task.to_json()
    by_label = {result["label"]: result for result in plain["results"]}
    more, other = (by_label[label]["to_base"]["exact_match"] for label in ("more", "other"))
    assert more["value"] == other["value"] == 0.25
    assert more["low"] > 0.05 > other["low"]  # one has all that the base has, the other nothing of it
    assert "to_base" not in by_label["base"]
    (pair,) = plain["pairs"]
    assert {pair["first"], pair["second"]} == {"more", "other"} and pair["difference"]["value"] == 0


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("kind", ["exact_match", "generation"])
def test_a_table_fits_its_terminal(width: int, kind: str) -> None:
    report = EvaluationReport(
        "tiny", [evaluated({"base": "01" * 20, "gsm8k-dora-r16 [x]": "11" * 20}, kind)], 80, 2.0
    )
    console = Console(width=width, force_terminal=False)
    with console.capture() as captured:
        console.print(evaluation_table(report, width))
    text = captured.get()
    assert all(len(line) <= width for line in text.splitlines())
    assert "gsm8k-dora-r16 [x]" in text and "100.0%" in text and "+50.0" in text
    assert ("0.8333" in text) == (kind == "generation")
    assert asked_text(report) == "80 questions asked in 2.0 s, 40.0 a second"


def test_hostile_texts_stay_text() -> None:
    task = evaluated({"base": "01", HOSTILE: "10"}, text=HOSTILE)
    page = answers_page(EvaluationReport(HOSTILE, [task], 4, 1.0, [HOSTILE]))
    assert page.count("<script") == page.count("</script>") == 2
    (data,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page)
    (shown,) = json.loads(data)
    assert shown["labels"] == ["base", HOSTILE]
    assert shown["rows"][1]["answers"] == [[f"{HOSTILE} 1", 1], [f"{HOSTILE} 0", 0]]
    assert not re.search(r"(src|href|@import|url\((?!#)|fetch\(|https?:)", page)


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_browser_filters_by_disagreement(tmp_path: Path) -> None:
    task = evaluated({"base": "0011", "a": "0101", HOSTILE: "0111"}, text=HOSTILE)
    page = answers_page(EvaluationReport("tiny", [task], 12, 1.0))
    steps = """<script>
    const numbers = () => [...document.querySelectorAll(".row strong")].map(e => e.textContent).join();
    const seen = [numbers()];
    for (const kind of ["all", "nobody", "won 1", "lost 1", "wrong 2"]) {
      document.getElementById("filter").value = kind;
      document.getElementById("filter").dispatchEvent(new Event("change"));
      seen.push(numbers());
    }
    document.title = seen.join("; ") + "; " + document.querySelectorAll(".answer").length;
    </script></body>"""
    path = tmp_path / "answers.html"
    path.write_text(page.replace("</body>", steps), encoding="utf-8")
    done = subprocess.run(
        ["chromium", *FLAGS, f"--user-data-dir={tmp_path / 'p'}", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    (title,) = re.findall("<title>(.*?)</title>", done.stdout)
    both = "row 2,row 3"
    assert title == f"{both}; row 1,{both},row 4; row 1; row 2; row 3; row 1; 1"
    assert "alert('x')" in done.stdout and "<script>alert" not in done.stdout
