"""The machine under a controller: what is installed, which GPUs, and how busy they are."""

import getpass
import math
import os
import platform
import shutil
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from runfolder.chain import Attempt, attempts

SAMPLE_S = 10.0
PACKAGES = ("fleetune", "torch", "deepspeed", "transformers", "peft", "ray", "mlflow")


def environment() -> dict[str, str]:
    """Versions, host and GPU names, as short strings; imports nothing heavy."""
    facts = {"python": platform.python_version(), "host": platform.node(), "platform": platform.platform()}
    for package in PACKAGES:
        installed = _version(package)
        if installed:
            facts[package] = installed
    if gpus := _gpus():
        facts["gpus"] = ", ".join(gpus)
    return facts


def machine_tags() -> dict[str, str]:
    """This machine and its user, as tags of the run that is here."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # in a container the number of a user may have no name
        user = str(os.getuid())
    tags = {"mlflow.user": user}
    for name, text in environment().items():
        tags[f"fleetune.env.{name}"] = text
    return tags


class Utilisation:
    """How busy this machine is while an attempt runs, under the names that MLflow gives it."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._monitors: list[Any] | None = None
        self._sampled_at = -math.inf

    def sample(self) -> None:
        """Append the utilisation to the attempt's rows, now and then; its step is the age of the run in seconds."""
        if time.monotonic() - self._sampled_at < SAMPLE_S:
            return
        self._sampled_at = time.monotonic()
        now = time.time()
        first = attempts(self._attempt.run_dir)[0]
        age_s = int(now - first.claim["time"])
        self._attempt.append("system.jsonl", {"step": age_s, "time": now, **self._read()})

    def _read(self) -> dict[str, float]:
        """One reading of CPU, memory, disk and (where there are some) GPUs."""
        if self._monitors is None:
            self._monitors = _monitors()
        metrics: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            for name, value in monitor.aggregate_metrics().items():
                metrics[f"system/{name}"] = float(value)
            monitor.clear_metrics()
        return metrics


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

    monitors = [CPUMonitor(), DiskMonitor()]
    try:
        monitors.append(GPUMonitor())
    except (ImportError, RuntimeError):
        return monitors  # its way to say that there is no NVIDIA GPU
    return monitors


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    tool = shutil.which("nvidia-smi")
    if not tool:
        return []
    query = [tool, "--query-gpu=name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return []
    if answer.returncode != 0:
        return []
    return answer.stdout.strip().splitlines()
