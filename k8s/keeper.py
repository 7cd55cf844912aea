"""The keeper of a namespace, for whoever wants one: a CronJob that submits runs again with all laptops closed."""

from collections.abc import Sequence

import yaml

from k8s.install import BASE, BaseObject, name_queue, run_as
from k8s.pods import unexpanded
from k8s.settings import KubernetesSettings

KEEPER = BASE.parent / "overlays" / "keeper" / "keeper.yaml"


def keeper_manifests(settings: KubernetesSettings, home: str, code: str, command: Sequence[str]) -> list[BaseObject]:
    """The objects of the keeper, under the names that the settings have.

    `home` is where its pod has the volume, `code` the folder of the code that it runs, `command` what it runs.
    """
    objects = list(yaml.safe_load_all(KEEPER.read_text()))
    for each in objects:
        each["metadata"]["namespace"] = settings.namespace
        for subject in each.get("subjects", ()):
            subject["namespace"] = settings.namespace
        if each["kind"] == "CronJob":
            job = each["spec"]["jobTemplate"]
            name_queue(job, settings)
            pod = job["spec"]["template"]["spec"]
            _adapt(pod, settings, home)
            (container,) = pod["containers"]
            container["command"] = [unexpanded(word) for word in command]
            _set(container, {"FLEETUNE_HOME": home, "PYTHONPATH": code})
    return objects


def _adapt(pod: BaseObject, settings: KubernetesSettings, home: str) -> None:
    """Have the pod be like those of runs, but for its account, which may make RayJobs."""
    account = pod["serviceAccountName"]
    run_as(pod, settings, home)
    pod["serviceAccountName"] = account


def _set(container: BaseObject, variables: dict[str, str]) -> None:
    """Give a container these variables, in place of those of their names."""
    env = []
    for name, text in variables.items():
        env.append({"name": name, "value": unexpanded(text)})
    for variable in container["env"]:
        if variable["name"] not in variables:
            env.append(variable)
    container["env"] = env
