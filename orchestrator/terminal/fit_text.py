"""What a plan says of memory, in words."""

from orchestrator.comparison.measure import format_bytes, format_hours
from orchestrator.planning.generations import Generations
from orchestrator.planning.hours import HoursForecast
from orchestrator.planning.memory import MemoryFit
from trainer.dry_run.fit import Change


def fit_fields(fit: MemoryFit) -> dict[str, str]:
    """The lines of a plan that say what a worker takes at most, whether it fits, and what to change."""
    forecast = fit.forecast
    parts = []
    for name, size in forecast.parts.items():
        if size:
            parts.append(f"{name} {format_bytes(size)}")
    named = ", ".join(parts)
    source = forecast.source
    if forecast.runs:
        source = f"{source}, {forecast.factor:.3f} times as {forecast.runs} earlier runs had it"
    if forecast.parts.get("cache"):
        named += " (in an evaluation that writes answers)"
    fields = {"memory": f"{format_bytes(forecast.allocated)} at most, by a {source}: {named}"}
    allocated = format_bytes(forecast.allocated)
    beside = fit.needed - int(forecast.allocated * (1 + forecast.margin))
    margin = f"{100 * forecast.margin:.0f} % of margin"
    sum_of = f"{allocated}, {margin}, and {format_bytes(beside)} for CUDA and communication"
    needed = format_bytes(fit.needed)
    if fit.device is None:
        unknown = "unknown, as no GPU is known (--gpu 80, or a name, says its memory)"
        fields["fits"] = f"{unknown}; it takes {needed} ({sum_of})"
        return fields
    device = format_bytes(fit.device)
    fields["fits"] = f"{'yes' if fit.fits else 'no'}: {needed} of {device} ({sum_of})"
    if not fit.fits:
        fields["instead"] = _instead(fit)
    if fit.problem:
        fields["no dry run"] = fit.problem
    return fields


def hours_text(hours: HoursForecast, changed: HoursForecast | None) -> str:
    """How long a job trains, with the change that fits where it has to be changed, and by what that is known."""
    shown = changed or hours
    source = "stated rates, as no run like it is known"
    if shown.runs:
        source = f"{shown.runs} earlier runs like it"
    with_change = ", with that change" if changed else ""
    low = format_hours(shown.low)
    high = format_hours(shown.high)
    return f"about {format_hours(shown.likely)}{with_change}; in 9 of 10 runs {low} to {high} (by {source})"


def generation_fields(written: Generations) -> dict[str, str]:
    """The lines of a plan that say what a job writes itself, and what that takes."""
    often = "a step" if written.updates == 1 else f"every {written.updates} steps"
    counts = f"{written.answers:,} answers to about {written.prompts:,} prompts {often}"
    most = f"at most {written.tokens:,} tokens, {written.learned:,} with their prompts"
    fields = {"it writes": f"{counts}: {most}"}
    if written.cache_bytes:
        fields["caches"] = f"{format_bytes(written.cache_bytes)} of keys and values on each worker, beside the memory"
    if written.share is not None:
        fields["writing"] = f"at least {written.share:.0%} of the time, by bandwidth and arithmetic, at full length"
    if written.judge_bytes:
        size = format_bytes(written.judge_bytes)
        fields["reward model"] = f"{size} on each worker; with its base, unless that is the job's"
    return fields


def _instead(fit: MemoryFit) -> str:
    """The change with which a worker fits; where it is of the method, or there is none, also the least without."""
    advised = fit.advised
    same_method = [change for change in fit.changes if "method" not in change.settings]
    least = min(same_method, key=lambda change: change.needed, default=None)
    if advised is None:
        return "no change of settings is known that would fit" + _least_text(least) + _more_gpus_text(fit)
    text = f"{advised.text} fits ({format_bytes(advised.needed)})"
    if not fit.keeps_method:
        text += _least_text(least)
    return text + _more_gpus_text(fit)


def _more_gpus_text(fit: MemoryFit) -> str:
    """How many GPUs of a node do without another method, where that is known."""
    if fit.more_gpus is None:
        return ""
    size = format_bytes(fit.more_gpus.needed)
    return f"; {fit.more_gpus.text} fits by the fitted line (about {size} on each)"


def _least_text(least: Change | None) -> str:
    """What the job takes least with its own method, where anything was tried."""
    if least is None:
        return ""
    return f"; with its own method the least is {format_bytes(least.needed)}, by {least.text}"
