"""Methods that a job could take: each planned on the same base, rows and hardware, or left out, with the reason."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from methods.options import KINDS
from orchestrator.advice.evidence import TOKENS_FOR_FULL, Situation
from orchestrator.comparison.measure import format_bytes
from orchestrator.errors import InputError
from orchestrator.planning.base import misfits
from orchestrator.planning.plan import Plan, Planner
from orchestrator.planning.spec import validate
from runfolder.job import Job
from trainer.dry_run.fit import FITTED_LINE

REFERENCE = "lora"
CandidateProgress = Callable[[str, int, int], None]  # a method, its number, and how many there are
# The order in which methods are worth a place in a race, by what others measured; those that are not here come last.
_ORDER = ("lora", "full", "rslora", "dora", "adalora", "ia3", "vera", "galore", "bottleneck", "relora", "qlora")
_TOO_LITTLE_DATA = f"full is not known to win below {TOKENS_FOR_FULL:,} tokens of text (arXiv 2405.09673)"
_FITS_IN_16_BITS = "lora does without 4 bits here, in which a base is a slightly worse model"


@dataclass(frozen=True)
class MethodCandidate:
    """A method with its options; `reason` is why it is left out, None where it is not."""

    kind: str
    options: dict[str, Any]
    plan: Plan | None
    reason: str | None

    @property
    def is_rough(self) -> bool:
        """Whether its memory is foretold by a fitted line."""
        if self.plan is None or self.plan.fit is None:
            return False
        return self.plan.fit.forecast.source == FITTED_LINE

    def to_json(self) -> dict[str, Any]:
        """The candidate as plain data, for JSON."""
        plain: dict[str, Any] = {
            "method": self.kind,
            "options": self.options,
            "left_out": self.reason,
        }
        if self.plan is None:
            return plain
        figures = foretold(self.plan)
        plain["lr"] = self.plan.lr
        plain["trained"] = figures.trained
        plain["needed_bytes"] = figures.needed
        plain["roughly"] = self.is_rough
        plain["hours"] = figures.hours
        return plain


class ForetoldFigures(NamedTuple):
    """What a plan foretells; None for what is not known."""

    trained: int | None
    needed: int | None
    hours: float | None


def foretold(plan: Plan) -> ForetoldFigures:
    """The figures of a plan that methods are compared by."""
    trained = None
    needed = None
    hours = None
    if plan.sizes is not None:
        trained = plan.sizes.trained
    if plan.fit is not None:
        needed = plan.fit.needed
    fits = plan.fit is None or plan.fit.fits is not False
    if plan.hours is not None and fits:
        hours = plan.hours.likely
    return ForetoldFigures(trained, needed, hours)


def candidates(planner: Planner, job: Job, begun: CandidateProgress) -> list[MethodCandidate]:
    """All methods, those that are worth a place in a race first; `begun` is called before each is planned."""
    found = []
    for number, kind in enumerate(sorted(KINDS, key=_preference), 1):
        begun(kind, number, len(KINDS))
        candidate = _planned_candidate(planner, job, kind)
        found.append(candidate)
    return _by_evidence(found, job, planner)


def situation_of(planner: Planner, job: Job, found: Iterable[MethodCandidate]) -> Situation:
    """What rules depend on, as far as it is known."""
    findings = planner.findings
    by_kind = {candidate.kind: candidate for candidate in found}
    rates = {}
    for kind, candidate in by_kind.items():
        options = KINDS[kind].model_validate(candidate.options)
        rates[kind] = options.rate(findings.model.hidden_size)
    train = findings.train
    sequences = None
    if train and train.count and train.tokens:
        mean_tokens = train.tokens / train.count
        sequences = job.train.batch_tokens / mean_tokens
    eval_rows = None
    if findings.eval is not None:
        eval_rows = findings.eval.count
    parameters = None
    plan = by_kind[REFERENCE].plan
    if plan is not None and plan.sizes is not None:
        parameters = plan.sizes.parameters
    return Situation(
        rates=rates,
        parameters=parameters,
        tokens=_tokens_of_text(job, planner),
        sequences=sequences,
        eval_rows=eval_rows,
        lora_fits=_fits(by_kind[REFERENCE]),
        lora_change=_change_of(by_kind[REFERENCE]),
        qlora_fits=_fits(by_kind["qlora"]),
        full_fits=_fits(by_kind["full"]),
    )


def _fits(candidate: MethodCandidate) -> bool | None:
    """Whether a worker fits with a method, as the job is or changed in other settings; None where nobody knows."""
    plan = candidate.plan
    if plan is None or plan.fit is None or plan.fit.fits is None:
        return None
    return plan.fit.keeps_method


def _change_of(candidate: MethodCandidate) -> str | None:
    """The change of other settings with which a worker fits, in words; None where none is needed or known."""
    if not _fits(candidate) or candidate.plan is None or candidate.plan.fit is None:
        return None
    change = candidate.plan.fit.advised
    if change is None:
        return None
    return change.text


def _planned_candidate(planner: Planner, job: Job, kind: str) -> MethodCandidate:
    """A method with its default options, or those of the job where it is the job's, and its plan."""
    options: dict[str, Any] = {"kind": kind}
    if job.method.kind == kind:
        options = job.method.model_dump(mode="json", exclude_unset=True) | options
    plain = job.dump()
    plain["method"] = options
    plain["train"]["lr"] = None
    plain["output"]["merge"] = False
    try:
        changed = validate(plain)
    except InputError as error:
        return MethodCandidate(kind, options, None, str(error))
    problems = misfits(changed, planner.findings.model)
    if problems:
        return MethodCandidate(kind, options, None, "; ".join(problems))
    plan = planner.plan(changed)
    return MethodCandidate(kind, options, plan, _why_it_does_not_fit(plan))


def _why_it_does_not_fit(plan: Plan) -> str | None:
    """How much more memory a worker takes than it has, and the change with which it fits; None where it fits."""
    fit = plan.fit
    if fit is None or fit.device is None:
        return None
    if fit.fits:
        return None
    device = format_bytes(fit.device)
    if fit.own_change is None:
        return f"too large for {device}"
    needed = format_bytes(fit.own_change.needed)
    return f"too large for {device}; {fit.own_change.text} takes {needed}"


def _by_evidence(found: Iterable[MethodCandidate], job: Job, planner: Planner) -> list[MethodCandidate]:
    """The candidates, of which those are left out that evidence speaks against here."""
    by_kind = {candidate.kind: candidate for candidate in found}
    against = {}
    tokens = _tokens_of_text(job, planner)
    if tokens is not None and tokens < TOKENS_FOR_FULL:
        against["full"] = _TOO_LITTLE_DATA
    if _fits(by_kind[REFERENCE]) is not False:
        against["qlora"] = _FITS_IN_16_BITS
    judged = []
    for kind, candidate in by_kind.items():
        if candidate.reason is None:
            reason = against.get(kind)
            candidate = replace(candidate, reason=reason)
        judged.append(candidate)
    return judged


def _tokens_of_text(job: Job, planner: Planner) -> int | None:
    """The tokens of different text that a training sees, however often; None where that is not known from here."""
    of_steps = None
    if job.train.steps is not None:
        of_steps = job.train.steps * job.train.batch_tokens
    train = planner.findings.train
    if train is None:
        return of_steps
    if of_steps is None:
        return round(min(1.0, job.train.epochs or 1.0) * train.tokens)
    return min(of_steps, train.tokens)


def _preference(kind: str) -> tuple[int, str]:
    """What methods are sorted by."""
    if kind in _ORDER:
        return _ORDER.index(kind), kind
    return len(_ORDER), kind
