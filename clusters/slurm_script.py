"""The batch script of a submission: a pure function of the job, the site and the submission.

Values stand in the script only where it cannot take them for anything else: options of sbatch have patterns of their
own, paths and variables are quoted once, here.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from clusters.config import SlurmConfig
from runfolder.job import Job

_WARNING_S = 60  # how long before the walltime a job is warned, beside the grace that it asks for


@dataclass(frozen=True)
class BatchJob:
    """What a script is for: a submission by name, its run folder, and what it takes along."""

    name: str
    run_dir: str
    log: str
    job: Job
    environment: Mapping[str, str]


def batch_script(batch: BatchJob, config: SlurmConfig, python: str) -> str:
    """The whole text that sbatch gets."""
    lines = ["#!/bin/bash"]
    for option, value in _options(batch, config).items():
        lines.append(f"#SBATCH --{option}={value}")
    lines += ["#SBATCH --requeue", "#SBATCH --no-kill", "set -u", *config.setup]
    for name, value in batch.environment.items():
        lines.append(f"export {name}={shlex.quote(value)}")
    lines.append(f"exec {shlex.join(allocation_command(python, batch.run_dir, batch.name))}")
    return "\n".join(lines) + "\n"


def allocation_command(python: str, run_dir: str, name: str) -> list[str]:
    """What runs on the first node of the allocation."""
    return [python, "-P", "-m", "clusters.allocation", run_dir, name]


def _options(batch: BatchJob, config: SlurmConfig) -> dict[str, str]:
    """The options of sbatch, in the order in which they are printed."""
    resources = batch.job.resources
    workers = resources.gpus_per_node or resources.workers_per_node or 1
    grace_s = resources.grace + _WARNING_S
    options = {
        "job-name": batch.name,
        "comment": f"fleetune:{batch.name}",
        "nodes": str(resources.nodes),
        "ntasks-per-node": "1",
        "cpus-per-task": str(workers * config.cpus_per_worker),
        "output": batch.log,
        "open-mode": "append",
        "export": "NONE",
        "signal": f"B:USR1@{grace_s}",
    }
    if resources.gpus_per_node:
        kind = f"{config.gpu_type}:" if config.gpu_type else ""
        options["gres"] = f"gpu:{kind}{workers}"
    walltime = _walltime(batch.job, config)
    chosen = {
        "time": walltime,
        "mem": _node_memory(config, workers),
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "constraint": config.constraint,
        "reservation": config.reservation,
    }
    for option, value in chosen.items():
        if value is not None:
            options[option] = shlex.quote(value)
    return options


def _walltime(job: Job, config: SlurmConfig) -> str | None:
    """--time in minutes, rounded up: what the job says, else the site's."""
    if job.resources.walltime is None:
        return config.walltime
    minutes = -(-job.resources.walltime // 60)
    return str(minutes)


def _node_memory(config: SlurmConfig, workers: int) -> str | None:
    """--mem of a node, in GiB: for all of its workers."""
    if config.memory_per_worker is None:
        return None
    return f"{config.memory_per_worker * workers}G"
