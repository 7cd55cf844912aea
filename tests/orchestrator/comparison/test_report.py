"""The HTML report: whole, self-contained, and safe with whatever runs are called."""

import dataclasses
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tracked_runs import preferring, tracked

from orchestrator.comparison import chart, report
from orchestrator.comparison.chart import Line
from orchestrator.comparison.compare import TrackedRun, arrange

HOSTILE = "<script>alert('x')</script>\"&' ${plot} $title"
VOID = {"meta", "link", "br", "rect", "path", "circle"}


class Page(HTMLParser):
    """The elements of a page; raises where they are not properly nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str, **attributes: str) -> int:
        return sum(t == tag and attributes.items() <= a.items() for t, a in self.seen)


def page_of(*runs: TrackedRun, title: str = "gsm8k") -> Page:
    return Page(report.page(arrange(list(runs), title, "sqlite:////home/ada/mlflow.db")))


def test_a_comparison_of_methods(tmp_path: Path) -> None:
    runs = [tracked("lora", 0.6, train__seed=s) for s in "012"] + [tracked("full", 0.9, method__kind="full")]
    report.write_report(arrange(runs, "gsm8k", "uri"), tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.count("svg", **{"class": "chart"}) == 5  # three kinds of curves, two costs
    assert page.count("g", **{"class": "series"}) == 3 * 4
    assert page.count("circle", **{"class": "dot"}) == 2 * 2
    assert "Best exact match: 90.0% by full" in page.text
    assert "± 1.0%" in page.text


def test_a_comparison_of_objectives() -> None:
    page = page_of(preferring("dpo", 0.8), preferring("kto", 0.7, kl=True, train__lr="0.1"))
    titles = [
        attributes["aria-label"] for tag, attributes in page.seen if tag == "svg" and "aria-label" in attributes
    ]
    for title in ("Accuracy on held-out pairs", "Reward of chosen answers", "KL to the reference"):
        assert title in titles
    assert "Best accuracy: 80.0% by dpo" in page.text


def test_those_that_are_as_good_are_counted() -> None:
    runs = [tracked(f"r{rank}", 0.9, method__rank=rank) for rank in "248"] + [tracked("bad", 0.1, method__rank="1")]
    text = Page(report.page(arrange(runs, "e", "uri"))).text
    assert re.search(r"Best exact match: 90\.0% by r\d and 2 others", text)


def test_it_needs_nothing_else() -> None:
    text = report.page(arrange([tracked("a", 0.5)], "e", "uri"))
    assert not re.search(r"(src|href|@import|url\((?!#)|fetch\(|https?:)", text)


def test_hostile_names_stay_text() -> None:
    page = page_of(tracked(HOSTILE, 0.5, data__train=HOSTILE), tracked("b", 0.6), title=HOSTILE)
    assert page.count("script") == 1
    assert page.text.count(HOSTILE) >= 4


@pytest.mark.parametrize(
    ("runs", "charts"),
    [
        ([tracked("one", 0.5)], 5),
        ([tracked("a", 0.5, evals=False), tracked("b", 0.6, evals=False, train__lr="1")], 3),
        ([tracked("a", 0.5, "FAILED", evals=False)], 1),
        ([dataclasses.replace(tracked("a", 0.5, "FAILED"), curves={}, metrics={})], 0),
        ([tracked(f"r{i}", 0.2 + i / 100, train__lr=str(i)) for i in range(50)], 5),
    ],
)
def test_any_set_of_runs(runs: list[TrackedRun], charts: int) -> None:
    page = page_of(*runs)
    assert page.count("svg", **{"class": "chart"}) == charts
    assert page.count("details") == len(runs)


def test_a_line_breaks_at_nan_and_outliers_leave_the_frame() -> None:
    curve = tuple((step, math.nan if step == 50 else 1e9 if step == 20 else 3 - step / 100) for step in range(1, 101))
    drawn = chart.line_chart("loss", [Line("a", 0, curve)], "step", str, chart.EVERYTHING, chart.HALF_WIDTH)
    figure = ElementTree.fromstring(drawn)
    lines = [[tuple(map(float, p.split(","))) for p in e.attrib["points"].split()] for e in figure.iter("polyline")]
    assert [len(line) for line in lines] == [49, 50]
    inside = [y for line in lines for _, y in line if chart.TOP <= y <= chart.HEIGHT - chart.BOTTOM]
    assert len(inside) == 98
    assert max(inside) - min(inside) > 200


@pytest.mark.parametrize("value", [0.0, 0.995, 1.0])
def test_no_tick_stands_where_no_value_can_be(value: float) -> None:
    curve = ((1, value), (2, value))
    drawn = chart.line_chart("match", [Line("a", 0, curve)], "step", "{:.0%}".format, (0.0, 1.0), chart.HALF_WIDTH)
    ticks = [int(e.text[:-1]) for e in ElementTree.fromstring(drawn).iter("text") if (e.text or "").endswith("%")]
    assert ticks and min(ticks) >= 0 and max(ticks) <= 100


def test_thinning_keeps_extremes_and_ends() -> None:
    points = [(float(step), 100.0 if step == 7777 else math.sin(step)) for step in range(100_000)]
    kept = chart.thin(points)
    assert len(kept) <= 402
    assert (7777.0, 100.0) in kept
    assert kept[-1] == points[-1]
    assert kept == sorted(kept)


def test_pareto_front() -> None:
    points = [(1.0, 0.5), (2.0, 0.9), (3.0, 0.8), (1.0, 0.4), (2.0, 0.9)]
    assert chart.pareto(points, more_is_better=True) == [True, True, False, False, True]
    assert chart.pareto(points, more_is_better=False) == [False, False, False, True, False]


@pytest.mark.parametrize(("rough", "expected"), [(0.013, 0.02), (0.7, 1), (1, 1), (2.2, 2.5), (30, 50), (6e8, 1e9)])
def test_nice_numbers(rough: float, expected: float) -> None:
    assert chart.nice(rough) == pytest.approx(expected)


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_browser_runs_it_without_errors(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    report.write_report(arrange([tracked(HOSTILE, 0.5), tracked("b", 0.6, train__lr="1")], "e", "uri"), path)
    script = "onerror=m=>document.title='broken '+m;"
    check = "<script>document.querySelector('.legend li').dispatchEvent(new Event('mouseenter'));</script></body>"
    text = path.read_text().replace("<script>", f"<script>{script}</script><script>").replace("</body>", check)
    path.write_text(text)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'p'}"]
    done = subprocess.run(
        ["chromium", *flags, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert "<title>Fleetune: e</title>" in done.stdout
    assert 'class="series dim"' in done.stdout
