"""One look at the runs of a namespace: what carries them, and where that says too little, pods, Kueue and events."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from clusters.base import ClusterStatus
from clusters.kubernetes_answers import goes_on, is_rayservice, is_suspended, runs_now, status_of
from clusters.kubernetes_api import KubernetesApi
from clusters.kubernetes_config import KubernetesConfig
from clusters.kubernetes_events import newest_warning, warnings_in
from clusters.kubernetes_services import service_status
from clusters.kueue import Answered, QueueView, look_at_queue
from k8s.planned import QUEUE_LABEL, RUN_LABEL

OUR_OBJECTS = "app.kubernetes.io/managed-by=fleetune"
_FEW = 50  # runs that run, of which it is asked, too, whether a pod lacks
_LONG = timedelta(minutes=2)  # that a run starts, until it is asked what only events say

Newest = Mapping[str, dict[str, Any] | None]


def objects_of(run_id: str) -> str:
    """What selects the objects of a run, by their labels."""
    of_run = f"{RUN_LABEL}={run_id}"
    return f"{OUR_OBJECTS},{of_run}"


def statuses_of(api: KubernetesApi, config: KubernetesConfig, newest: Newest) -> dict[str, ClusterStatus]:
    """The status of each run by its newest RayJob or RayService. Raises Unreachable.

    Pods are listed where some wait, or few run; Kueue is asked where it holds some back, and warnings are where some
    start for long and their pods do not say why.
    """
    going_on = []
    for rayjob in newest.values():
        if rayjob and goes_on(rayjob):
            going_on.append(rayjob)
    pods = _pods_of(api, going_on)
    queues = _queues_of(api, config, going_on)
    statuses = {}
    silent = {}
    for run_id, rayjob in newest.items():
        if rayjob is None:
            why = f"namespace {config.namespace} has no RayJob or RayService of it; fleetune resume submits it again"
            statuses[run_id] = ClusterStatus("unknown", why)
            continue
        queue = queues.get(_queue_of(rayjob, config))
        of_run = pods.get(run_id, [])
        status = service_status(rayjob, of_run) if is_rayservice(rayjob) else status_of(rayjob, of_run, queue)
        statuses[run_id] = status
        if _starts_for_long(rayjob) and not status.stuck:
            silent[run_id] = str(rayjob["metadata"]["name"])
    if silent:
        _add_warnings(api, statuses, silent)
    return statuses


def _add_warnings(
    api: KubernetesApi,
    statuses: dict[str, ClusterStatus],
    silent: Mapping[str, str],
) -> None:
    """Have the statuses of some runs, by the names of their RayJobs, say what the newest warning says of each."""
    events, trouble = warnings_in(api)
    for run_id, name in silent.items():
        words = newest_warning(events, name) or trouble
        if words:
            before = statuses[run_id]
            reason = f"{before.reason}; {words}"
            statuses[run_id] = replace(before, reason=reason)


def _queues_of(
    api: KubernetesApi,
    config: KubernetesConfig,
    rayjobs: Iterable[Answered],
) -> dict[str, QueueView]:
    """How the queues stand, by name, in which Kueue holds some of these RayJobs back."""
    queues: dict[str, QueueView] = {}
    for rayjob in rayjobs:
        name = _queue_of(rayjob, config)
        is_held = is_suspended(rayjob)
        if is_held and name and name not in queues:
            queues[name] = look_at_queue(api, name)
    return queues


def _pods_of(api: KubernetesApi, rayjobs: Iterable[Answered]) -> dict[str, list[dict[str, Any]]]:
    """Pods by run, as far as they say why these do not go on: all pods where some wait, or one run runs alone.

    Of more runs that all run, it is those that have not started.
    """
    running = []
    is_all = False
    for rayjob in rayjobs:
        if runs_now(rayjob):
            running.append(rayjob)
        else:
            is_all = True
    are_few = 0 < len(running) <= _FEW
    if not is_all and not are_few:
        return {}
    selector = OUR_OBJECTS
    fields = "" if is_all else "status.phase=Pending"
    if len(running) == 1 and not is_all:
        selector += f",{RUN_LABEL}={running[0]['metadata']['labels'].get(RUN_LABEL, '')}"
        fields = ""
    by_run: dict[str, list[dict[str, Any]]] = {}
    for pod in api.pods(selector, fields):
        labels = pod["metadata"]["labels"]
        run_id = labels.get(RUN_LABEL, "")
        by_run.setdefault(run_id, []).append(pod)
    return by_run


def _queue_of(rayjob: Answered, config: KubernetesConfig) -> str:
    """The queue of Kueue's that a RayJob waits in; empty for none."""
    labels = rayjob["metadata"].get("labels", {})
    named = labels.get(QUEUE_LABEL)
    return str(named or config.queue or "")


def _starts_for_long(rayjob: Answered) -> bool:
    """Whether a RayJob that nobody holds back has not come to run for a while."""
    is_over = not goes_on(rayjob)
    is_held = is_suspended(rayjob)
    if is_over or is_held or runs_now(rayjob):
        return False
    metadata = rayjob["metadata"]
    status = rayjob.get("status") or {}
    since = status.get("startTime") or metadata.get("creationTimestamp")
    if not since:
        return False
    started = datetime.fromisoformat(since)
    age = datetime.now(UTC) - started
    return age > _LONG
