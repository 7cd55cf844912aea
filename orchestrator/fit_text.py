"""What a plan says of memory, in words."""

from orchestrator.comparison.measure import format_bytes
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
    fields = {"memory": f"{format_bytes(forecast.allocated)} at most, by a {source}: {named}"}
    margin = f"{100 * forecast.margin:.0f} % more, and what CUDA takes itself"
    needed = f"{format_bytes(fit.needed)} with {margin}"
    if fit.device is None:
        fields["fits"] = f"unknown, as no GPU is known (--gpu GIB says its memory); it takes {needed}"
        return fields
    device = format_bytes(fit.device)
    fields["fits"] = f"{'yes' if fit.fits else 'no'}: {needed}, of {device}"
    if not fit.fits and not fit.changes:
        fields["instead"] = "no change is known that would fit"
    for change in fit.changes:
        fields.setdefault("instead", "")
        fields["instead"] += _change_text(change) + "; "
    if "instead" in fields:
        fields["instead"] = fields["instead"].removesuffix("; ")
    if fit.problem:
        fields["no dry run"] = fit.problem
    return fields


def hours_text(hours: HoursForecast) -> str:
    """How long a job trains, and by what that is known."""
    source = "stated rates, as no run like it has been there"
    if hours.runs:
        source = f"{hours.runs} earlier runs like it"
    return f"about {hours.likely:.2g}, in 9 of 10 runs {hours.low:.2g} to {hours.high:.2g} (by {source})"


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


def _change_text(change: Change) -> str:
    """What was changed, and what that takes."""
    verdict = "fits" if change.fits else "does not fit"
    needed = format_bytes(change.needed)
    return f"{change.text} {verdict} ({needed})"
