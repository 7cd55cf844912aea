"""What every cluster does, of whatever kind. A backend passes it with a fixture `place` (place.py) of its own:

    class TestQueue(QueueContract): ...

One class for each price: the first starts no worker, the second trains on one, the third on all nodes. Only the verbs
of the command line are used, the Cluster protocol, and files of the run folder.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from jobs import make_job
from place import Place
from training_runs import LONG, SECRET, assert_undisturbed, begin, train_job, wait_for
from waiting import until

import fleetune
from clusters.remote.far_side import FarSide
from fleetune import InputError
from orchestrator.backends import open_cluster
from orchestrator.logs import LogReader
from orchestrator.runs import find, new_id
from runfolder.appended import read_lines
from runfolder.chain import Attempt, Start, attempts, last_attempt
from runfolder.requests import cancel_requested

MANY = 20  # runs that are looked at at once
_asked: list[str] = []  # what this process asks of others: an audit hook cannot be taken back
sys.addaudithook(lambda event, _: _asked.append(event) if event in ("subprocess.Popen", "socket.connect") else None)


@contextmanager
def asked() -> Iterator[list[str]]:
    """What is asked of others in the block: processes, connections, and requests over a link that is there."""
    before, ask = len(_asked), FarSide.ask
    found: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FarSide, "ask", lambda *args, **kwargs: _asked.append("ask") or ask(*args, **kwargs))
        yield found
    found += _asked[before:]


def elsewhere(place: Place, folder: Path, *arguments: str) -> str:
    """What a command prints on a machine that knows nothing but the clusters file."""
    command = [str(Path(sys.executable).with_name("fleetune")), *arguments, "--cluster", place.name]
    environment = {**os.environ, "FLEETUNE_HOME": str(folder / "elsewhere")}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


class QueueContract:
    """Runs that wait."""

    def test_a_run_is_submitted_once_found_by_others_and_cancelled(self, place: Place, tmp_path: Path) -> None:
        with place.filled():
            job = make_job(tmp_path)
            run_id = fleetune.submit(job, cluster=place.name).run_id
            assert fleetune.submit(job, cluster=place.name, run_id=run_id).adopted
            assert place.taken() == [run_id]

            until(lambda: re.search(place.waits, str(fleetune.status(run_id).reason)))
            status = fleetune.status(run_id)
            assert (status.state, status.attempt, status.cluster) == ("queued", 0, place.name)
            assert status.figures and status.figures.goodput.queued == status.figures.goodput.total > 0

            told = json.loads(elsewhere(place, tmp_path, "status", run_id, "--json"))
            assert (told["run_id"], told["state"], told["run_dir"]) == (run_id, "queued", status.run_dir)
            elsewhere(place, tmp_path, "cancel", run_id)
            assert wait_for(run_id, "cancelled").verdict is None
            until(lambda: not place.taken())

    def test_many_runs_are_looked_at_as_quickly_as_a_few(self, place: Place, tmp_path: Path) -> None:
        with place.filled():
            job, cluster = make_job(tmp_path), open_cluster(place.name)
            run_id, *lost = [fleetune.submit(job, cluster=place.name).run_id for _ in range(3)]
            for other in lost:
                place.forget(other)
            with asked() as for_two:
                assert cluster.look([run_id, lost[0]])[run_id].on_cluster.state == "queued"
            record = cluster.site.record(run_id)
            others = [new_id("other") for _ in range(MANY)]
            for other in others:
                cluster.site.create(other, {key: record[key] for key in record if key != "run_id"})
            with asked() as for_many:
                standings = cluster.look([run_id, *lost, *others])
            states = [standings[other].on_cluster.state for other in (run_id, *lost, *others)]
            assert states == ["queued"] + ["unknown"] * (len(lost) + MANY)
            assert for_many == for_two
            fleetune.cancel(run_id)
            until(lambda: not place.taken())

    def test_a_run_that_was_lost_is_unknown_and_submitted_again_once(self, place: Place, tmp_path: Path) -> None:
        with place.filled():
            run_id = fleetune.submit(make_job(tmp_path), cluster=place.name).run_id
            wait_for(run_id, "queued")
            place.forget(run_id)
            status = wait_for(run_id, "unknown")
            assert re.search(f"{place.lost}.*fleetune resume", str(status.reason)) and status.verdict is None
            for _ in range(2):
                fleetune.resume(run_id)
            assert place.taken() == [run_id] and fleetune.status(run_id).state == "queued"
            fleetune.cancel(run_id)
            until(lambda: not place.taken())


@pytest.mark.timeout(900)
class RunContract:
    """Runs on one worker."""

    def test_a_bug_is_final_with_its_evidence_until_it_is_mended(
        self, place: Place, tmp_path: Path, tiny_base: Path, sums: Path
    ) -> None:
        rows = place.root / "rows.jsonl"
        rows.write_text(sums.read_text())
        with place.filled():
            job = train_job(tmp_path, tiny_base, f"cluster:{rows}")
            run_id = fleetune.submit(job, cluster=place.name).run_id
            rows.write_text(sums.read_text() * 2)
        status = wait_for(run_id, "failed")
        assert (status.verdict, status.attempt) == ("user_error", 1)
        assert f"{rows} has changed since the submission: sha256 " in str(status.evidence)
        assert str(status.reason).endswith("put the old one back and resume the run, or submit the job anew")
        with pytest.raises(InputError, match=r"data\.train: .* has changed"):
            fleetune.resume(run_id)
        rows.write_text(sums.read_text())
        fleetune.resume(run_id)
        status = wait_for(run_id, "succeeded")
        assert status.attempt == 4  # slot 2 closed it, slot 3 reopened it
        brought = fleetune.fetch(run_id, tmp_path / "brought")
        assert list(brought.rglob("adapter_model.safetensors"))

    def test_a_run_that_starts_is_cancelled(self, place: Place, tmp_path: Path, tiny_base: Path, sums: Path) -> None:
        run_id = fleetune.submit(train_job(tmp_path, tiny_base, sums, **LONG), cluster=place.name).run_id
        wait_for(run_id, "starting")
        fleetune.cancel(run_id)
        assert wait_for(run_id, "cancelled").step == 0
        until(place.is_idle)

    def test_a_run_is_followed_goes_on_when_it_is_warned_and_ends_when_it_is_cancelled(
        self, place: Place, tmp_path: Path, tiny_base: Path, sums: Path
    ) -> None:
        long = {"train": {"steps": 100_000, "batch_tokens": 512, "lr": 1e-3}, "checkpoint": {"every": 5}}
        run_dir = begin(place.name, train_job(tmp_path, tiny_base, sums, **long), steps=6)
        run_id = run_dir.name
        reader, cluster = LogReader(find(run_id)), open_cluster(place.name)
        early, printed = reader.read(), cluster.logs(run_id)
        assert early.startswith("=== attempt 1, rank 0 ===\n[rank 0] pid ")

        place.end_worker(run_id)
        first, second = until(lambda: has_steps(run_dir, 2), 300)
        assert first.verdict and (first.verdict["kind"], first.verdict["rank"]) == ("node_lost", 0)
        assert second.start and second.start.step % 5 == 0
        before, again = losses(first), losses(second)
        assert min(again) == second.start.step + 1
        assert all(before.get(step, loss) == loss for step, loss in again.items())

        place.warn(run_id)
        _, second, third = until(lambda: has_steps(run_dir, 3), 300)
        saved = max(losses(second))
        assert second.verdict and second.verdict["kind"] == "preemption"
        assert second.verdict["reason"].endswith(f"; saved at step {saved}")
        assert third.start == Start(2, saved) and min(losses(third)) == saved + 1
        shares = fleetune.status(run_id).figures
        assert shares and shares.goodput.queued > 0 and shares.goodput.training > 0

        elsewhere(place, tmp_path, "cancel", run_id)
        status = wait_for(run_id, "cancelled")
        assert (status.verdict, status.attempt, cancel_requested(run_dir)) == ("cancelled", 3, True)
        until(place.is_idle)
        assert early + reader.read(final=True) == fleetune.logs(run_id)
        assert "=== attempt 3, rank 0 ===\n" in fleetune.logs(run_id)
        assert printed.text + cluster.logs(run_id, printed.offset).text == cluster.logs(run_id).text


@pytest.mark.timeout(900)
class NodeContract:
    """A run that takes all nodes."""

    def test_a_run_that_loses_a_node_finishes_as_if_it_had_not(
        self, place: Place, tmp_path: Path, tiny_base: Path, sums: Path, launch: Callable[..., None]
    ) -> None:
        changes = {**LONG, "sharding": {"zero": 3}, "resources": place.resources, "env": SECRET}
        run_dir = begin(place.name, train_job(tmp_path, tiny_base, sums, **changes))
        assert place.taken() == [run_dir.name]
        place.lose_node()
        assert_undisturbed(run_dir, launch)
        assert attempts(run_dir)[1].start is not None
        until(place.is_idle)


def has_steps(run_dir: Path, number: int) -> list[Attempt]:
    """The attempts of a run, once there are so many of them and the last one has taken two steps; else none."""
    found = attempts(run_dir)
    assert len(found) <= number, [attempt.verdict for attempt in found]
    return found if len(found) == number and len(losses(last_attempt(run_dir))) > 1 else []


def losses(attempt: Attempt) -> dict[int, float]:
    """The loss of each step that an attempt reported."""
    return {row["step"]: row["loss"] for row in read_lines(attempt, "metrics.jsonl") if "loss" in row}
