"""Whether SLURM takes what the clusters file says of a site, asked on its login node. It needs Python alone."""

import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clusters.checks import DEVICES, Check
from clusters.container_checkup import command_in
from clusters.probe import Probe, probe
from clusters.slurm_environment import slurm_environment

_SLURM_S = 30.0
_FREE_S = 60  # for so long a test job waits for a free node
_JOB_S = 240.0  # until it has ended
_REFUSAL_LINES = 3  # of a refusal: a site's own words come before SLURM's
_LOAD = "load it in `setup` of the cluster, like `module load slurm`, or name a login node in `link`"
_UNSEEN = "no-run-root"  # what the test job prints where its node does not have that
_CHANGE = "change it in the clusters file"
# Keys of the cluster, and the options of sbatch and srun that they are.
_OPTIONS = {
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "reservation": "reservation",
    "walltime": "time",
}


def check_slurm(config: dict[str, Any]) -> Iterator[Check]:
    """SLURM's version, the partition, and whether a job with the cluster's options would be taken."""
    said = _said_by_slurm(["sinfo", "--version"], _SLURM_S)
    if said.problem:
        yield Check("slurm", "fail", said.problem, _LOAD)
        return
    yield Check("slurm", "ok", said.output.strip())
    found = _said_by_slurm(["sinfo", "--noheader", "--format=%P|%a"], _SLURM_S)
    if found.problem:
        yield Check("partition", "fail", found.problem, "ask again; if it stays, tell the site's administrators")
        return
    rows = [line.strip().split("|") for line in found.output.splitlines() if line.count("|") == 1]
    partition = _partition_check(config["partition"], rows)
    yield partition
    if partition.level != "fail":
        yield _options_check(config)


def run_test_job(config: dict[str, Any], root: Path) -> Check:
    """What torch sees in a job of one minute, behind the site's setup lines, where the node has the run root."""
    options = [*_job_options({**config, "walltime": "1"}), "--ntasks=1", f"--immediate={_FREE_S}"]
    gres = _said_by_slurm(["sinfo", "--noheader", "--format=%G", *_partition_option(config)], _SLURM_S).output
    has_gpus = "gpu" in gres
    if has_gpus:
        kind = f"{config['gpu_type']}:" if config["gpu_type"] else ""
        options.append(f"--gres=gpu:{kind}1")
    container = config["container"]
    python = command_in(container, has_gpus) if container else [sys.executable]
    program = shlex.join([*python, "-P", "-c", DEVICES])
    said = _said_in_job(options, [*config["setup"], f"exec {program}"], root)
    if said.problem:
        return Check("test job", "fail", said.problem, "where no node was free, try again later")
    if said.output.strip() == _UNSEEN:
        mend = "name a `root` that nodes and login nodes share"
        return Check("test job", "fail", f"its node does not have what is in {root} here", mend)
    devices = said.output.strip().rpartition("\n")[2]
    if has_gpus and devices == "CPU only":
        return Check("test job", "fail", "torch sees no GPU in a job that has one", "look at nvidia-smi on that node")
    return Check("test job", "ok", devices)


def _partition_check(named: str | None, rows: list[list[str]]) -> Check:
    """Whether the partition is there and up; rows are [name, up or down], the default with a `*`."""
    states = {name.rstrip("*"): availability for name, availability in rows}
    defaults = [name.rstrip("*") for name, _ in rows if name.endswith("*")]
    there_are = ", ".join(states)
    if named is None and not defaults:
        return Check("partition", "fail", f"none is the default; there are: {there_are}", "say `partition`")
    chosen = named or defaults[0]
    of_chosen = []  # a job may name several, and starts in the first that has nodes
    for name in chosen.split(","):
        if name not in states:
            return Check("partition", "fail", f"no {name!r}; there are: {there_are}", _CHANGE)
        of_chosen.append(states[name])
    if "up" not in of_chosen:
        return Check("partition", "warn", f"{chosen} is {of_chosen[0]}", "wait, or name another one")
    return Check("partition", "ok", chosen)


def _said_by_slurm(command: list[str], timeout_s: float, error_lines: int = 1) -> Probe:
    """What a command of SLURM says, whatever the shell has for its options."""
    return probe(command, timeout_s, slurm_environment(), error_lines)


def _said_in_job(options: list[str], lines: list[str], root: Path) -> Probe:
    """What lines of bash print in a job whose node has the run root of this machine, else `_UNSEEN`."""
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(prefix=".seen-by-nodes-", dir=root) as marker:
            first = f"[ -e {shlex.quote(marker.name)} ] || {{ echo {_UNSEEN}; exit 0; }}"
            script = "\n".join([first, *lines])
            return _said_by_slurm(["srun", *options, "bash", "-c", script], _JOB_S)
    except OSError as error:
        return Probe("", f"{root}: {error.strerror}")


def _options_check(config: dict[str, Any]) -> Check:
    """Whether SLURM would take a job with the cluster's account, quality of service and the like; none is queued."""
    options = _job_options(config)
    if config["gpu_type"]:
        options.append(f"--gres=gpu:{config['gpu_type']}:1")
    options.append(f"--cpus-per-task={config['cpus_per_worker']}")
    if config["memory_per_worker"]:
        options.append(f"--mem={config['memory_per_worker']}G")
    said = _said_by_slurm(["sbatch", "--test-only", *options, "--wrap=true"], _SLURM_S, _REFUSAL_LINES)
    shown = " ".join(options) or "none"
    if said.problem:
        mend = f"{_CHANGE} (you may use: sacctmgr show associations user=$USER), or wait if nodes are down: sinfo"
        return Check("options", "fail", f"{shown}: {said.problem}", mend)
    return Check("options", "ok", shown)


def _job_options(config: dict[str, Any]) -> list[str]:
    """The options of a job that the clusters file has."""
    options = []
    for key, option in _OPTIONS.items():
        if config[key] is not None:
            options.append(f"--{option}={config[key]}")
    return options


def _partition_option(config: dict[str, Any]) -> list[str]:
    partition = config["partition"]
    if not partition:
        return []
    return [f"--partition={partition}"]
