"""What a job would run: layout, batches, parameters, memory, and what is submitted, before anything is started."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any, NamedTuple

from orchestrator.planning.device import device_said
from orchestrator.planning.earlier import PastRatios, correction_of
from orchestrator.planning.freeze import JobSource, read_job
from orchestrator.planning.generations import Generations, generations
from orchestrator.planning.hours import HoursForecast, hours
from orchestrator.planning.memory import MemoryFit, fit
from orchestrator.planning.place import PlannedPlace, planned_place
from orchestrator.planning.preflight import Findings, check_job, has_gpus
from orchestrator.planning.sizes import Sizes, planned_kernels, planned_precision, sizes
from orchestrator.planning.survey import SourceProgress, SourceRows
from runfolder.job import Job
from trainer.data.survey import Sample
from trainer.dry_run.fit import changed_job
from trainer.dry_run.process import DryRunFailed, DryRunProcess, can_dry_run

_Foretold = tuple[MemoryFit | None, tuple[str, ...]]  # and what should be known of it


@dataclass(frozen=True)
class Plan:
    """What would run. Sizes are None for a base whose shapes cannot be known from here.

    `fit` and hours are None where workers have no GPU, and hours where nobody knows what it can do. `request` is
    the text that a named cluster would be given; another run id stands in it at every call.
    """

    name: str
    base: str
    method: str
    objective: str
    needs: str  # what the objective takes beside a forward and a backward pass over its rows
    workers: int
    zero: int
    sequence: int
    precision: str
    kernels: str
    lr: float  # at its peak
    lr_source: str  # where it comes from, in words
    rows: int | None
    eval_rows: int | None
    batch_tokens: int
    micro_batches: int  # forward passes per worker and step, when every batch is full
    steps: int | None
    steps_estimated: bool
    epochs: float | None  # how often it sees each row, as far as that is known
    sizes: Sizes | None
    has_gpus: bool  # whether each worker has one
    fit: MemoryFit | None
    hours: HoursForecast | None
    hours_changed: HoursForecast | None  # with the change of the job that fits, where it does not;
    host_changed: int  # then also bytes of the host for the moments of a worker
    generations: Generations | None  # what it writes itself, where it learns from that
    request: str | None
    warnings: tuple[str, ...]

    def dump(self) -> dict[str, Any]:
        """The plan as plain data, for JSON."""
        plain = asdict(self)
        if self.fit is not None:
            plain["fit"] = self.fit.dump()
        return plain


def plan(
    source: JobSource,
    overrides: Iterable[str] = (),
    progress: SourceProgress = lambda _source, _rows: None,
    cluster: str | None = None,
    gpu: str | None = None,
) -> Plan:
    """The plan of a job; raises InputError when it could not run.

    `progress` is called with a data source and the number of its rows that are looked at. `gpu`: the GPUs, where they
    are not those of the cluster or of this machine, by their GiB, their name or both: 80, H100, A100:80.
    """
    job, _ = read_job(source, overrides)
    with DryRunProcess() as process:
        planner = planner_of(job, process, progress, cluster, gpu)
        return planner.plan(job)


def planner_of(
    job: Job, process: DryRunProcess, progress: SourceProgress, cluster: str | None, gpu: str | None
) -> "Planner":
    """Look at the base and the rows of a job, and at the place where it would run; raises InputError.

    The process, which will make the planner's dry runs, starts meanwhile.
    """
    place = planned_place(job, cluster, device_said(gpu))
    kind = place.capacity.kind
    if has_gpus(job, kind) and can_dry_run():
        process.start()
    findings = check_job(job, progress, place.capacity, place.is_here, by_config=True)
    return Planner(findings, place, kind, process)


class Planner(NamedTuple):
    """What is known of a base, of rows and of a place: enough for the plans of jobs that differ in their method."""

    findings: Findings
    place: PlannedPlace
    kind: str  # of the devices
    process: DryRunProcess
    roughly: bool = False  # whether memory is foretold without a dry run where there is no doubt

    def plan(self, job: Job) -> Plan:
        """The plan of a job on this base and these rows."""
        findings = self.findings
        place = self.place
        kind = self.kind
        hidden_size = findings.model.hidden_size
        memory_fit, unforeseen = self._memory_fit(job)
        of_job = sizes(job, findings.model, kind)
        unforeseen += _host_warnings(job, of_job, place.host)
        written = self._written(job, of_job)
        hours_changed, host_changed = self._changed(job, memory_fit)
        return Plan(
            name=job.name,
            base=job.base.model,
            method=job.method.kind,
            objective=job.objective.kind,
            needs=job.objective.needs,
            workers=job.resources.world_size,
            zero=job.sharding.zero,
            sequence=job.sharding.sequence,
            precision=planned_precision(job, kind),
            kernels=planned_kernels(job, kind),
            lr=job.at_width(hidden_size).lr,
            lr_source=_rate_source(job, hidden_size),
            rows=_count(findings.train),
            eval_rows=_count(findings.eval),
            batch_tokens=job.train.batch_tokens,
            micro_batches=_micro_batches(job),
            steps=_steps(job, findings),
            steps_estimated=job.train.steps is None,
            epochs=_epochs(job, findings),
            sizes=of_job,
            has_gpus=has_gpus(job, kind),
            fit=memory_fit,
            hours=self._hours(job, written),
            hours_changed=hours_changed,
            host_changed=host_changed,
            generations=written,
            request=place.request,
            warnings=place.warnings + findings.warnings + unforeseen,
        )

    def _written(self, job: Job, of_job: Sizes | None) -> Generations | None:
        """What a job writes itself."""
        model = self.findings.model
        rows = self.findings.train
        gpu = self.place.device.name
        return generations(job, model, of_job, rows, self.kind, gpu)

    def _hours(self, job: Job, written: Generations | None) -> HoursForecast | None:
        """How long a job trains, where workers have GPUs and its steps and sizes are known."""
        findings = self.findings
        place = self.place
        steps = _steps(job, findings)
        of_model = sizes(job, findings.model, self.kind)
        if steps is None or of_model is None or not has_gpus(job, self.kind):
            return None
        kernels = planned_kernels(job, self.kind)
        found = hours(job, findings.model, of_model, steps, kernels, place.earlier, place.device.name)
        if found is None or written is None:
            return found
        more = written.learned / job.train.batch_tokens
        if not found.runs and written.share is not None:  # earlier runs have counted their rollouts
            more /= 1 - written.share
        return found.times(more)

    def _changed(self, job: Job, memory_fit: MemoryFit | None) -> tuple[HoursForecast | None, int]:
        """How long the job trains with the change that fits, if that is known, and a worker's bytes on its host."""
        if memory_fit is None:
            return None, 0
        change = memory_fit.advised or memory_fit.more_gpus
        if change is None:
            return None, 0
        changed = changed_job(job, change.settings)
        of_job = sizes(changed, self.findings.model, self.kind)
        on_host = of_job.memory.on_host if of_job else 0
        written = self._written(changed, of_job)
        return self._hours(changed, written), on_host

    def _memory_fit(self, job: Job) -> _Foretold:
        """Whether a worker fits on its GPU, where it has one, or a warning that nothing can be said of it."""
        kind = self.kind
        if not has_gpus(job, kind):
            return None, ()

        def kinds(changed: Job) -> tuple[str, bool]:
            precision = planned_precision(changed, kind)
            return precision, planned_kernels(changed, kind) == "fast"

        def corrected(changed: Job) -> PastRatios:
            kernels = planned_kernels(changed, kind)
            return correction_of(changed, kernels, self.place.earlier)

        findings = self.findings
        sample = _rows_for_all(findings.train)
        device = self.place.device.memory
        try:
            found = fit(job, findings.model, sample, kinds, device, self.process, corrected, self.roughly)
        except DryRunFailed as error:
            return None, (f"memory: not foretold: {error}",)
        return found, ()


def _rows_for_all(train: SourceRows | None) -> Sample | None:
    """Examples that stand for all rows of training, where these were looked at."""
    survey = train.survey if train else None
    return survey.sample if survey else None


def _host_warnings(job: Job, of_job: Sizes | None, there: int | None) -> tuple[str, ...]:
    """A warning where workers of a node would want more of its memory than there is."""
    if of_job is None or there is None:
        return ()
    needed = of_job.memory.on_host * job.resources.workers_on_node
    if needed <= there:
        return ()
    wanted = f"{needed / 2**30:.1f} GiB for moments of its workers; found {there / 2**30:.1f} GiB on this machine"
    return (f"sharding.offload: optimizer needs {wanted}",)


def _steps(job: Job, findings: Findings) -> int | None:
    """The steps of a job, which are estimated where it says epochs."""
    given = job.train.steps
    return given or _estimated_steps(job, findings.train)


def _epochs(job: Job, findings: Findings) -> float | None:
    """How often a job sees each of its rows."""
    train = findings.train
    if job.train.epochs is not None:
        return job.train.epochs
    if train is None or not train.tokens or job.train.steps is None:
        return None
    return job.train.steps * job.train.batch_tokens / train.tokens


def _rate_source(job: Job, hidden_size: int | None) -> str:
    """Where a job's learning rate comes from."""
    if job.train.lr is not None:
        return "train.lr"
    source = _default_source(job, hidden_size)
    objective = job.objective
    if objective.rate_factor == 1:
        return source
    return f"{objective.rate_factor:g} times the {source}, for {objective.kind}"


def _default_source(job: Job, hidden_size: int | None) -> str:
    """Of which method and width the default learning rate is."""
    method = job.method
    source = f"default of {method.kind}"
    if method.width_exponent == 0:
        return source
    if hidden_size is None:
        return f"{source}, as the base's width is not known"
    return f"{source} at hidden size {hidden_size}"


def _count(rows: SourceRows | None) -> int | None:
    return rows.count if rows else None


def _micro_batches(job: Job) -> int:
    """Forward passes per worker and step, when every batch is full."""
    sequences = job.data_size * job.train.micro_batch
    tokens_per_pass = sequences * job.data.seq_len
    passes = job.train.batch_tokens / tokens_per_pass
    return ceil(passes)


def _estimated_steps(job: Job, train: SourceRows | None) -> int | None:
    if train is None or job.train.epochs is None:
        return None
    tokens = job.train.epochs * train.tokens
    steps = ceil(tokens / job.train.batch_tokens)
    return max(1, steps)
