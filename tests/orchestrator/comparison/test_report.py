"""The HTML report: whole, self-contained, and safe with whatever runs are called."""

import base64
import csv
import dataclasses
import json
import math
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tracked_runs import preferring, tracked

from orchestrator.comparison import axis, chart, plots, report
from orchestrator.comparison.chart import Line
from orchestrator.comparison.compare import TrackedRun, arrange
from orchestrator.comparison.dot_labels import Box, placed
from orchestrator.comparison.measure import format_bytes
from orchestrator.comparison.pareto import pareto
from orchestrator.comparison.scatter import Dot, scatter

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
    assert page.count("g", **{"class": "series"}) == 3 * 2
    assert page.count("polygon", **{"class": "band"}) == 3  # of three seeds, one in each kind of curves
    assert page.count("circle", **{"class": "dot"}) == 2 * 2
    assert "Highest exact match: 90.0% by full. That does not make it the best" in page.text
    assert "± 1.0%" in page.text


def test_a_comparison_of_objectives() -> None:
    page = page_of(preferring("dpo", 0.8), preferring("kto", 0.7, kl=True, train__lr="0.1"))
    titles = [
        attributes["aria-label"] for tag, attributes in page.seen if tag == "svg" and "aria-label" in attributes
    ]
    for title in ("Accuracy on held-out pairs", "Reward of chosen answers", "KL to the reference"):
        assert title in titles
    assert "Highest accuracy: 80.0% by dpo" in page.text


def test_those_that_are_as_good_are_counted() -> None:
    runs = [tracked(f"r{rank}", 0.9, method__rank=rank) for rank in "248"] + [tracked("bad", 0.1, method__rank="1")]
    text = Page(report.page(arrange(runs, "e", "uri"))).text
    assert re.search(r"Highest exact match: 90\.0% by r\d and 2 others", text)


def test_it_needs_nothing_else() -> None:
    text = report.page(arrange([tracked("a", 0.5)], "e", "uri"))
    assert not re.search(r"(src|href=\"(?!data:)|@import|url\((?!#)|fetch\(|https?:)", text)


def test_hostile_names_stay_text() -> None:
    page = page_of(tracked(HOSTILE, 0.5, data__train=HOSTILE), tracked("b", 0.6), title=HOSTILE)
    assert page.count("script") == 1
    assert page.text.count(HOSTILE) >= 4


@pytest.mark.parametrize(
    ("runs", "charts"),
    [
        ([tracked("one", 0.5)], 5),
        ([tracked("a", 0.5, evals=False), tracked("b", 0.6, evals=False, train__lr="1")], 4),
        ([tracked("a", 0.5, "FAILED", evals=False)], 1),
        ([dataclasses.replace(tracked("a", 0.5, "FAILED"), curves={}, metrics={})], 0),
        ([tracked(f"r{i}", 0.2 + i / 100, train__lr=str(i)) for i in range(50)], 6),
    ],
)
def test_any_set_of_runs(runs: list[TrackedRun], charts: int) -> None:
    page = page_of(*runs)
    assert page.count("svg", **{"class": "chart"}) == charts
    assert page.count("details") == len(runs)


def test_a_line_breaks_at_nan_and_outliers_leave_the_frame() -> None:
    curve = tuple((step, math.nan if step == 50 else 1e9 if step == 20 else 3 - step / 100) for step in range(1, 101))
    drawn = chart.line_chart("loss", [Line("a", 0, curve)], "step", str, axis.EVERYTHING, axis.HALF_WIDTH)
    figure = ElementTree.fromstring(drawn)
    lines = [[tuple(map(float, p.split(","))) for p in e.attrib["points"].split()] for e in figure.iter("polyline")]
    assert [len(line) for line in lines] == [49, 50]
    inside = [y for line in lines for _, y in line if axis.TOP <= y <= axis.HEIGHT - axis.BOTTOM]
    assert len(inside) == 98
    assert max(inside) - min(inside) > 200


def test_a_curve_of_few_points_stays_in_the_frame() -> None:
    lines = [Line("a", 0, ((0, 0.5), (40, 1.0))), Line("b", 1, ((0, 0.5), (40, 0.5)))]
    drawn = chart.line_chart("accuracy", lines, "step", "{:.0%}".format, (0.0, 1.0), axis.HALF_WIDTH)
    points = [p for e in ElementTree.fromstring(drawn).iter("polyline") for p in e.attrib["points"].split()]
    heights = [float(point.split(",")[1]) for point in points]
    assert len(heights) == 4 and min(heights) >= axis.TOP and max(heights) <= axis.HEIGHT - axis.BOTTOM


@pytest.mark.parametrize("value", [0.0, 0.995, 1.0])
def test_no_tick_stands_where_no_value_can_be(value: float) -> None:
    curve = ((1, value), (2, value))
    drawn = chart.line_chart("match", [Line("a", 0, curve)], "step", "{:.0%}".format, (0.0, 1.0), axis.HALF_WIDTH)
    ticks = [int(e.text[:-1]) for e in ElementTree.fromstring(drawn).iter("text") if (e.text or "").endswith("%")]
    assert ticks and min(ticks) >= 0 and max(ticks) <= 100


def test_texts_of_ticks_end_within_the_chart() -> None:
    """From 9.3 to 28.5 GiB, where a tick stands at 30 GiB, next to the right edge."""
    gib = 2.0**30
    dots = [Dot(str(size), 0, size * gib, 1.0 + size, False) for size in (9.3, 28.5)]
    drawn = scatter("a", dots, "memory", 5 * gib, (format_bytes, str), axis.EVERYTHING)
    (last,) = re.findall(r'<text x="([0-9.]+)" y="\d+" text-anchor="(\w+)">30.00 GiB</text>', drawn)
    assert last == (f"{axis.HALF_WIDTH:.1f}", "end")
    middles = re.findall(r'<text x="([0-9.]+)" y="\d+" text-anchor="middle">[0-9.]+ GiB</text>', drawn)
    assert middles and max(map(float, middles)) < axis.HALF_WIDTH - 30


def test_thinning_keeps_extremes_and_ends() -> None:
    points = [(float(step), 100.0 if step == 7777 else math.sin(step)) for step in range(100_000)]
    kept = chart.thin(points)
    assert len(kept) <= 402
    assert (7777.0, 100.0) in kept
    assert kept[-1] == points[-1]
    assert kept == sorted(kept)


def test_pareto_front() -> None:
    points = [(1.0, 0.5), (2.0, 0.9), (3.0, 0.8), (1.0, 0.4), (2.0, 0.9)]
    assert pareto(points, more_is_better=True) == [True, True, False, False, True]
    assert pareto(points, more_is_better=False) == [False, False, False, True, False]


@pytest.mark.parametrize(("rough", "expected"), [(0.013, 0.02), (0.7, 1), (1, 1), (2.2, 2.5), (30, 50), (6e8, 1e9)])
def test_nice_numbers(rough: float, expected: float) -> None:
    assert axis.nice(rough) == pytest.approx(expected)


def similar_runs() -> list[TrackedRun]:
    """Ten methods of which most come to nearly the same at nearly the same cost."""
    runs = []
    for place, kind in enumerate(
        ("lora", "dora", "rslora", "adalora", "full", "ia3", "vera", "prefix", "prompt", "x")
    ):
        for seed in "012":
            quality = 0.9 + place / 1000 + int(seed) * (place % 3) / 10_000
            run = tracked(f"record-{kind}-with-a-name", quality, method__kind=kind, train__seed=seed)
            metrics = run.metrics | {"train_s": 100.0 + place % 3, "peak_memory_bytes": 2.0**30 * (1 + place % 2)}
            runs.append(dataclasses.replace(run, metrics=metrics))
    return runs


def test_names_of_dots_are_within_the_chart_and_over_nothing() -> None:
    rng = random.Random(0)
    frame = Box(64, 14, 560, 256)
    named = 0
    for _ in range(200):
        dots = [(rng.uniform(70, 550), rng.gauss(130, 20)) for _ in range(rng.randrange(1, 14))]
        labels = placed(dots, [f"{place}" * rng.randrange(3, 30) for place in range(len(dots))], frame)
        named += len(labels)
        boxes = [label.box for label in labels]
        for place, box in enumerate(boxes):
            assert frame.holds(box) and not any(map(box.meets, boxes[:place]))
            assert not any(box.meets(Box(x - 6, y - 6, x + 6, y + 6)) for x, y in dots)
    assert named > 800, "most dots have a name"
    assert placed([(300, 100)] * 3, ["best", "b", "c"], frame)[0].text == "best"


def test_intervals_stand_at_the_dots_of_rows_that_have_one() -> None:
    page = page_of(*similar_runs(), tracked("alone", 0.5, method__kind="alone"))
    assert page.count("path", **{"class": "error"}) == 2 * 10
    assert page.count("circle", **{"class": "dot"}) == 2 * 11


def test_costs_that_vary_over_seeds_make_the_intervals_crosses() -> None:
    runs = []
    for run in similar_runs():
        time_taken = 100.0 + 10 * int(run.params["train.seed"])
        runs.append(dataclasses.replace(run, metrics=run.metrics | {"train_s": time_taken}))
    cost = arrange(runs, "e", "uri").rows[0].metric("train_s")
    assert cost and plots.cost_interval(cost) == (
        pytest.approx(85.16, abs=0.01),
        pytest.approx(134.84, abs=0.01),
    )  # t of two degrees: 4.303
    shown = report.page(arrange(runs, "e", "uri"))
    assert len(re.findall(r'class="error"[^>]*d="M[\d.]+ [\d.]+H', shown)) == 10, "of the times alone"


def test_what_failed_is_listed_with_its_reason() -> None:
    reasons = {"a": HOSTILE, "b": "out of memory", "c": "out of memory", "d": ""}
    runs = [tracked("fine", 0.5)]
    for name, reason in reasons.items():
        run = tracked(name, 0.5, "failed", train__lr=name)
        runs.append(dataclasses.replace(run, tags={**run.tags, "fleetune.reason": reason}))
    page = page_of(*runs)
    assert re.search(r"What failed.*b-0+, c-0+out of memory.*d-0+no reason is known", page.text)
    assert f"a-{0:010d}{HOSTILE}" in page.text and "What failed" not in page_of(tracked("fine", 0.5)).text


def test_several_that_beat_the_reference_are_not_one_best() -> None:
    """Two methods that are equally much better than LoRA are named both, and both are marked."""
    runs = []
    for kind, quality in (("lora", 0.5), ("dora", 0.8), ("vera", 0.801), ("ia3", 0.3)):
        for seed in range(5):
            run = tracked(kind, quality, method__kind=kind, train__seed=str(seed))
            match = quality + random.Random(f"{kind} {seed}").uniform(0, 0.016)
            runs.append(dataclasses.replace(run, metrics=run.metrics | {"eval_exact_match": match}))
    found = arrange(runs, "e", "uri")
    assert found.verdict
    named = re.fullmatch(
        r"(\w+) beats lora in .* by .*, and so do (\w+), which cannot be told apart from it .*", found.verdict
    )
    assert named and set(named.groups()) == {"dora", "vera"}
    text = report.page(found)
    assert len(re.findall(r'<td class="n top">8\d\.\d%', text)) == 2
    alone = report.page(arrange([tracked("a", 0.5), tracked("b", 0.6, train__lr="1")], "e", "uri"))
    assert "Highest exact match: 60.0% by b. That does not make it the best" in alone
    assert '<td class="n top">60.0%' not in alone


def test_rates_are_drawn_where_a_method_has_several() -> None:
    runs = [
        tracked(f"{kind}-{rate}", 0.5 + place / 10, method__kind=kind, train__lr=rate)
        for kind in ("lora", "dora")
        for place, rate in enumerate(("0.0001", "0.0003", "0.001"))
    ]
    page = page_of(*runs, tracked("once", 0.5, method__kind="once", train__lr="0.01"))
    charts = [attributes for _, attributes in page.seen if attributes.get("data-of") == "learning rate"]
    assert len(charts) == 1 and "Exact match against learning rate" in page.text
    labels = [attributes["data-label"] for tag, attributes in page.seen if tag == "g" and "data-label" in attributes]
    assert labels[:2] == ["dora", "lora"] or labels[:2] == ["lora", "dora"]
    low, high, *_ = map(float, str(charts[0]["data-x"]).split())
    assert low < -4 < -3 < high
    assert "1.0e-4" in page.text and "1.0e-3" in page.text
    low, high, *_ = map(float, str(charts[0]["data-y"]).split())
    assert low < 0.5 < 0.7 < high, "no point leaves the frame"


def test_what_was_done_can_be_pasted_and_the_figures_saved() -> None:
    found = arrange(similar_runs(), "e", "uri")
    page = Page(report.page(found))
    assert "We compared 10 configurations in 30 runs, 3 seeds each. They were judged by exact match" in page.text
    assert "so that all 9 hold at once with 95 % (Bonferroni)" in page.text
    links = {str(a["download"]): str(a["href"]) for tag, a in page.seen if tag == "a"}
    saved = {name: base64.b64decode(href.partition("base64,")[2]).decode() for name, href in links.items()}
    assert json.loads(saved["comparison.json"]) == json.loads(json.dumps(found.to_json()))
    lines = list(csv.DictReader(saved["comparison.csv"].splitlines()))
    assert [line["label"] for line in lines] == [row.label for row in found.rows]
    first, ranked = lines[0], found.rankings[0].ranked[0]
    assert first["rank"] == "1" and float(first["gain"]) == found.rankings[0].gain(ranked)[0]
    assert first["method.kind"] and first["seeds"] == "0 1 2"


def in_browser(path: Path, profile: Path, script: str, width: int) -> str:
    """The page in a browser of a width, after a script has run in it."""
    text = path.read_text().replace("</body>", f"<script>{script}</script></body>")
    path.write_text(text)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}"]
    flags += [f"--window-size={width},900"]
    done = subprocess.run(
        ["chromium", *flags, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120
    )
    return done.stdout


OVERLAPS = """
let named = 0, over = [];
document.querySelectorAll("svg.chart:not(.forest)").forEach(svg => {
  const names = [...svg.querySelectorAll("text.name")].map(e => [e.textContent, e.getBoundingClientRect()]);
  const frame = svg.getBoundingClientRect();
  named += names.length;
  names.forEach(([a, r], i) => {
    if (r.left < frame.left || r.right > frame.right) over.push(a + " leaves the chart");
    names.slice(i + 1).forEach(([b, q]) => {
      if (r.left < q.right && q.left < r.right && r.top < q.bottom && q.top < r.bottom) over.push(a + " over " + b);
    });
  });
});
document.title = named + " named; " + over.join(", ");
"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
@pytest.mark.parametrize("width", [500, 900, 1500])
def test_no_name_of_a_dot_is_over_another_one_in_a_browser(tmp_path: Path, width: int) -> None:
    path = tmp_path / "report.html"
    report.write_report(arrange(similar_runs(), "e", "uri"), path)
    shown = in_browser(path, tmp_path / "profile", OVERLAPS, width)
    found = re.search(r"<title>(\d+) named; (.*)</title>", shown)
    assert found and int(found[1]) >= 8 and found[2] == "", found


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_browser_runs_it_without_errors(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    report.write_report(arrange([tracked(HOSTILE, 0.5), tracked("b", 0.6, train__lr="1")], "e", "uri"), path)
    script = "onerror=m=>document.title='broken '+m;"
    check = "<script>document.querySelector('.legend li').dispatchEvent(new Event('mouseenter'));</script></body>"
    text = path.read_text().replace("<script>", f"<script>{script}</script><script>").replace("</body>", check)
    path.write_text(text)
    shown = in_browser(path, tmp_path / "p", "", 900)
    assert "<title>Fleetune: e</title>" in shown
    assert 'class="series dim"' in shown


def costly_runs() -> list[TrackedRun]:
    """Two methods of 200 steps of 8,192 tokens on two workers, of which the second takes twice the time."""
    runs = []
    for kind, seconds in (("lora", 50.0), ("dora", 100.0)):
        for seed in "01":
            run = tracked(kind, 0.6, method__kind=kind, train__seed=seed, train__batch_tokens="8192")
            tags = {**run.tags, "fleetune.plan.work.workers": "2"}
            runs.append(dataclasses.replace(run, tags=tags, metrics=run.metrics | {"train_s": seconds}))
    return runs


# The last place of each curve of the first chart, in each unit; then the places in steps as they were at first.
UNITS = """
const chart = document.querySelector('svg.chart[data-of="step"]');
const line = series => series.querySelector("polyline").points;
const last = series => value(chart.dataset.x, line(series)[line(series).length - 1].x).toFixed(0);
const lasts = () => [...chart.querySelectorAll(".series")].map(
  series => series.dataset.label.split(",")[0] + " " + last(series));
const xs = () => [...line(chart)].map(point => point.x);
const at_first = xs();
const found = [];
for (const unit of ["tokens", "seconds", "step"]) {
  document.querySelector(`[data-unit=${unit}]`).click();
  const tick = [...chart.querySelectorAll(".across text")].pop().textContent;
  found.push([unit, ...lasts(), tick, chart.querySelector(".across-title").textContent].join(" "));
}
const back = xs().every((x, i) => Math.abs(x - at_first[i]) < 0.02);
document.title = [...found, back, document.querySelector("[aria-pressed=true]").textContent].join("; ");
"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_curves_are_over_steps_tokens_or_the_seconds_of_workers(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    report.write_report(arrange(costly_runs(), "e", "uri"), path)
    shown = in_browser(path, tmp_path / "profile", UNITS, 900)
    found = re.search("<title>(.*)</title>", shown)
    assert found
    tokens, seconds, steps, back, pressed = found[1].split("; ")
    assert re.fullmatch(r"tokens (lora|dora) 1638\d\d\d (lora|dora) 1638\d\d\d 1.5M tokens", tokens)
    assert set(re.findall(r"(\w+) (\d+)(?= )", seconds)) >= {("lora", "100"), ("dora", "200")}
    assert seconds.endswith(" 200 worker-seconds") and steps.endswith(" 200 step")
    assert (back, pressed) == ("true", "steps")


def test_a_switch_waits_for_the_script_and_only_for_runs_that_say_their_costs() -> None:
    page = page_of(*costly_runs())
    assert page.count("p", **{"class": "units"}) == 1
    items = [attributes for tag, attributes in page.seen if tag == "li" and attributes.get("data-seconds")]
    assert sorted(str(attributes["data-seconds"]) for attributes in items) == ["0.5", "1"]
    assert {attributes["data-tokens"] for attributes in items} == {"8192"}
    without = page_of(tracked("a", 0.5))
    assert not any("data-seconds" in attributes for _, attributes in without.seen)


@pytest.mark.parametrize(("least", "is_log"), [(0.01, True), (1.0, False), (-0.01, False)])
def test_a_loss_that_spans_decades_has_a_logarithmic_axis(least: float, is_log: bool) -> None:
    curve = tuple((step, 4 * math.exp(-step / 10) + least) for step in range(100))
    drawn = chart.line_chart("loss", [Line("a", 0, curve)], "step", "{:g}".format, axis.EVERYTHING, 500)
    figure = ElementTree.fromstring(drawn)
    (frame,) = figure.iter("svg")
    assert frame.attrib["data-y"].endswith(" log") == is_log
    ticks = [e.text for e in figure.iter("text")]
    assert ({"0.01", "0.1", "1"} <= set(ticks)) == is_log
    (line,) = figure.iter("polyline")
    heights = [float(point.split(",")[1]) for point in line.attrib["points"].split()]
    assert min(heights) >= axis.TOP and max(heights) <= axis.HEIGHT - axis.BOTTOM
