"""What is evaluated: the outputs of runs, wherever they ran, and folders of adapters."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.control import fetch
from orchestrator.errors import InputError
from orchestrator.runs import Handle, find, name_of
from runfolder.digests import is_same_base
from runfolder.files import Record
from runfolder.folders import home
from runfolder.mirror import Mirror
from runfolder.record import read_record
from runfolder.site import LocalSite

CONFIGS = ("adapter_config.json", "bottleneck_config.json")
_OUTPUT = "output"
PlainBase = dict[str, Any]  # the base of a job, as its record has it


@dataclass(frozen=True)
class AdapterSource:
    """An adapter: what it is called, its folder, and of the run that left it the id, the folder and the base.

    The folder is one of this machine, unless it `is_there`: on the cluster that evaluates it.
    """

    label: str
    folder: Path
    run_id: str | None = None
    run_dir: Path | None = None
    base: PlainBase | None = None
    is_there: bool = False


def resolve_adapters(
    references: Sequence[str], cluster: str | None = None, evaluated_on: str | None = None
) -> list[AdapterSource]:
    """The adapters that runs and folders stand for; raises InputError with a line for each that has none.

    `cluster` is the one that has the runs. What runs of the cluster `evaluated_on` left stays there.
    """
    found: list[AdapterSource] = []
    problems: list[str] = []
    for reference in references:
        try:
            adapter = _adapter(reference, cluster, evaluated_on)
        except InputError as error:
            problems.append(str(error))
        else:
            found.append(adapter)
    if problems:
        raise InputError("\n".join(problems))
    return _with_labels(found)


def base_of(adapters: Sequence[AdapterSource]) -> PlainBase:
    """The base that all runs of these adapters were trained on; raises InputError where that is not one."""
    bases: list[PlainBase] = []
    for adapter in adapters:
        if adapter.base is not None and adapter.base not in bases:
            bases.append(adapter.base)
    if not bases:
        raise InputError("--base: missing; no run says which it is")
    if len(bases) == 1:
        return bases[0]
    models = [base["model"] for base in bases]
    names = ", ".join(models)
    raise InputError(f"--base: missing; found runs on several bases ({names}); allowed: one for all adapters")


def trained_elsewhere(adapters: Sequence[AdapterSource], base: str) -> list[str]:
    """Of each adapter of a run on another base than this one, that it is so: what it changes is not there."""
    texts = []
    for adapter in adapters:
        if adapter.base is None or not _has_adapter(adapter.folder):
            continue
        trained_on = adapter.base["model"]
        if not is_same_base(trained_on, base):
            texts.append(f"{adapter.label} was trained on {trained_on}, and is evaluated on {base}")
    return texts


def _adapter(reference: str, cluster: str | None, evaluated_on: str | None) -> AdapterSource:
    """The adapter of a folder, of a run's folder, or of a run."""
    path = Path(reference)
    if cluster is None and path.is_dir():
        return _in_folder(path.resolve())
    if evaluated_on is None:
        return _of_run(find(reference, cluster))
    try:
        run = find(reference)
    except InputError:  # one that this machine does not know
        run = find(reference, evaluated_on)
    return _of_run(run, evaluated_on)


def _in_folder(path: Path) -> AdapterSource:
    """The adapter in a folder, or in `output` of a run's folder or of what was fetched of one."""
    folder = path
    if not _has_adapter(path) and (path / _OUTPUT).is_dir():
        folder = path / _OUTPUT
    _require_adapter(folder)
    run_dir = folder.parent
    if folder.name != _OUTPUT or not (run_dir / "job.yaml").exists():
        return AdapterSource(folder.name, folder)
    record = read_record(run_dir)
    run_id = record.get("run_id") or run_dir.name
    base = _base_in(record)
    if (run_dir / "run.json").exists():
        return AdapterSource(run_id, folder, run_id, run_dir, base)
    return AdapterSource(run_id, folder, run_id, None, base)


def _of_run(run: Handle, evaluated_on: str | None = None) -> AdapterSource:
    """The output of a run, brought here where it is on another machine, unless it is evaluated there."""
    snapshot = run.snapshot()
    run_id = run.run_id
    if snapshot.damaged is not None:
        raise InputError(f"run {run_id}: {snapshot.damaged}")
    if not snapshot.has_output:
        raise InputError(f"run {run_id}: found no output; allowed: a run that has succeeded")
    site = run.site
    record = site.record(run_id)
    if isinstance(site, LocalSite):
        run_dir = site.root / run_id
        whole = run_dir
    else:
        mirror = Mirror.of_cluster(run.cluster_name)
        run_dir = mirror.run_dir(run_id)
        if run.cluster_name == evaluated_on:
            there = Path(snapshot.run_dir) / _OUTPUT
            return AdapterSource(run_id, there, run_id, run_dir, _base_in(record), is_there=True)
        to = home() / "fetched" / run_id
        whole = fetch(run_id, to, run.cluster_name)
    folder = whole / _OUTPUT
    _require_adapter(folder)
    base = _base_in(record)
    return AdapterSource(run_id, folder, run_id, run_dir, base)


def _require_adapter(folder: Path) -> None:
    """Raise InputError where a folder has no adapter, and no model of which the engine makes one."""
    if _has_adapter(folder) or (folder / "config.json").exists():
        return
    known = " or ".join(CONFIGS)
    raise InputError(f"{folder}: found no {known}; allowed: the output of a run, or a folder that PEFT has saved")


def _has_adapter(folder: Path) -> bool:
    """Whether a folder has the config of an adapter."""
    paths = []
    for name in CONFIGS:
        paths.append(folder / name)
    return any(path.exists() for path in paths)


def _base_in(record: Record) -> PlainBase:
    """The base of a run as this machine knows it: as it was before it was sent to a cluster."""
    base: PlainBase = dict(record["job"]["base"])
    before = (record.get("sent") or {}).get("base.model")
    if before and not Path(base["model"]).exists():
        base["model"] = before
    return base


def _with_labels(adapters: Sequence[AdapterSource]) -> list[AdapterSource]:
    """The adapters under names that differ: a job's name where one run has it, else the run id; folders by theirs."""
    names = list(map(_short_name, adapters))
    counts = Counter(names)
    taken: Counter[str] = Counter()
    labelled: list[AdapterSource] = []
    for adapter, name in zip(adapters, names, strict=True):
        label = adapter.label
        if counts[name] == 1:
            label = name
        taken[label] += 1
        times = taken[label]
        if times > 1:
            label = f"{label} ({times})"
        with_label = replace(adapter, label=label)
        labelled.append(with_label)
    return labelled


def _short_name(adapter: AdapterSource) -> str:
    """The name of the job of an adapter; without a run, of its folder."""
    if adapter.run_id is None:
        return adapter.label
    return name_of(adapter.run_id)
