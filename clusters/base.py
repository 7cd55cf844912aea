"""What a cluster is: a place that turns requests into running controllers, and says what became of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from runfolder.job import Job

State = Literal["queued", "starting", "running", "ended", "unknown"]

# What a run takes along from the environment that it is submitted in.
CARRIED = ("FLEETUNE_", "HF_", "HUGGING_FACE_", "MLFLOW_", "NCCL_")


def carried(environment: Mapping[str, str]) -> dict[str, str]:
    """What a run takes along of an environment."""
    return {name: value for name, value in environment.items() if name.startswith(CARRIED)}


def not_carried(environment: Mapping[str, str]) -> dict[str, str]:
    """What a process that serves many runs keeps of the environment that it was started in: nothing of one run."""
    return {name: value for name, value in environment.items() if not name.startswith(CARRIED)}


class Unreachable(RuntimeError):
    """The cluster cannot be reached, or is not there; repeating the command later is safe."""


class Refused(ValueError):
    """A request that this cluster can never serve: one line with field, what was found, what is allowed."""


@dataclass(frozen=True)
class Request:
    """What is submitted, whole: `text` is what a dry run prints."""

    run_id: str
    attempt: int
    run_dir: Path
    workers: int
    text: str

    @property
    def name(self) -> str:
        """The name that makes a submission unique: `<run_id>-a<attempt>`."""
        return f"{self.run_id}-a{self.attempt}"


@dataclass(frozen=True)
class Status:
    """How the cluster sees a run: facts about processes alone; how a run ended is told by its folder.

    `stuck`: the cluster tries again and again, but somebody has to mend what `reason` says.
    """

    state: State
    reason: str = ""
    stuck: bool = False


@dataclass(frozen=True)
class Logs:
    """What was appended from an offset on, and the offset to go on from."""

    text: str
    offset: int


@dataclass(frozen=True)
class Capacity:
    """Workers that fit at once, and how many of them are free now."""

    kind: Literal["gpu", "cpu"]
    total: int
    free: int


class Cluster(Protocol):
    """A backend. Every method but `request` may raise Unreachable."""

    def request(self, job: Job, run_id: str, attempt: int = 1) -> Request:
        """What would be submitted, without any effect; raises Refused."""
        ...

    def submit(self, request: Request) -> None:
        """Hand a request over, once however often it is repeated. The run folder exists already."""
        ...

    def status(self, run_ids: Iterable[str]) -> dict[str, Status]:
        """The state of each run, by one look for all of them."""
        ...

    def logs(self, run_id: str, offset: int = 0) -> Logs:
        """What the run's controller printed before it had an attempt to write to."""
        ...

    def cancel(self, run_id: str) -> None:
        """Bring the cancellation that was requested in the run folder to somebody who closes the run."""
        ...

    def capacity(self) -> Capacity:
        """What the cluster has for workers."""
        ...
