"""Verdicts on real exceptions, as they come from a worker or from Ray."""

import pickle

import pytest
import requests
import torch
from ray.exceptions import ActorDiedError, NodeDiedError, RayActorError
from ray.exceptions import OutOfMemoryError as RayOutOfMemoryError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from ray.train.v2.api.exceptions import ControllerError

from orchestrator.driver import failure_of
from orchestrator.failure import Failure, load_failure
from orchestrator.verdict import Again, Final, VerdictKind, classify, decide
from orchestrator.worker import WorkerFailed
from runfolder.digests import InputChanged
from trainer.checkpoint.reading import CheckpointGone

# As Ray 2.60 words it, shortened.
WORDS = (
    "The actor died unexpectedly before finishing this task.\nThe actor is dead because its worker process has died. "
    "Worker exit type: SYSTEM_ERROR Some common causes include: (1) the process was killed by the OOM killer"
)


def raised(error: BaseException) -> Failure:
    """What the verdict gets of an exception in a worker."""
    travelled = failure_of(pickle.loads(pickle.dumps(WorkerFailed.by(error))))
    return load_failure(travelled.dump())


def of_ray(error: Exception) -> Failure:
    """What the verdict gets of a worker that Ray finds ill or dead."""
    return load_failure(failure_of(WorkerHealthCheckFailedError("A worker health check failed.", error)).dump())


def actor_died() -> ActorDiedError:
    found = ActorDiedError()
    found.error_msg = WORDS
    return found


DIED = of_ray(actor_died())
RAY_OOM = of_ray(RayOutOfMemoryError("Task was killed due to the node running low on memory."))
GLOO = raised(RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]"))


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (raised(ValueError("boom")), "user_error"),
        (raised(KeyError("preparation")), "user_error"),
        (raised(InputChanged("data.train: /preempted/Connection reset.jsonl has changed")), "user_error"),
        (raised(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")), "out_of_memory"),
        (raised(torch.AcceleratorError("CUDA error: out of memory")), "out_of_memory"),
        (
            raised(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")),
            "out_of_memory",
        ),
        (raised(OSError(12, "Cannot allocate memory")), "out_of_memory"),
        (raised(MemoryError()), "out_of_memory"),
        (RAY_OOM, "out_of_memory"),
        (DIED, "node_lost"),
        (of_ray(NodeDiedError("gone")), "node_lost"),
        (of_ray(RayActorError(error_msg="The actor died because its node was taken.", preempted=True)), "preemption"),
        (GLOO, "network"),
        (
            raised(torch.distributed.DistBackendError("NCCL error: ncclRemoteError: remote process exited")),
            "network",
        ),
        (raised(torch.distributed.DistBackendError("NCCL error: ncclInvalidUsage")), "user_error"),
        (raised(torch.distributed.DistNetworkError("failed to recv, got 0 bytes")), "network"),
        (raised(ConnectionResetError(104, "Connection reset by peer")), "network"),
        (raised(requests.ConnectionError("no route")), "network"),
        (raised(RuntimeError("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)")), "hang"),
        (
            raised(RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv")),
            "hang",
        ),
        (of_ray(WorkerHealthCheckTimeoutError("no answer for 60 s")), "hang"),
    ],
)
def test_a_failure_is_known_by_its_types(failure: Failure, kind: VerdictKind) -> None:
    assert classify({1: failure}).kind == kind


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyError, TypeError, AssertionError])
@pytest.mark.parametrize(
    "text",
    [
        "column 'preempted' not found",
        "ConnectionError: Connection reset by peer",
        "NCCL WARN Connection refused, ncclRemoteError",
        "ActorDiedError: the worker process has died",
        "Timed out waiting 10ms, WorkerHealthCheckTimeoutError",
    ],
)
def test_a_bug_is_a_bug_whatever_it_says(error: type[Exception], text: str) -> None:
    assert classify({0: raised(error(text))}).kind == "user_error"


def test_what_cannot_be_pickled_travels_too() -> None:
    class Odd(ConnectionResetError):
        def __reduce__(self) -> str:
            raise TypeError("not to be pickled")

    found = raised(Odd("odd"))
    assert found.types[1:3] == ("builtins.ConnectionResetError", "builtins.ConnectionError")
    assert classify({0: found}).kind == "network"


def test_what_made_the_others_fail_comes_first() -> None:
    boom = raised(ValueError("boom"))
    assert classify({0: GLOO, 1: DIED}).rank == 1
    assert classify({0: GLOO, 1: boom}).kind == "user_error"
    assert classify({0: DIED, 1: RAY_OOM}).kind == "out_of_memory"
    # A dead worker makes others fail in any way; a real bug shows again.
    assert classify({0: boom, 1: DIED}).kind == "node_lost"


def test_the_evidence_is_the_line_that_proves_it() -> None:
    log = "step 3 loss 2.0\nTraceback (most recent call last):\n  File x\nValueError: row 7 is bad\nbye\n"
    verdict = classify({0: raised(ValueError("row 7 is bad"))}, {0: log})
    assert (verdict.evidence, verdict.reason) == ("ValueError: row 7 is bad", "rank 0: ValueError: row 7 is bad")
    oom = classify({1: raised(MemoryError())}, {1: "step 1\nRuntimeError: can't allocate memory: 1 GB\nend"})
    assert oom.evidence == "RuntimeError: can't allocate memory: 1 GB"
    assert classify({2: DIED}).reason == "rank 2: the worker process was killed, or its node is gone"


def test_what_concerns_no_worker_is_nobodys_bug() -> None:
    assert classify({-1: Failure("the driver ended with exit code 1\nRuntimeError: odd")}).kind == "node_lost"
    assert classify({-1: failure_of(ConnectionError("refused"))}).kind == "network"
    assert classify({-1: failure_of(ControllerError(ValueError("odd")))}).kind == "node_lost"


def test_bugs_and_lack_of_memory_are_final() -> None:
    assert isinstance(decide([("user_error", 10)]), Final)
    assert isinstance(decide([("node_lost", 5), ("out_of_memory", 10)]), Final)
    assert decide([("success", 1)]) == Final("succeeded", None)
    assert decide([("node_lost", 1), ("cancelled", 0)]) == Final("cancelled", "cancelled by request")


@pytest.mark.parametrize(("kind", "limit"), [("node_lost", 5), ("preemption", 5), ("hang", 3), ("network", 3)])
def test_only_attempts_without_progress_are_counted(kind: VerdictKind, limit: int) -> None:
    assert decide([(kind, 1)] * 100) == Again(0.0)
    assert isinstance(decide([(kind, 0)] * (limit - 1)), Again)
    assert isinstance(decide([(kind, 0)] * limit), Final)
    assert decide([(kind, 0)] * limit + [(kind, 3)]) == Again(0.0)
    # A checkpoint that turned out to be damaged is no progress either.
    assert isinstance(decide([(kind, -5)] * limit), Final)


def test_walltime_is_a_limit_unless_a_scheduler_starts_the_run_again() -> None:
    assert decide([("walltime", 5)]) == Final("failed", None, "fleetune resume goes on from the newest checkpoint")
    assert decide([("walltime", 5)], requeued=True) == Again(0.0)
    assert isinstance(decide([("walltime", 0)] * 5, requeued=True), Final)


def test_waiting_grows_without_progress() -> None:
    assert decide([]) == Again(0.0)
    delays = [decide([("node_lost", 0)] * count) for count in range(1, 5)]
    assert delays == [Again(1.0), Again(2.0), Again(4.0), Again(8.0)]


def test_a_start_checkpoint_that_a_live_predecessor_removed_is_no_bug() -> None:
    found = classify({0: raised(CheckpointGone("step 6 of attempt 2: No such file or directory"))})
    assert found.kind == "node_lost" and "step 6 of attempt 2" in found.reason
