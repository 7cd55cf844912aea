"""What is right and wrong with a cluster of the clusters file, looked at where it is."""

import time

from clusters.base import Unreachable
from clusters.checks import Check
from clusters.checkup import check_cluster
from clusters.config import SshLink
from clusters.kubernetes_checkup import kubernetes_checks
from clusters.kubernetes_config import KubernetesConfig
from clusters.remote.lock import installed_lock
from clusters.remote.machine import CodeRefused, PythonMissing
from orchestrator.backends import config_of, far_machine, lock_for, root_of
from orchestrator.errors import InputError


def cluster_checks(name: str, test_job: bool) -> list[Check]:
    """Look at a cluster: over its link by one command there. Raises InputError for an unknown one."""
    config = config_of(name)
    if isinstance(config, KubernetesConfig):
        if test_job:
            raise InputError(f"--test-job: found cluster {name!r}, of kind kubernetes; allowed: one of kind slurm")
        return kubernetes_checks(name, config, root_of(config))
    wanted = {
        "name": name,
        "cluster": config.model_dump(mode="json"),
        "requirements": lock_for(config).requirements.splitlines(),
        "in_image": installed_lock().requirements.splitlines(),
        "test_job": test_job,
    }
    if not isinstance(config.link, SshLink):
        return [*check_cluster(wanted, root_of(config), None)]
    begin = time.monotonic()
    try:
        found = far_machine(name, config).check(wanted)
    except PythonMissing as error:
        return [Check("python", "fail", str(error), "say `setup` or `python` of the cluster")]
    except CodeRefused as error:
        return [Check("run root", "fail", str(error), "free some space there, or name another `root` of the cluster")]
    except Unreachable as error:
        mend = f"fleetune clusters connect {name}, or see what this says: ssh {config.link.ssh}"
        return [Check("link", "fail", str(error), mend)]
    elapsed_s = time.monotonic() - begin
    return [Check("link", "ok", f"{config.link.ssh}, {elapsed_s:.1f} s for all of this"), *found]
