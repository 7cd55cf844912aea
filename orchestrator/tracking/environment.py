"""The machine under a controller: what is installed, which GPUs, and how busy they are."""

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

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


class Sampler:
    """Utilisation of this machine, under the names that MLflow gives them."""

    def __init__(self) -> None:
        self._monitors = _monitors()

    def sample(self) -> dict[str, float]:
        """One reading of CPU, memory, disk and (where there are some) GPUs."""
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
