"""Values that YAML, Kubernetes or a shell would take for something else: refused in one line, or carried as data.

A manifest that is made has what was meant and nothing beside it, whoever reads it: YAML, strict validation, the
kubelet that expands variables, and the shell that Ray gives the entrypoint to.
"""

import json
import random
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_rules import schema_errors, variables_in
from pod_security import broken_rules
from sampling import SEED

from clusters.base import SubmissionRefused
from clusters.environment import SECRETS
from clusters.kubernetes import Kubernetes
from clusters.kubernetes_config import KubernetesConfig
from clusters.pod_keeper import pass_command
from k8s.install import install_manifests
from k8s.keeper import keeper_manifests
from k8s.text import manifests_text
from orchestrator.clusters_file import read_clusters
from orchestrator.errors import InputError
from orchestrator.planning import spec

LONGEST_LINE = 1000  # characters of a message
RUN_ID = "a-0123456789"
IMAGE = f"registry.example.org/team/fleetune@sha256:{'0' * 64}"
_PARTS = (
    *("'", '"', "`id`", "$(id)", "$(HOME)", "$$(HOME)", "$", "$$", "$(", ")", "; id; ", "\nid\n", "&& id", "\\"),
    *("${IFS}", ": ", " #", "- ", "? ", "---\n", "\n...\n", "!!python/object:os.system", "&a", "*a", "<<", "%YAML"),
    *("{{.Values}}", "yes", "No", "y", "on", "null", "~", "0o17", "017", "0x1f", "1_000", "1e3", ".inf", ".nan"),
    *("12:30:45", "2026-11-29", "1.0", "=", "true", "-", "--", ".", "..", "/", "_", "@", ":", "\t", "\r", " "),
    *("\x1b[2J", "\0", "\u2028", "\x85", "\ufeff", "ü", "日本", "\U0001f600", "\u202e", "\ud800", "x" * 65536),
    *("a" * 63, "a" * 64, "a", "b1", "A", "Z9", "kubernetes.io", "example.org/gpu", "nvidia.com/gpu", "team-a"),
    *("hf/token", "key=value:NoSchedule"),
)
_NAMES = (
    *("PATH", "LD_PRELOAD", "HOME", "RAY_ADDRESS", "RAY_AUTH_TOKEN", "FLEETUNE_HOME", "KUBERNETES_SERVICE_HOST"),
    *("HF_TOKEN", "A\n", "é", "A-B", "A.B", "A=B", "1A"),
)
_PLAIN_NAMES = tuple(f"PLAIN{number}" for number in range(16))
_TEXTS = (
    *("context", "namespace", "image", "volume", "service_account", "gpu_resource", "priority_class"),
    *("queue", "queue_priority", "reader_queue", "root", "python", "link", "user"),
)
_LISTS = ("image_pull_secrets", "tolerations", "setup")
_MAPPINGS = ("node_selector", "extended_resources", "secrets", "env", "head_pod")


@dataclass
class Case:
    """A job and a cluster with hostile values somewhere in them."""

    rng: random.Random
    job: dict[str, Any] = field(default_factory=lambda: {"base": "b", "data": "d.jsonl", "train": {"steps": 1}})
    cluster: dict[str, Any] = field(default_factory=lambda: {"kind": "kubernetes", "image": IMAGE})

    def __post_init__(self) -> None:
        for _ in range(self.rng.choice([1, 1, 2])):
            where = self.rng.randrange(10)
            if where < 5:
                self.job.setdefault("env", {})[self.rng.choice([self.text(), *_NAMES, *_PLAIN_NAMES])] = self.text()
            elif where == 5:
                self.job["name"] = self.text()
            elif where == 6:
                self.cluster[self.rng.choice(_LISTS)] = [self.text()]
            elif where == 7:
                self.cluster[self.rng.choice(_MAPPINGS)] = {self.rng.choice([self.text(), *_NAMES]): self.text()}
            elif where == 8:
                self.cluster[self.rng.choice(["env", "secrets"])] = {"PLAIN": self.text()}
            else:
                self.cluster[self.rng.choice(_TEXTS)] = self.text()

    def text(self) -> str:
        """A few parts in a row."""
        return "".join(self.rng.choices(_PARTS, k=self.rng.choice([1, 1, 2, 3])))


def check(case: Case, clusters: Path) -> str:
    """Take a case as far as it goes; gives what refused it, or nothing."""
    clusters.write_text(yaml.safe_dump({"k8s": case.cluster}))
    try:
        config = read_clusters()["k8s"]
        assert isinstance(config, KubernetesConfig)
        job = spec.validate(case.job)
        request = Kubernetes(config, Path(config.root)).request(job, RUN_ID, 1, ("HF_TOKEN",))
    except (InputError, SubmissionRefused) as error:
        return str(error)
    assert request.text.isascii() and "hf_secret" not in request.text
    check_manifest(yaml.safe_load(request.text), config, {**config.env, **job.env})
    check_installed(config)
    return ""


def check_installed(config: KubernetesConfig) -> None:
    """What is applied once is what was meant, too."""
    made = install_manifests(config, config.root)
    made += keeper_manifests(config, config.root, f"{config.root}/code/a", pass_command(config))
    assert [*yaml.safe_load_all(manifests_text(made))] == made
    for each in made:
        assert each["metadata"].get("namespace", config.namespace) == config.namespace
        labels = {**each["metadata"].get("labels", {})}
        if each["kind"] == "CronJob":
            labels |= each["spec"]["jobTemplate"].get("metadata", {}).get("labels", {})
        assert all(is_text(value) and re.fullmatch(r"([\w.-]*\w)?", value, re.ASCII) for value in labels.values())


def check_manifest(whole: dict[str, Any], config: KubernetesConfig, environment: dict[str, str]) -> None:
    """A manifest keeps to the rules, and has these variables and this command."""
    assert json.loads(json.dumps(whole)) == whole
    assert schema_errors(whole) == []
    assert all(is_text(value) for value in whole["metadata"]["labels"].values())
    assert all(re.fullmatch(r"([\w.-]*[\w])?", value) for value in whole["metadata"]["labels"].values())
    python = config.python or "python"
    run_dir = f"{config.root}/runs/{RUN_ID}"
    entrypoint = [python, "-P", "-m", "clusters.pod_job", run_dir, f"{RUN_ID}-s1", "1"]
    assert shlex.split(whole["spec"]["entrypoint"]) == entrypoint
    ray_cluster = whole["spec"]["rayClusterSpec"]
    for group in (ray_cluster["headGroupSpec"], *ray_cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert broken_rules(pod) == set()
        (container,) = pod["containers"]
        variables = variables_in(container)
        assert {name: variables[name] for name in environment} == environment
        assert variables["FLEETUNE_HOME"] == config.root
        assert all(re.fullmatch(r"[\w./-]+", option) for option in group["rayStartParams"].values())
        assert len(variables) <= len(environment) + 5


def is_text(value: object) -> bool:
    """Whether a value is a text that a label may be."""
    return isinstance(value, str) and len(value) <= 63


@pytest.mark.parametrize("cases", [100, pytest.param(300, marks=pytest.mark.chaos)])
def test_hostile_values_are_data_or_refused(cases: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRETS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("FLEETUNE_CLUSTERS", str(tmp_path / "clusters.yaml"))
    refused = 0
    for number in range(cases):
        case = Case(random.Random(1000 * SEED + number))
        lines = check(case, tmp_path / "clusters.yaml").splitlines()
        refused += bool(lines)
        assert len(lines) <= 2 and all(len(line) < LONGEST_LINE and line.isprintable() for line in lines), lines
    assert cases // 4 < refused < cases * 3 // 4, refused
