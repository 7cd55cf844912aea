"""All answers as one HTML file that needs nothing else: what was asked, expected and answered, to look through."""

import json
import time
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from orchestrator.comparison.report import style_sheet
from orchestrator.evaluation.report import LOSS, EvaluatedTask, EvaluationReport, TaskResult
from orchestrator.evaluation.table import TITLES, difference_text, estimate_text, verdict_on, win_texts

_SECTION = (
    '<h2>{name}</h2><p class="best">{verdict}</p><div class="wide"><table><tr>{heads}</tr>{rows}</table></div>{note}'
)
_NOTE = (
    '<p class="soft">{rows} rows of {data}. In brackets intervals of 95 %; differences are on the same rows, those '
    "of shares in points of a percent. In bold: the best, and all that these rows, by intervals that hold at once, "
    "do not tell apart from it.</p>"
)
_WARNING = '<p class="warning">{text}</p>'
_BAR = (
    '<td class="bar"><i style="left:{low:.2f}%;width:{width:.2f}%"></i><b style="left:{at:.2f}%"></b></td>'  # percent
)


def write_page(report: EvaluationReport, path: Path) -> None:
    """Write the page of an evaluation into a file."""
    path.write_text(answers_page(report), encoding="utf-8")


def answers_page(report: EvaluationReport) -> str:
    """The page of an evaluation as HTML."""
    names = [task.name for task in report.tasks]
    title = ", ".join(names)
    warnings = ""
    for text in report.warnings:
        warnings += _WARNING.format(text=escape(text))
    sections = ""
    for task in report.tasks:
        sections += _section(task)
    file = Path(__file__).with_name("answers.html")
    template = Template(file.read_text(encoding="utf-8"))
    now = time.strftime("%Y-%m-%d %H:%M")
    return template.substitute(
        title=escape(title),
        style=style_sheet(),
        base=escape(report.base),
        now=now,
        warnings=warnings,
        sections=sections,
        data=_as_script(_data(report)),
    )


def _section(task: EvaluatedTask) -> str:
    """What came of a task: the verdict, and a line for each adapter."""
    heads = "<th>adapter</th>"
    for measure in task.measures:
        heads += f'<th class="n">{TITLES[measure]}</th>'
        if measure != LOSS:
            heads += "<th></th>"
        heads += '<th class="n">to the base</th>'
    rows = ""
    leaders = task.leaders
    for result in task.best_first:
        style = ""
        if result in leaders:
            style = ' class="top"'
        cells = _measure_cells(task, result)
        rows += f"<tr{style}><td>{escape(result.label)}</td>{cells}</tr>"
    data = escape(task.prepared.task.data)
    note = _NOTE.format(rows=len(task.prepared.rows), data=data)
    name = escape(task.name)
    verdict = escape(verdict_on(task))
    for text in win_texts(task):
        verdict += f"<br>{escape(text)}"
    return _SECTION.format(name=name, verdict=verdict, heads=heads, rows=rows, note=note)


def _measure_cells(task: EvaluatedTask, result: TaskResult) -> str:
    """The measures of a result, a share also as a bar, and what it has more than the base."""
    cells = ""
    to_base = task.to_base(result)
    for measure, value in task.estimates(result).items():
        text = estimate_text(measure, value)
        cells += f'<td class="n">{text}</td>'
        if measure != LOSS:
            low = 100 * value.low
            width = 100 * value.high - low
            at = 100 * value.value
            cells += _BAR.format(low=low, width=width, at=at)
        difference = ""
        if result is not task.base:
            difference = difference_text(measure, to_base[measure])
        cells += f'<td class="n">{difference}</td>'
    return cells


def _data(report: EvaluationReport) -> list[dict[str, Any]]:
    """The rows and answers of all tasks as the page's script reads them."""
    tasks = []
    for task in report.tasks:
        labels = [result.label for result in task.results]
        rows = []
        for number, row in enumerate(task.prepared.rows):
            answers = []
            for result in task.results:
                score = result.scores[number]
                answer = [score.shown, int(score.right)]
                answers.append(answer)
            shown = {"number": row.number, "prompt": row.prompt, "expected": row.expected, "answers": answers}
            rows.append(shown)
        tasks.append({"name": task.name, "labels": labels, "rows": rows})
    return tasks


def _as_script(data: Any) -> str:
    """Plain data as JSON that no text in it can end."""
    text = json.dumps(data, ensure_ascii=False)
    for character in ("<", "\u2028", "\u2029"):
        escaped = f"\\u{ord(character):04x}"
        text = text.replace(character, escaped)
    return text
