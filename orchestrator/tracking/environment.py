"""The machine under a controller: what is installed, which GPUs, and how busy they are."""

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("fleetune", "torch", "deepspeed", "transformers", "peft", "ray", "mlflow")


def environment() -> dict[str, str]:
    """Versions, host and GPU names, as short strings; imports nothing heavy."""
    found = {"python": platform.python_version(), "host": platform.node(), "platform": platform.platform()}
    found.update({name: installed for name in PACKAGES if (installed := _version(name))})
    if gpus := _gpus():
        found["gpus"] = ", ".join(gpus)
    return found


class Sampler:
    """Utilisation of this machine, under the names that MLflow gives them."""

    def __init__(self) -> None:
        self._monitors = _monitors()

    def sample(self) -> dict[str, float]:
        """One reading of CPU, memory, disk and (where there are some) GPUs."""
        found: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            found.update({f"system/{key}": float(value) for key, value in monitor.aggregate_metrics().items()})
            monitor.clear_metrics()
        return found


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
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []
