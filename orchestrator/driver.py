"""The Ray side of the controller, a process of its own: `python -m orchestrator.driver RUN_DIR`.

Its standard input carries the number of the attempt, once that is claimed, and says by its end that the controller is
gone. When this process dies, however it dies, Ray ends the workers. What came of them is left in outcome.json.
"""

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from clusters.controllers import nodes_here
from clusters.environment import SECRETS, SETTINGS
from clusters.ray_nodes import nodes_with_cores
from orchestrator.failure import Failure, types_of
from orchestrator.worker import WorkerFailed, redirect, work
from runfolder.chain import Attempt
from runfolder.evaluation_job import AnyJob
from runfolder.files import write_json
from runfolder.folders import library_folders
from runfolder.record import load_any_job
from runfolder.secrets import read_secrets

_NODES_JOIN_S = 30.0  # until Ray knows of all nodes that answer
_TEXT_LENGTH = 4000  # characters kept of a failure, from its end


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
    failures = failures_of(lambda: run_workers(attempt, load_any_job(run_dir), resources))
    records = {}
    for rank, failure in failures.items():
        records[str(rank)] = failure.dump()
    write_json(attempt.folder / "outcome.json", {"failures": records})


def connect() -> dict[str, float]:
    """Join the cluster at RAY_ADDRESS; gives its resources."""
    import ray
    import ray.train.torch  # slow: done while the controller looks for the checkpoint

    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR")
    resources: dict[str, float] = ray.cluster_resources()
    return resources


def usable_nodes(fewest: int) -> int:
    """How many nodes the workers are spread over; raises RuntimeError where an allocation has lost too many."""
    allocated = nodes_here()
    if allocated is None:
        return fewest
    deadline = time.monotonic() + _NODES_JOIN_S
    alive = 0
    while alive < allocated and time.monotonic() < deadline:
        alive = nodes_with_cores()
        time.sleep(0.1)
    nodes = min(alive, allocated)
    if nodes < fewest:
        raise RuntimeError(f"{nodes} nodes are there; the run needs {fewest}")
    return nodes


def failures_of(run_once: Callable[[], None]) -> dict[int, Failure]:
    """What the workers raised, by rank; empty when all went well, rank -1 for what concerns no single worker."""
    from ray.train import WorkerGroupError

    try:
        run_once()
    except WorkerGroupError as error:
        return {rank: failure_of(failure) for rank, failure in error.worker_failures.items()}
    except Exception as error:
        return {-1: failure_of(error)}
    return {}


def failure_of(error: BaseException) -> Failure:
    """A failure with what Ray says was its cause."""
    if isinstance(error, WorkerFailed):
        return Failure(error.text[-_TEXT_LENGTH:], error.types)
    text = f"{type(error).__name__}: {error}"
    types = types_of(error)
    preempted = getattr(error, "preempted", False)  # of Ray's errors about actors
    cause = getattr(error, "health_check_failure", None) or getattr(error, "controller_failure", None)
    if cause is not None:
        cause_failure = failure_of(cause)
        text = f"{text}\n{cause_failure.text}"
        types += cause_failure.types
        preempted = preempted or cause_failure.preempted
    return Failure(text[-_TEXT_LENGTH:], types, preempted)


def run_workers(attempt: Attempt, job: AnyJob, resources: dict[str, float]) -> None:
    """Start one worker per GPU, or per process where there is none, and wait for their end."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    nodes = usable_nodes(job.resources.fewest_nodes)
    world_size = nodes * job.resources.workers_on_node
    placement = "PACK" if nodes == 1 else "SPREAD"  # as many workers on each node
    gpu = resources.get("GPU", 0) > 0
    cpus = resources["CPU"]
    if gpu:
        backend, per_worker = "nccl", {"GPU": 1.0}
    else:
        backend, per_worker = "gloo", {"CPU": min(1.0, cpus / world_size)}
    threads = int(max(1, cpus // world_size))
    secrets = read_secrets(attempt.run_dir)
    environment = worker_environment(gpu, threads, job.env, secrets)
    storage = attempt.folder / "ray"
    no_retries = FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0)
    name = f"{attempt.run_dir.name}-a{attempt.number}"
    trainer = TorchTrainer(
        lambda: work(str(attempt.run_dir), attempt.number, environment),
        torch_config=TorchConfig(backend=backend),
        scaling_config=ScalingConfig(
            num_workers=world_size, use_gpu=gpu, resources_per_worker=per_worker, placement_strategy=placement
        ),
        run_config=RunConfig(name=name, storage_path=str(storage), failure_config=no_retries),
    )
    trainer.fit()
    shutil.rmtree(storage, ignore_errors=True)


def worker_environment(gpu: bool, threads: int, env: Mapping[str, str], secrets: Iterable[str]) -> dict[str, str]:
    """What the workers get beside Ray's environment."""
    variables = library_folders()
    for name in (*SETTINGS, *SECRETS, *secrets, "FLEETUNE_HOME"):
        if name in os.environ:
            variables[name] = os.environ[name]
    variables.update(env)
    if not gpu:
        variables["DS_ACCELERATOR"] = "cpu"
    variables["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
    return variables


def _die_with_controller() -> None:
    os.read(0, 1)  # returns when the other end is closed
    os._exit(1)


if __name__ == "__main__":
    main()
