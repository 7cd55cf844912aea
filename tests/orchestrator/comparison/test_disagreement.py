"""Answers side by side: of the rows on which configurations disagree, whatever is written in them."""

import json
import re
import shutil
from pathlib import Path

import pytest
from run_folders import claim, eval_row, make_run
from test_report import HOSTILE, Page, in_browser
from tracked_runs import tracked

from orchestrator.comparison import report
from orchestrator.comparison.compare import TrackedRun, arrange
from runfolder.row_results import RowResult, write_row_results
from trainer.data.row_digests import row_digest

RECORDS = [{"question": f"{a} + {a}? {HOSTILE}", "answer": str(2 * a)} for a in range(6)]
RIGHT = {"lora": "110000", "dora": "111000", "full": "110100"}  # 1: the row of that place is right


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "held-out.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


@pytest.fixture
def runs(tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> list[TrackedRun]:
    """Runs that this machine has, with the answers of each."""
    monkeypatch.setenv("FLEETUNE_HOME", str(tmp_path / "home"))
    made = []
    for kind, right in RIGHT.items():
        run = tracked(kind, right.count("1") / 6, method__kind=kind, data__eval=str(rows))
        attempt = claim(make_run(tmp_path / "home" / "runs", run.run_id, None))
        results = []
        for number, (record, is_right) in enumerate(zip(RECORDS, right, strict=True), 1):
            answer = record["answer"] if is_right == "1" else f"of {kind}: {HOSTILE}"
            digest = row_digest(record)
            results.append(RowResult(number, digest, 0.5, 1.0, is_right == "1", answer))
        write_row_results(attempt, 200, results)
        eval_row(attempt, 200, eval_loss=0.5, eval_exact_match=right.count("1") / 6)
        made.append(run)
    return made


def disputed(text: str) -> dict[str, tuple[str, str]]:
    """The rows that are shown, each with the numbers of those who have it right and wrong."""
    found = re.findall(r'data-right="([\d ]*)" data-wrong="([\d ]*)"><summary>(row \d+)', text)
    return {row: (right, wrong) for right, wrong, row in found}


def test_rows_on_which_all_agree_are_left_out(runs: list[TrackedRun], rows: Path) -> None:
    text = report.page(arrange(runs, "e", "uri"))
    page = Page(text)
    shown = disputed(text)
    names = re.findall(r'<option value="\d+">(\w+)</option>', text)[: len(RIGHT)]
    assert names[0] == "lora" and set(shown) == {"row 3", "row 4"}
    number = {name: str(place) for place, name in enumerate(names)}
    assert shown["row 3"][0] == number["dora"] and shown["row 4"][0] == number["full"]
    assert set(shown["row 3"][1].split()) == {number["lora"], number["full"]}
    assert "2 of 2 held-out rows that some have right and others wrong, of 6 that all answered; seed 0" in page.text
    assert page.text.count(f"question: 2 + 2? {HOSTILE}") == 1 and page.count("script") == 1
    assert page.text.count(f"of dora: {HOSTILE}") == 1, "of the row that it has wrong alone"
    rows.write_text(rows.read_text().replace("2 + 2?", "7 + 7?"))
    changed = Page(report.page(arrange(runs, "e", "uri")))
    assert "7 + 7?" not in changed.text and f"question: 3 + 3? {HOSTILE}" in changed.text


def test_without_answers_there_is_no_such_section(runs: list[TrackedRun], tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "home")
    assert "disagree" not in Page(report.page(arrange(runs, "e", "uri"))).text


PICK = """
const [right, wrong] = document.querySelectorAll(".picked select");
right.value = [...right.options].find(option => option.text === "dora").value;
wrong.value = "0";
wrong.dispatchEvent(new Event("change"));
const shown = [...document.querySelectorAll(".disputed")].filter(row => !row.hidden);
document.title = shown.map(row => row.querySelector("summary").textContent).join("; ");
"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_rows_that_one_has_right_and_another_wrong_are_picked(runs: list[TrackedRun], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    report.write_report(arrange(runs, "e", "uri"), path)
    assert "<title>row 3: 1 of 3 right</title>" in in_browser(path, tmp_path / "profile", PICK, 900)
