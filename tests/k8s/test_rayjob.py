"""RayJobs as pure functions of job, cluster and submission: whole manifests, and the rules that they keep to."""

import copy
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_rules import expanded, schema_errors, variables_in
from object_rules import Status, admit
from pod_security import RULES, broken_rules

from clusters import kubernetes
from clusters.base import SubmissionRefused, Unreachable
from clusters.kubernetes import Kubernetes
from clusters.kubernetes_config import KubernetesConfig
from clusters.remote.code import Code
from k8s.pods import unexpanded
from k8s.rayjob import DIGEST_ANNOTATION, digest_of
from runfolder.job import Job
from runfolder.resources import Resources
from runfolder.service import ServiceSpec

GOLDEN = Path(__file__).parent / "golden"
IMAGE = f"registry.example.org/team/fleetune@sha256:{'0' * 64}"
RUN_ID = "a-0123456789"
SHORT_JOB = {"base": "b", "data": "d.jsonl", "train": {"steps": 1}}
GPU_JOB = SHORT_JOB | {
    "env": {"QUOTED": "a 'b' $(c) $$\n`d`", "OCTAL": "0o17"},
    "resources": {"nodes": 2, "gpus_per_node": 4, "walltime": "3h", "grace": "2m"},
}
QUEUED = {
    "namespace": "research",
    "image_pull_secrets": ["ghcr"],
    "secrets": {"HF_TOKEN": "hf/token"},
    "node_selector": {"gpu": ["h100", "h200"], "zone": "a"},
    "tolerations": ["nvidia.com/gpu:NoSchedule", "dedicated=ml:NoExecute", "spot"],
    "head_pod": {"cpus": 4, "memory": 16, "node_selector": {"pool": "cpu"}},
    "priority_class": "research",
    "queue": "team-a",
    "queue_priority": "high",
    "extended_resources": {"rdma/hca": 1},
    "env": {"NCCL_DEBUG": "INFO"},
}
PLAIN_NETWORK = {
    "gang_scheduling": True,
    "host_network": True,
    "root": "/data/fleetune",
    "python": "/opt/venv/bin/python",
}
CASES = {
    "queued.yaml": (GPU_JOB, QUEUED),
    "cpu.yaml": (SHORT_JOB, {}),
    "host_network.yaml": (GPU_JOB, PLAIN_NETWORK),
}


def cluster(**changes: Any) -> Kubernetes:
    config = KubernetesConfig.model_validate({"kind": "kubernetes", "image": IMAGE, **changes})
    return Kubernetes(config, Path(config.root))


def manifest(job: dict[str, Any] = SHORT_JOB, submission: int = 1, **changes: Any) -> dict[str, Any]:
    """The manifest of a job on a cluster, as whoever reads its text has it."""
    request = cluster(**changes).request(Job.model_validate(job), RUN_ID, submission)
    whole: dict[str, Any] = yaml.safe_load(request.text)
    return whole


def pods_of(whole: dict[str, Any]) -> list[dict[str, Any]]:
    """The specs of the pods of head and workers."""
    ray_cluster = whole["spec"]["rayClusterSpec"]
    groups = [ray_cluster["headGroupSpec"], *ray_cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


@pytest.mark.parametrize("name", ["RAY_worker_niceness", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "PATH"])
def test_a_variable_that_pods_have_already_is_refused(name: str) -> None:
    with pytest.raises(SubmissionRefused, match=f"'{name}' is set in every pod"):
        manifest(SHORT_JOB | {"env": {name: "1"}})
    with pytest.raises(ValueError, match=f"'{name}' is set in every pod"):
        cluster(env={name: "1"})


def test_a_server_takes_no_variable_twice() -> None:
    whole = manifest()
    admit(whole, is_strict=True)
    (container,) = pods_of(whole)[0]["containers"]
    container["env"].append({"name": "FLEETUNE_HOME", "value": "other"})
    with pytest.raises(Status) as refused:
        admit(whole, is_strict=True)
    assert refused.value.code == 422
    assert "env[" in refused.value.message and 'Duplicate value: {"name": "FLEETUNE_HOME"}' in refused.value.message


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_pull_secrets": ["a", "a"]},
        {"queue": "q" * 64},
        {"queue": ".".join(["q" * 60, "q" * 60])},
        {"root": "/opt/fleetune"},
        {"root": "/usr/local"},
    ],
    ids=str,
)
def test_what_no_run_could_start_with_is_refused(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        cluster(**wrong)


@pytest.mark.parametrize("name", CASES)
def test_the_whole_manifest_is_as_it_was(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(kubernetes, "installed_code", lambda: Code({}, "of-this-code"))
    job, changes = CASES[name]
    request = cluster(**changes).request(Job.model_validate(job), RUN_ID, 1, ("HF_TOKEN",))
    assert request == cluster(**changes).request(Job.model_validate(job), RUN_ID, 1, ("HF_TOKEN",))
    assert request.text == (GOLDEN / name).read_text()
    assert (request.name, request.secrets) == (f"{RUN_ID}-s1", ("HF_TOKEN",))
    assert "hf_secret" not in request.text


SERVICE = ServiceSpec(
    name="mine",
    base="/fleetune/bases/b",
    adapters={"support": "/fleetune/runs/a/output"},
    tenants="/fleetune/tenants.yaml",
    resources=Resources(gpus_per_node=2, grace=60),
)


def test_the_whole_manifest_of_a_service_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes, "installed_code", lambda: Code({}, "of-this-code"))
    backend = cluster(**QUEUED)
    request = backend.request(SERVICE, "mine-0123456789", 1)
    assert request == backend.request(SERVICE, "mine-0123456789", 1)
    assert request.text == (GOLDEN / "service.yaml").read_text()


def test_a_service_without_an_end_alone_is_taken() -> None:
    ends = SERVICE.model_copy(update={"resources": Resources(gpus_per_node=2, walltime=60)})
    with pytest.raises(SubmissionRefused, match="resources.walltime: allowed for a service on Kubernetes: none"):
        cluster().request(ends, "mine-0123456789", 1)


def test_the_pods_of_a_service_keep_to_the_rules_of_those_that_train() -> None:
    service = yaml.safe_load(cluster(**QUEUED).request(SERVICE, "mine-0123456789", 1).text)
    assert schema_errors(service) == []
    as_job = {"spec": {"rayClusterSpec": service["spec"]["rayClusterConfig"]}}
    for pod in pods_of(as_job):
        assert broken_rules(pod) == set()
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    arguments = application["args"]
    of_spec = {key: value for key, value in arguments.items() if key not in ("engines", "usage")}
    assert ServiceSpec.model_validate(of_spec) == SERVICE
    assert arguments["engines"] == 2 and config["http_options"] == {"host": "0.0.0.0", "port": 8000}


@pytest.mark.parametrize("name", CASES)
def test_strict_validation_takes_it(name: str) -> None:
    job, changes = CASES[name]
    assert schema_errors(manifest(job, **changes)) == []


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda spec: spec.update(bogus=1), "bogus"),
        (lambda spec: spec.update(entrypoint=3), "entrypoint"),
        (lambda spec: spec["rayClusterSpec"].pop("headGroupSpec"), "headGroupSpec"),
        (lambda spec: spec["rayClusterSpec"]["authOptions"].update(mode="nope"), "nope"),
        (lambda spec: spec.update(preRunningDeadlineSeconds=0), "minimum"),
    ],
)
def test_strict_validation_finds_what_a_server_refused(change: Callable[[Any], Any], error: str) -> None:
    whole = manifest()
    change(whole["spec"])
    (line,) = schema_errors(whole)
    assert error in line


@pytest.mark.parametrize("name", ["queued.yaml", "cpu.yaml"])
def test_pods_are_restricted(name: str) -> None:
    job, changes = CASES[name]
    for pod in pods_of(manifest(job, **changes)):
        assert broken_rules(pod) == set()
        assert all(container["securityContext"]["readOnlyRootFilesystem"] for container in pod["containers"])
        assert pod["automountServiceAccountToken"] is False


def test_the_network_of_the_host_is_all_that_is_not_restricted_with_it() -> None:
    job, changes = CASES["host_network.yaml"]
    for pod in pods_of(manifest(job, **changes)):
        assert broken_rules(pod) == {"shares_no_namespace"}


def breakages() -> dict[str, Callable[[dict[str, Any]], Any]]:
    """For each rule of the level a change to a pod that breaks it."""

    def context(pod: dict[str, Any]) -> Any:
        return pod["containers"][0]["securityContext"]

    return {
        "shares_no_namespace": lambda pod: pod.update(hostPID=True),
        "is_unprivileged": lambda pod: context(pod).update(privileged=True),
        "is_no_host_process": lambda pod: context(pod).update(windowsOptions={"hostProcess": True}),
        "has_plain_volumes": lambda pod: pod["volumes"].append({"name": "a", "hostPath": {"path": "/"}}),
        "takes_no_host_port": lambda pod: pod["containers"][0].update(ports=[{"hostPort": 80}]),
        "keeps_selinux": lambda pod: context(pod).update(seLinuxOptions={"user": "a"}),
        "keeps_apparmor": lambda pod: context(pod).update(appArmorProfile={"type": "Unconfined"}),
        "keeps_proc_mask": lambda pod: context(pod).update(procMount="Unmasked"),
        "has_safe_sysctls": lambda pod: pod["securityContext"].update(sysctls=[{"name": "kernel.msgmax"}]),
        "gains_no_privilege": lambda pod: context(pod).pop("allowPrivilegeEscalation"),
        "is_not_root": lambda pod: pod["securityContext"].pop("runAsNonRoot"),
        "has_no_root_user": lambda pod: pod["securityContext"].update(runAsUser=0),
        "filters_system_calls": lambda pod: pod["securityContext"].pop("seccompProfile"),
        "drops_capabilities": lambda pod: context(pod)["capabilities"].update(add=["IPC_LOCK"]),
    }


@pytest.mark.parametrize("rule", [rule.__name__ for rule in RULES])
def test_each_rule_finds_what_breaks_it(rule: str) -> None:
    pod = copy.deepcopy(pods_of(manifest())[0])
    breakages()[rule](pod)
    assert broken_rules(pod) == {rule}


def test_the_head_has_no_gpu_and_no_worker() -> None:
    whole = manifest(GPU_JOB)
    head, workers = (
        whole["spec"]["rayClusterSpec"]["headGroupSpec"],
        whole["spec"]["rayClusterSpec"]["workerGroupSpecs"],
    )
    assert head["rayStartParams"]["num-cpus"] == head["rayStartParams"]["num-gpus"] == "0"
    assert "nvidia.com/gpu" not in json.dumps(head)
    (group,) = workers
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (2, 2, 2)
    assert group["rayStartParams"]["num-gpus"] == "4"


def test_walltime_is_left_to_the_controller_and_grace_has_time_to_save() -> None:
    whole = manifest(GPU_JOB)
    assert "activeDeadlineSeconds" not in json.dumps(whole)
    for pod in pods_of(whole):
        assert pod["terminationGracePeriodSeconds"] == 120 + 5 + 15
        command = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert command[-3:] == ["clusters.pod_leaving", f"/fleetune/runs/{RUN_ID}", "120"]


def test_an_elastic_job_asks_for_the_fewest_nodes() -> None:
    whole = manifest(SHORT_JOB | {"resources": {"nodes": "2-4"}})
    assert whole["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 2
    assert shlex.split(whole["spec"]["entrypoint"])[-1] == "2"


def test_a_name_that_kuberay_does_not_start_is_refused() -> None:
    run_id = f"{'a' * 32}-0123456789"
    job = Job.model_validate(SHORT_JOB)
    assert len(cluster().request(job, run_id, 99).name) == 47
    with pytest.raises(SubmissionRefused, match="allowed: at most 47 characters"):
        cluster().request(job, run_id, 100)


def test_the_digest_tells_one_submission_from_another() -> None:
    whole = manifest()
    assert whole["metadata"]["annotations"][DIGEST_ANNOTATION] == digest_of(whole["spec"])
    assert digest_of(manifest(GPU_JOB)["spec"]) != digest_of(whole["spec"])


def test_variables_of_the_job_come_before_those_of_the_cluster() -> None:
    job = SHORT_JOB | {"env": {"A": "job", "B": "$(A)", "HF_HOME": "/hub"}}
    whole = manifest(job, env={"A": "cluster", "C": "cluster"}, secrets={"B": "b/key", "D": "d/key"})
    for pod in pods_of(whole):
        (container,) = pod["containers"]
        variables = variables_in(container)
        assert {name: variables[name] for name in "ABC"} == {"A": "job", "B": "$(A)", "C": "cluster"}
        assert (variables["HF_HOME"], variables["FLEETUNE_HOME"]) == ("/hub", "/fleetune")
        names = [variable["name"] for variable in container["env"]]
        assert len(names) == len(set(names))
        assert {"name": "D", "valueFrom": {"secretKeyRef": {"name": "d", "key": "key"}}} in container["env"]


@pytest.mark.parametrize("name", ["RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH", "FLEETUNE_HOME", "KUBERAY_GEN_RAY_START_CMD"])
def test_a_job_cannot_set_what_a_pod_is_known_by(name: str) -> None:
    with pytest.raises(SubmissionRefused, match=f"env: '{name}' is set in every pod"):
        cluster().request(Job.model_validate(SHORT_JOB | {"env": {name: "a"}}), RUN_ID)


def test_a_value_comes_through_what_kubernetes_expands() -> None:
    for value in ("$", "$$", "$(A)", "$$(A)", "$(", "a$", "$)(", "$(A", "$$$(A)$", ""):
        assert expanded(unexpanded(value), {"A": "x"}) == value
    assert expanded("$(A) $$(A) $(B)", {"A": "x"}) == "x $(A) $(B)"


def test_without_the_client_one_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(Unreachable, match=r"its client is not installed here; .* 'fleetune\[k8s\]'"):
        cluster().status([RUN_ID])
