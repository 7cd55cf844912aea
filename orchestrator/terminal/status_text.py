"""Where a run stands, in words for a person: pairs of a label and a text."""

import time
from collections.abc import Iterator

from orchestrator.comparison.measure import MEASURES, format_bytes, format_duration
from orchestrator.forwarding import forwarding
from orchestrator.status import Status
from runfolder.activity import Activity, silent_since
from runfolder.figures import Figures
from runfolder.files import Record
from runfolder.goodput import Goodput
from trainer.data.survey import summary_line

Fact = tuple[str, str]  # a label, and what there is to say
_PHASES = ("training", "starting", "queued", "stalled", "repeated")  # of Goodput, as they are shown


def status_lines(run: Status) -> Iterator[Fact]:
    """What there is to say of a run but its state; nothing is said of what is not known."""
    if run.reason:
        yield "why", run.reason
    evidence = _last_line(run.evidence)
    if evidence and evidence not in (run.reason or ""):
        yield "evidence", evidence
    yield "cluster", run.cluster
    if not run.submitted:
        return  # its folder cannot be read
    yield "submitted", _local_time(run.submitted)
    if run.stage:
        yield "stage", "{name}, {number} of {of}: run {run_id}".format_map(run.stage)
    if run.attempt or not run.address:  # a RayService makes none
        yield "attempt", _attempt(run)
    if not run.address:  # a service takes no steps
        yield "progress", _progress(run)
    if run.activity:
        yield "now", activity_text(run, run.activity)
    is_silent = _is_silent(run)
    if run.activity and is_silent:
        silence = _since(run, run.activity.moved)
        yield "silent", f'it last wrote something {silence} ago: see "It hangs" in the docs, Debugging'
    if run.remaining_s is not None and not is_silent:
        yield "remaining", _remaining_text(run.remaining_s, run.remaining_range_s)
    if run.figures:
        yield from _figure_lines(run.figures)
    if run.data:
        yield "data", summary_line(run.data)
    if run.mlflow_run_id:
        yield "MLflow run", run.mlflow_run_id
    if run.tracking:
        yield "tracking", run.tracking


def output_lines(run: Status) -> Iterator[Fact]:
    """What a person copies: where a run's files are, and the lines of Python that load its output."""
    if run.address:
        yield "address", run.address
        reached_by = forwarding(run.cluster, run.address)
        if reached_by != run.address:
            yield "from here", reached_by
    if run.run_dir:
        yield "run folder", run.run_dir
    if run.output_dir:
        yield "output", run.output_dir
    label = "load it"
    for line in run.loading:
        yield label, line
        label = ""


def _remaining_text(seconds: float, within: tuple[float, float] | None) -> str:
    """The time until the last step, and the interval that it is in, as far as that is known."""
    duration = format_duration(seconds)
    if within is None:
        return f"about {duration}"
    shortest, longest = map(format_duration, within)
    if shortest == longest:
        return f"about {duration}"
    return f"about {duration}, in 9 of 10 runs {shortest} to {longest}"


def _local_time(timestamp: float) -> str:
    """A time (seconds since 1970) to the minute, as the clock on this machine's wall shows it."""
    there = time.localtime(timestamp)
    return time.strftime("%Y-%m-%d %H:%M", there)


def _last_line(text: str | None) -> str:
    """The last line of a text; empty where there is none."""
    lines = (text or "").strip().splitlines()
    if not lines:
        return ""
    return lines[-1].strip()


def _attempt(run: Status) -> str:
    if run.attempt == 0:
        return "none yet"
    if run.verdict is None:
        return str(run.attempt)
    return f"{run.attempt}, which ended with: {run.verdict}"


def _progress(run: Status) -> str:
    """The step, and when it was taken."""
    step = _step(run)
    if run.figures is None or run.figures.since_last_step_s is None:
        return step
    if run.state != "running":
        return step
    silence = format_duration(run.figures.since_last_step_s)
    return f"{step}, the last one {silence} ago"


def activity_text(run: Status, activity: Activity) -> str:
    """What a run does, and for how long it has."""
    duration = _since(run, activity.since)
    return f"{activity.doing}, for {duration}"


def _since(run: Status, timestamp: float) -> str:
    """How long something was ago when a run was looked at."""
    return format_duration(_seconds_since(run, timestamp))


def _seconds_since(run: Status, timestamp: float) -> float:
    elapsed = run.looked_at - timestamp
    return max(0.0, elapsed)  # the clocks of several hosts differ a little


def _is_silent(run: Status) -> bool:
    """Whether a run that trains has not written anything for far longer than its steps take."""
    figures = run.figures
    if run.state not in ("starting", "running") or figures is None or run.activity is None:
        return False
    if run.address:  # a service writes nothing while nobody asks
        return False
    return silent_since(run.activity, figures.seconds_per_step, run.looked_at) is not None


def _step(run: Status) -> str:
    step, steps = run.step, run.steps
    if steps is None:
        return f"step {step} (of how many is not known yet)"
    share = step / max(1, steps)
    return f"step {step:,} of {steps:,} ({share:.0%})"


def _speed(figures: Figures) -> str:
    """How fast steps are taken; empty where that is not known."""
    known = []
    if figures.tokens_per_second is not None:
        known.append(f"{figures.tokens_per_second:,.0f} tokens/s")
    if figures.seconds_per_step:
        known.append(_pace(figures.seconds_per_step))
    return ", ".join(known)


def _pace(seconds_per_step: float) -> str:
    """How long a step takes, or how many a second has."""
    if seconds_per_step >= 1:
        duration = format_duration(seconds_per_step)
        return f"{duration} a step"
    return f"{1 / seconds_per_step:.1f} steps/s"


def _figure_lines(figures: Figures) -> Iterator[Fact]:
    speed = _speed(figures)
    if speed:
        yield "speed", speed
    last = figures.last_evaluation
    best = figures.best_evaluation
    if last and best and len(last) > 1:  # that of a stage that writes has its step alone
        yield "evaluation", _evaluation_text(last)
        if best["step"] == last["step"]:
            yield "best so far", "the last one"
        else:
            yield "best so far", _evaluation_text(best)
    if figures.peak_memory_bytes is not None:
        memory = format_bytes(figures.peak_memory_bytes)
        yield "memory", f"at most {memory}, on rank 0"
    yield "time", _time_spent(figures.goodput)


def _evaluation_text(metrics: Record) -> str:
    """An evaluation in one line: after which step, and each metric by its name."""
    measures = {measure.key: measure for measure in MEASURES}
    texts = []
    for name, value in metrics.items():
        if name in measures:
            measure = measures[name]
            texts.append(f"{measure.title} {measure.show(value)}")
        elif name != "step":
            words = name.replace("_", " ")
            texts.append(f"{words} {value:.4g}")
    joined = ", ".join(texts)
    return f"step {metrics['step']:,}: {joined}"


def _time_spent(spent: Goodput) -> str:
    """How long a run has taken in all, and the share of each phase that shows in whole percents."""
    total = spent.total
    shares = []
    for phase in _PHASES:
        seconds = getattr(spent, phase)
        share = seconds / max(total, 1e-9)
        if share >= 0.005:
            shares.append(f"{phase} {share:.0%}")
    joined = ", ".join(shares)
    duration = format_duration(total)
    return f"{duration}: {joined}"
