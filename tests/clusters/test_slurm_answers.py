"""What SLURM prints, as it was recorded from 22.05, and from the manuals of later versions where that is said."""

import time
from collections.abc import Iterator

import pytest

from clusters.base import Capacity
from clusters.slurm_answers import (
    QueuedJob,
    capacity_of,
    endings,
    queued_jobs,
    refusal_in,
    start_in,
    taken_job,
    words_of_ending,
)

JOBS = """\
10|COMPLETED|None|2026-11-29T10:59:52|node1|node1|sums-0123456789-s1
11|PENDING|Priority|2026-11-29T12:00:00|n/a||sums-1123456789-s2
12|PENDING|launch failed requeued held|N/A|n/a||sums-2123456789-s1
13|RUNNING|None|2026-11-29T10:59:52|node1|node1|a|name with | in it
"""


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The zone of the machine is an hour before UTC, as it is in winter."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "CET-1")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("berlin")
def test_jobs_of_squeue() -> None:
    ended, waits, held, odd = queued_jobs(JOBS)
    assert (ended.run_id, ended.state) == ("sums-0123456789", None)
    assert waits == QueuedJob(
        "11", "sums-1123456789-s2", "queued", "Priority", "2026-11-29T12:00:00", "n/a", "", "PENDING"
    )
    assert waits.why_queued == (
        "SLURM job 11: others have a higher priority; SLURM expects its start at 2026-11-29 12:00 +0100"
    )
    assert held.why_queued == "SLURM job 12: a node could not start it, and SLURM held it; it is let go on"
    assert (odd.name, odd.state) == ("a|name with | in it", "running")


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("ReqNodeNotAvail, UnavailableNodes:node[1-2]", "nodes that it needs are down or reserved (node[1-2])"),
        (
            "Nodes required for job are DOWN, DRAINED or reserved",
            "nodes that it needs are down, drained",
        ),
        ("Of a later version, with a tail", "Of a later version, with a tail"),
    ],
)
def test_reasons_with_a_tail_are_in_words(reason: str, words: str) -> None:
    assert QueuedJob("7", "a-s1", "queued", reason, "N/A").why_queued.startswith(f"SLURM job 7: {words}")


@pytest.mark.parametrize(
    ("nodes", "has_it"),
    [
        ("node07", True),
        ("node[1-6,8],node07", True),
        ("a[1-3],node[05-10]", True),
        ("node[05-10]x", False),
        ("node[8-10],gpu07", False),
        ("node7", False),
        ("rack[0-1]node[0-9]", True),  # in a way that is not known: it may be there
    ],
)
def test_the_first_node_of_a_job_is_among_its_nodes(nodes: str, has_it: bool) -> None:
    job = QueuedJob("7", "a-s1", "running", "None", "N/A", "node07", nodes, "RUNNING")
    assert job.has_lost_first_node != has_it


def test_the_job_that_sbatch_names() -> None:
    assert taken_job("77\n") == taken_job("77;cluster2\n") == taken_job("You have 3 hours left\n77\n") == "77"
    assert taken_job("") == ""


def test_endings_of_sacct() -> None:
    said = "10|CANCELLED by 1000|2026-11-29T10:59:52\n11|NODE_FAIL|2026-11-29T11:00:00\n"
    assert endings(said) == {
        "10": "CANCELLED by 1000 at 2026-11-29T10:59:52",
        "11": "NODE_FAIL at 2026-11-29T11:00:00",
    }
    assert endings("") == {}
    assert words_of_ending("11", endings(said)) == "SLURM job 11 ended: NODE_FAIL at 2026-11-29T11:00:00"
    assert words_of_ending("12", endings(said)) == "SLURM has no job 12 any more"
    assert words_of_ending("", {}) == "SLURM has no job of this run"


def test_a_forecast_of_sbatch() -> None:
    said = "sbatch: Job 1 to start at 2026-11-29T10:59:50 using 2 processors on nodes node[1-2] in partition main"
    later = said.replace("10:59:50", "11:00:50")
    assert start_in(later) == start_in(said) + 60  # type: ignore[operator]
    assert start_in("sbatch: something else") is None


@pytest.mark.parametrize(
    "said",
    [
        "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
        "allocation failure: Socket timed out on send/recv operation",
        "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying",
        "sbatch: error: Batch job submission failed: Slurm backup controller in standby mode",
        "sbatch: error: If munged is up, restart with --num-threads=10",
    ],
)
def test_errors_of_the_way_to_slurm_may_pass(said: str) -> None:
    assert refusal_in(said) is None


@pytest.mark.parametrize(
    "said",
    [
        "sbatch: error: invalid partition specified: nope\nallocation failure: Invalid partition name specified",
        "allocation failure: Requested node configuration is not available",
        "sbatch: error: Invalid generic resource (gres) specification",
        "allocation failure: Invalid feature specification",
        "allocation failure: Requested reservation is invalid",
        "sbatch: error: Invalid --time specification",
        "allocation failure: Invalid account or account/partition combination specified",
        "allocation failure: Invalid qos specification",
        "sbatch: error: Batch job submission failed: Memory specification can not be satisfied",
        "allocation failure: Requested time limit is invalid (missing or exceeds some limit)",
    ],
)
def test_errors_of_the_job_are_told_in_slurms_words(said: str) -> None:
    words = said.rpartition(": ")[2]
    assert refusal_in(said) == words


def test_a_test_says_of_nodes_that_are_down_what_it_says_of_nodes_that_are_not_there() -> None:
    said = "allocation failure: Requested node configuration is not available"
    assert refusal_in(said) and refusal_in(said, is_test=True) is None


def test_capacity_is_that_of_nodes_that_are_up() -> None:
    gpus = (
        "idle gpu:h100:4(S:0-1) gpu:h100:0(IDX:N/A) 0/64/0/64\nmix gpu:h100:4(S:0-1) gpu:h100:3(IDX:0-2) 48/16/0/64\n"
    )
    down = "down* gpu:h100:4(S:0-1) gpu:h100:0(IDX:N/A) 0/0/64/64\n"
    assert capacity_of(gpus + down) == Capacity("gpu", 8, 5, "h100")
    unlike = "idle gpu:a100:2 gpu:a100:0 0/64/0/64\n"
    unnamed = "idle gpu:2 gpu:0 0/64/0/64\n"
    assert capacity_of(gpus + unlike).gpu is None
    assert capacity_of(gpus + unnamed).gpu is None
    assert capacity_of("idle (null) (null) 0/4/0/4\nalloc (null) (null) 4/0/0/4\n") == Capacity("cpu", 8, 4)
