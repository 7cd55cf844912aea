"""The batch script of a submission: a pure function of the job, the site and the submission.

Values stand in the script only where it cannot take them for anything else: options of sbatch have patterns of their
own, paths and variables are quoted once, here.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field

from clusters.config import ClusterConfig
from clusters.container import Container
from clusters.slurm_walltime import Walltime, walltime_option, warning_s
from runfolder.evaluation_job import AnyJob
from runfolder.resources import as_mapping

_OPTION = re.compile(r"[A-Za-z0-9_][\w.,:@%+&|*()\[\]-]{0,255}")


def _sbatch_value(value: str | None) -> str | None:
    if value is not None and not _OPTION.fullmatch(value):
        raise ValueError(
            "allowed: at most 256 letters, digits and _ . , : @ % + & | * ( ) [ ] -, not beginning with -"
        )
    return value


SbatchOption = Annotated[str | None, AfterValidator(_sbatch_value)]


class SlurmConfig(ClusterConfig):
    """A SLURM site: options of sbatch for every job there, what a worker gets, and perhaps an image."""

    model_config = ConfigDict(coerce_numbers_to_str=True)  # an account may be a number

    kind: Literal["slurm"]
    partition: SbatchOption = Field(None, description="--partition of sbatch; null: the site's default")
    account: SbatchOption = Field(None, description="--account of sbatch; null: the site's default")
    qos: SbatchOption = Field(None, description="--qos of sbatch; null: the site's default")
    constraint: SbatchOption = Field(None, description="--constraint of sbatch; null: none")
    reservation: SbatchOption = Field(None, description="--reservation of sbatch; null: none")
    gpu_type: SbatchOption = Field(None, description="the type in --gres=gpu:TYPE:COUNT; null: any GPU")
    cpus_per_worker: int = Field(4, ge=1, description="cores for each worker")
    memory_per_worker: int | None = Field(None, ge=1, description="GiB for each worker; null: the site's default")
    walltime: Walltime = Field(None, description="--time of jobs that say none; null: the site's default")
    container: Annotated[Container | None, as_mapping("image")] = Field(
        None, description="the image that has the packages of runs; null: `python` has them"
    )

    @property
    def trains_with_python(self) -> bool:
        """Whether runs need packages outside of a container."""
        return self.container is None


@dataclass(frozen=True)
class BatchJob:
    """What a script is for: a submission by name, its run folder, and what it takes along.

    `python_of_runs` is the command of the Python that has Ray and trains; empty: the one that runs the script.
    """

    name: str
    run_dir: str
    log: str
    job: AnyJob
    environment: Mapping[str, str]
    python_of_runs: Sequence[str] = ()


def batch_script(batch: BatchJob, config: SlurmConfig, python: str) -> str:
    """The whole text that sbatch gets."""
    lines = ["#!/bin/bash"]
    for option, value in _options(batch, config).items():
        lines.append(f"#SBATCH --{option}={value}")
    lines.append("#SBATCH --requeue")
    if batch.job.resources.is_elastic:
        lines.append("#SBATCH --no-kill")
    lines.append("trap '' USR1")  # until Python listens: a warning would end the job
    lines += config.setup
    for name, value in batch.environment.items():
        lines.append(f"export {name}={shlex.quote(value)}")
    lines.append(f"exec {shlex.join(allocation_command(python, batch))}")
    return "\n".join(lines) + "\n"


def allocation_command(python: str, batch: BatchJob) -> list[str]:
    """What runs on the first node of the allocation."""
    command = [python, "-P", "-m", "clusters.allocation"]
    command += [batch.run_dir, batch.name]
    command += batch.python_of_runs
    return command


def _options(batch: BatchJob, config: SlurmConfig) -> dict[str, str]:
    """The options of sbatch, in the order in which they are printed."""
    resources = batch.job.resources
    workers = resources.workers_on_node
    options = {
        "job-name": batch.name,
        "comment": f"fleetune:{batch.name}",
        "nodes": str(resources.nodes),
        "cpus-per-task": str(workers * config.cpus_per_worker),
        "output": batch.log,
        "open-mode": "append",
        "export": "NONE",
        "signal": f"B:USR1@{warning_s(batch.job)}",
    }
    if not resources.is_elastic:  # with it, SLURM gives the fewest of a range
        options["ntasks-per-node"] = "1"
    if resources.gpus_per_node:
        kind = f"{config.gpu_type}:" if config.gpu_type else ""
        options["gres"] = f"gpu:{kind}{workers}"
    chosen = {
        "time": walltime_option(batch.job, config.walltime),
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


def _node_memory(config: SlurmConfig, workers: int) -> str | None:
    """--mem of a node, in GiB: for all of its workers."""
    if config.memory_per_worker is None:
        return None
    return f"{config.memory_per_worker * workers}G"
