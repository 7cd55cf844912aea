"""The link to the pod that has the run folders, through the API of Kubernetes."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PodLink:
    """A namespace whose reader runs commands."""

    context: str | None
    namespace: str

    def process(self, command: Sequence[str]) -> list[str]:
        """The process here that runs a command there (clusters/pod_exec.py)."""
        context = self.context or ""
        start = [sys.executable, "-P", "-m", "clusters.pod_exec"]
        return [*start, context, self.namespace, *command]

    def foreground(self) -> list[str]:
        """No command: the kubeconfig says how one logs in."""
        return []

    def remedy(self, stderr: str) -> str:  # noqa: ARG002
        """What is wrong says how to fix it."""
        return ""
