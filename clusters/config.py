"""What the clusters file says of a cluster. Unknown keys are errors, as in a job."""

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from clusters.environment import can_be_variable

_DESTINATION = re.compile(r"[A-Za-z0-9_][\w.@:%+\[\]-]*")
_OPTION = r"[A-Za-z0-9_][\w.,:@%+&|*()\[\]-]*"
Option = Annotated[str | None, Field(max_length=256, pattern=f"^{_OPTION}$")]


class _ConfigSection(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SshLink(_ConfigSection):
    """An OpenSSH destination, like `me@login.example.org` or a host of ~/.ssh/config."""

    ssh: str = Field(min_length=1, max_length=255, description="user@host, or a host alias of ~/.ssh/config")

    @field_validator("ssh")
    @classmethod
    def _is_destination(cls, destination: str) -> str:
        if not _DESTINATION.fullmatch(destination):
            raise ValueError("must be user@host or a host alias: letters, digits and . _ - @ : only")
        return destination


class _ClusterConfig(_ConfigSection):
    """What clusters of all kinds have."""

    link: Literal["local"] | SshLink = Field("local", description="local, or {ssh: user@host} for another machine")
    root: str | None = Field(
        None, min_length=1, description="the FLEETUNE_HOME there, for runs and code; null: ~/.fleetune of that user"
    )
    python: str = Field(
        "python3", min_length=1, description="the Python there that has Fleetune's packages, 3.11 or newer"
    )
    setup: tuple[str, ...] = Field((), description="shell lines before Python starts, like `module load python/3.12`")
    env: dict[str, str] = Field({}, description="variables for every run there; those of the job come before them")

    @field_validator("env")
    @classmethod
    def _are_variables(cls, env: dict[str, str]) -> dict[str, str]:
        for name, value in env.items():
            if not can_be_variable(name, value):
                raise ValueError(f"{name!r} is no variable that a process can have")
        return env


class LocalConfig(_ClusterConfig):
    """A machine with a queue of its own, which Fleetune keeps: this one, or another one over a link."""

    kind: Literal["local"]


class SlurmConfig(_ClusterConfig):
    """A SLURM site. Each field is the option of sbatch that has its name."""

    kind: Literal["slurm"]
    partition: Option = None
    account: Option = None
    qos: Option = None
    constraint: Option = None
    reservation: Option = None
    gpu_type: Option = Field(None, description="the type in --gres=gpu:TYPE:COUNT; null: any GPU")
    cpus_per_worker: int = Field(4, ge=1, description="cores for each worker")
    memory_per_worker: int | None = Field(None, ge=1, description="GiB for each worker; null: the site's default")
    walltime: Option = Field(None, description="--time of jobs that say none; null: the site's default")


ClusterConfig = LocalConfig | SlurmConfig
CLUSTER_KINDS: dict[str, type[LocalConfig] | type[SlurmConfig]] = {"local": LocalConfig, "slurm": SlurmConfig}
