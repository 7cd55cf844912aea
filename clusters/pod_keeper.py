"""`python -m clusters.pod_keeper CLUSTER`: one pass over the run folders, from a pod that has them.

CLUSTER is what the clusters file of whoever made the pod says, as JSON. A line is printed for each run that is open
while no RayJob carries it, and for each RayJob that is removed, as it has been over for long.
"""

import sys

from clusters.controllers import COLLECTED
from clusters.kubernetes import Kubernetes
from clusters.kubernetes_config import KubernetesConfig
from clusters.kubernetes_keeper import submit_again
from clusters.kubernetes_leftovers import remove_finished
from runfolder.folders import home


def pass_command(config: KubernetesConfig) -> list[str]:
    """How the pass is started for a cluster, as its runs are submitted from this machine."""
    environment = config.env | COLLECTED
    of_runs = config.model_copy(update={"context": None, "env": environment})
    python = config.python or "python"
    text = of_runs.model_dump_json()
    return [python, "-P", "-m", "clusters.pod_keeper", text]


def main(text: str) -> None:
    """Submit again what is due, and remove what is over."""
    config = KubernetesConfig.model_validate_json(text)
    cluster = Kubernetes.open(config, home())
    site = cluster.site
    snapshots = site.snapshots(site.ids())
    still_open = [run_id for run_id, run in snapshots.items() if run.result is None]
    newest = cluster.newest_submissions(still_open)
    statuses = submit_again(cluster, newest)
    for run_id, status in statuses.items():
        print(f"{run_id}: {status.reason}", flush=True)
    for name in remove_finished(cluster, snapshots):
        days = config.keep_finished
        print(f"RayJob {name}: removed, as it has been over for {days} days", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
