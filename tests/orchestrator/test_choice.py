"""A run for whichever of several clusters would start it first. The homes are real; when each starts is said here."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from jobs import make_job, only_queued

import fleetune
from clusters.base import ClusterRequest, SubmissionRefused, Unreachable
from clusters.local import Local
from fleetune import InputError
from orchestrator import backends


@dataclass(frozen=True)
class Promising(Local):
    """A local cluster that says when it would start a run, or why it does not."""

    promise: float | Exception | None = None
    fails: bool = False  # to answer that it has a run
    refuses: bool = False  # what it said that it would start

    def forecast(self, request: ClusterRequest) -> float | None:  # noqa: ARG002
        """What was promised."""
        if isinstance(self.promise, Exception):
            raise self.promise
        return self.promise

    def submit(self, request: ClusterRequest) -> None:
        """Queue it, and perhaps let nobody know, or do not."""
        if self.refuses:
            raise SubmissionRefused("not with this much memory")
        super().submit(request)
        if self.fails:
            raise Unreachable("cut in the answer")


Offer = Callable[..., None]


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[Offer]:  # noqa: ARG001
    """Have a cluster of this name, with a home of its own, promise something."""
    with ExitStack() as stack:
        for name in ("early", "late"):
            (tmp_path / name).mkdir()
            stack.enter_context(only_queued(tmp_path / name))

        def promise(name: str, start: float | Exception | None, **does: bool) -> None:
            cluster = Promising(tmp_path / name, promise=start, **does)
            monkeypatch.setitem(backends.CLUSTERS, name, lambda: cluster)

        yield promise


def runs_on(tmp_path: Path, name: str) -> list[str]:
    return [path.name for path in (tmp_path / name / "runs").glob("[!.]*")]


def test_the_first_to_start_gets_it(offer: Offer, tmp_path: Path) -> None:
    offer("late", 7200.0)
    offer("early", 0.0)
    done = fleetune.submit(make_job(tmp_path), cluster="late,early")
    assert done.cluster == "early"
    assert str(done.why).startswith("late: would start at ") and "early: would start now" in str(done.why)
    assert runs_on(tmp_path, "early") == [done.run_id] and not runs_on(tmp_path, "late")


def test_one_that_says_nothing_comes_last(offer: Offer, tmp_path: Path) -> None:
    offer("late", None)
    offer("early", 7200.0)
    assert fleetune.submit(make_job(tmp_path), cluster="late,early").cluster == "early"
    offer("early", None)
    assert fleetune.submit(make_job(tmp_path), cluster="late,early").cluster == "late"


def test_a_repetition_goes_on_with_the_same(offer: Offer, tmp_path: Path) -> None:
    offer("late", 7200.0)
    offer("early", 0.0, fails=True)
    with pytest.raises(Unreachable, match="cut in the answer"):
        fleetune.submit(make_job(tmp_path), cluster="late,early")
    offer("early", 9000.0)
    done = fleetune.submit(make_job(tmp_path), cluster="late,early")
    assert done.adopted and done.cluster == "early"
    assert runs_on(tmp_path, "early") == [done.run_id] and not runs_on(tmp_path, "late")
    again = fleetune.submit(make_job(tmp_path), cluster="late,early")
    assert not again.adopted and again.cluster == "late"  # the one before came through


def test_a_run_with_an_id_stays_where_it_is(offer: Offer, tmp_path: Path) -> None:
    offer("late", None)
    offer("early", 0.0)
    run_id = fleetune.submit(make_job(tmp_path), cluster="late,early").run_id
    offer("late", -60.0)
    offer("early", None)
    again = fleetune.submit(make_job(tmp_path), cluster="late,early", run_id=run_id)
    assert again.adopted and again.cluster == "early"


def test_one_that_does_not_take_it_is_passed_over(offer: Offer, tmp_path: Path) -> None:
    offer("early", SubmissionRefused("too many nodes"))
    offer("late", 0.0)
    done = fleetune.submit(make_job(tmp_path), cluster="early,late")
    assert done.cluster == "late" and "early: too many nodes" in str(done.why)
    offer("late", Unreachable("no route"))
    with pytest.raises(Unreachable, match="early: too many nodes; late: no route"):
        fleetune.submit(make_job(tmp_path), cluster="early,late")
    offer("late", SubmissionRefused("no GPUs"))
    with pytest.raises(InputError, match="no cluster takes this job: early: too many nodes; late: no GPUs"):
        fleetune.submit(make_job(tmp_path), cluster="early,late")
    assert len(runs_on(tmp_path, "late")) == 1 and not runs_on(tmp_path, "early")


def test_after_a_refusal_the_next_one_gets_it(offer: Offer, tmp_path: Path, home: Path) -> None:
    offer("early", 0.0, refuses=True)
    offer("late", None, fails=True)
    with pytest.raises(Unreachable, match="cut in the answer"):
        fleetune.submit(make_job(tmp_path), cluster="early,late")
    offer("early", 0.0)
    offer("late", None)
    done = fleetune.submit(make_job(tmp_path), cluster="early,late")  # late may have it
    assert done.adopted and runs_on(tmp_path, "late") == [done.run_id]
    assert "early: not with this much memory; sums-" in str(done.why)
    (refused,) = runs_on(tmp_path, "early")
    assert "asked to end" in str(fleetune.status(refused, cluster="early").reason)
    offer("early", 0.0, refuses=True)
    offer("late", None, refuses=True)
    with pytest.raises(InputError, match="no cluster takes this job: early: not with this much .*; late: not with"):
        fleetune.submit(make_job(tmp_path), cluster="early,late")
    assert not list((home / "choices").iterdir())


def test_a_refusal_after_a_cut_forgets_neither_cluster_nor_run(offer: Offer, tmp_path: Path) -> None:
    offer("late", 7200.0)
    offer("early", 0.0, fails=True)
    with pytest.raises(Unreachable, match="cut in the answer"):
        fleetune.submit(make_job(tmp_path), cluster="late,early")
    offer("early", SubmissionRefused("no such partition"))
    refused = (
        "no such partition\ncluster early may have taken an earlier try of this; on another one it is another run"
    )
    with pytest.raises(InputError, match=refused):
        fleetune.submit(make_job(tmp_path), cluster="late,early")
    offer("early", 9000.0)
    done = fleetune.submit(make_job(tmp_path), cluster="late,early")
    assert done.adopted and runs_on(tmp_path, "early") == [done.run_id] and not runs_on(tmp_path, "late")


def test_a_refusal_before_anything_was_made_is_forgotten(offer: Offer, tmp_path: Path, home: Path) -> None:
    offer("early", SubmissionRefused("no such partition"))
    with pytest.raises(InputError, match="no such partition"):
        fleetune.submit(make_job(tmp_path), cluster="early")
    assert not list((home / "submitting").iterdir())


def test_names_are_checked_before_anything_and_may_have_spaces(offer: Offer, tmp_path: Path, home: Path) -> None:
    offer("early", 0.0)
    offer("late", None)
    commands: list[Callable[..., object]] = [fleetune.submit, fleetune.dry_run]
    for wrong in ("early,lat", "lat,early", "early,"):
        for command in commands:
            with pytest.raises(InputError, match="--cluster: found"):
                command(make_job(tmp_path), cluster=wrong)
    assert not runs_on(tmp_path, "early") and not (home / "choices").exists()
    assert fleetune.submit(make_job(tmp_path), cluster="late, early").cluster == "early"


def test_a_dry_run_is_of_the_cluster_that_would_get_it(offer: Offer, tmp_path: Path, home: Path) -> None:
    offer("early", 0.0)
    offer("late", 7200.0)
    warnings: list[str] = []
    text = fleetune.dry_run(make_job(tmp_path), cluster="late,early", warn=warnings.append)
    assert str(tmp_path / "early" / "runs") in text
    assert warnings[0].startswith("cluster early would get it now (late: would start at ")
    assert not (home / "choices").exists() and not runs_on(tmp_path, "early")
