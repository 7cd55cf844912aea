"""What to do after advice: the command that goes on from it, or what the job lacks for that."""

from pathlib import Path

from orchestrator.advice.advise import Advice
from orchestrator.advice.race import budget_range, gpu_hours_of_step
from orchestrator.comparison.measure import format_bytes, format_hours
from orchestrator.errors import InputError


def what_next(advice: Advice, job_file: Path) -> str:
    """One sentence for whoever has read the advice about the job in a file."""
    racing = advice.racing
    first, *_ = advice.candidates
    if first.reason is not None or not racing:
        change = _first_change(advice)
        if change is not None:
            return change
    if not racing:
        return "no method fits: take a smaller base, or GPUs with more memory, or more of them"
    if len(racing) == 1:
        kind = racing[0].kind
        setting = "" if kind == advice.job.method.kind else f" --set method={kind}"
        return f"{kind} is what is left: fleetune submit {job_file}{setting}"
    try:
        least, most = budget_range(advice.job, racing, job_file)
    except InputError as error:
        return f"a race on your own rows decides (--budget), and the job lacks for one: {error}"
    names = ", ".join(candidate.kind for candidate in racing)
    command = f"fleetune advise {job_file} --budget {most}steps"
    cost = _cost_of_steps(advice, most)
    return f"{command} races {names} on your own rows{cost}; with less, from {least:,} steps on, fewer of them"


def _first_change(advice: Advice) -> str | None:
    """The change with which the first of the methods fits that fits with one; None where none does."""
    for candidate in advice.candidates:
        if candidate.plan is None or candidate.plan.fit is None:
            continue
        change = candidate.plan.fit.own_change
        if change is not None:
            needed = format_bytes(change.needed)
            return f"{change.text} in the job, with which {candidate.kind} takes {needed}; then ask again"
    return None


def _cost_of_steps(advice: Advice, steps: int) -> str:
    """What so many steps take of the GPUs with the slowest method, in words; nothing where that is not known."""
    slowest = 0.0
    for candidate in advice.racing:
        of_step = gpu_hours_of_step(candidate, advice.job)
        if of_step is None:
            return ""
        slowest = max(slowest, of_step)
    return f", in at most {format_hours(steps * slowest)} of GPUs"
