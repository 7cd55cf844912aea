"""The Ray side of the controller, a process of its own: `python -m orchestrator.driver RUN_DIR`.

Its standard input carries the number of the attempt, once that is claimed, and says by its end that the controller is
gone. When this process dies, however it dies, Ray ends the workers. What came of them is left in outcome.json.
"""

import os
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from clusters.environment import SECRETS, SETTINGS
from orchestrator.failure import Failure, types_of
from orchestrator.worker import WorkerFailed, redirect, work
from runfolder.chain import Attempt
from runfolder.files import write_json
from runfolder.folders import library_folders
from runfolder.record import load_job

_TEXT = 4000  # characters kept of a failure


def main() -> None:
    """Connect to Ray, wait for the attempt, run it."""
    run_dir = Path(sys.argv[1])
    resources = connect()
    number = os.read(0, 20)
    if not number:
        sys.exit("the controller is gone")
    threading.Thread(target=_die_with_controller, daemon=True).start()
    attempt = Attempt(run_dir, int(number))
    redirect(attempt.folder / "logs" / "controller.log")
    failures = outcome(lambda: fit(attempt, load_job(run_dir).resources.world, resources))
    found = {str(rank): failure.dump() for rank, failure in failures.items()}
    write_json(attempt.folder / "outcome.json", {"failures": found})


def connect() -> dict[str, float]:
    """Join the cluster at RAY_ADDRESS; gives its resources."""
    import ray
    import ray.train.torch  # slow: done while the controller looks for the checkpoint

    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR")
    resources: dict[str, float] = ray.cluster_resources()
    return resources


def outcome(fit_once: Callable[[], None]) -> dict[int, Failure]:
    """What the workers raised, by rank; empty when all went well, rank -1 for what is nobody's."""
    from ray.train import WorkerGroupError

    try:
        fit_once()
    except WorkerGroupError as error:
        return {rank: describe(failure) for rank, failure in error.worker_failures.items()}
    except Exception as error:
        return {-1: describe(error)}
    return {}


def describe(error: BaseException) -> Failure:
    """A failure with what Ray says was its cause."""
    if isinstance(error, WorkerFailed):
        return Failure(error.text[-_TEXT:], error.types)
    own = f"{type(error).__name__}: {error}"
    preempted = getattr(error, "preempted", False)  # of Ray's errors about actors
    cause = getattr(error, "health_check_failure", None) or getattr(error, "controller_failure", None)
    if cause is None:
        return Failure(own[-_TEXT:], types_of(error), preempted)
    behind = describe(cause)
    return Failure(f"{own}\n{behind.text}"[-_TEXT:], types_of(error) + behind.types, preempted or behind.preempted)


def fit(attempt: Attempt, world: int, resources: dict[str, float]) -> None:
    """Start one worker per GPU, or per process where there is none, and wait for their end."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    gpu = resources.get("GPU", 0) > 0
    share = {"GPU": 1.0} if gpu else {"CPU": min(1.0, resources["CPU"] / world)}
    env = load_job(attempt.run_dir).env
    environment = worker_environment(gpu, int(max(1, resources["CPU"] // world)), env)
    storage = attempt.folder / "ray"
    trainer = TorchTrainer(
        lambda: work(str(attempt.run_dir), attempt.number, environment),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=world, use_gpu=gpu, resources_per_worker=share),
        run_config=RunConfig(
            name=f"{attempt.run_dir.name}-a{attempt.number}",
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),
        ),
    )
    trainer.fit()
    shutil.rmtree(storage, ignore_errors=True)


def worker_environment(gpu: bool, threads: int, env: Mapping[str, str]) -> dict[str, str]:
    """What the workers get beside Ray's environment."""
    passed = {name: os.environ[name] for name in (*SETTINGS, *SECRETS, "FLEETUNE_HOME") if name in os.environ}
    accelerator = {} if gpu else {"DS_ACCELERATOR": "cpu"}
    return {
        **library_folders(),
        **passed,
        **env,
        **accelerator,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }


def _die_with_controller() -> None:
    os.read(0, 1)  # returns when the other end is closed
    os._exit(1)


if __name__ == "__main__":
    main()
