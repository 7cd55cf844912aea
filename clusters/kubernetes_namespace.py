"""What a look at the namespace of runs finds: volume, Secrets, the reader's pod with its image, and quotas."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from clusters.base import Unreachable
from clusters.checks import Check, Level
from clusters.kubernetes import Kubernetes
from clusters.kubernetes_access import Permission, is_allowed
from clusters.kubernetes_answers import is_held_by_kueue
from clusters.kubernetes_api import JSON, ApiObject, Rejected
from clusters.kubernetes_config import KubernetesConfig
from clusters.kubernetes_nodes import quantity
from clusters.pod_exec import reader_pod
from clusters.remote.lock import installed_lock
from k8s.names import parse_secret_key
from k8s.planned import READER_LABEL

_SERVER = "kubernetes.default.svc"  # the API server, as pods know it
_SHOWN_DIGITS = 12  # of a digest
_WITHOUT_VALUES = {**JSON, "Accept": "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"}


@dataclass(frozen=True)
class NamespaceLook:
    """A look at the namespace of a cluster by its name in the clusters file. Each may raise Unreachable."""

    name: str
    cluster: Kubernetes

    @property
    def config(self) -> KubernetesConfig:
        """What the clusters file says of it."""
        return self.cluster.config

    @property
    def install(self) -> str:
        """The command that makes what a namespace lacks."""
        return f"fleetune k8s install --cluster {self.name}"

    @property
    def kubectl(self) -> str:
        """The beginning of a command in the namespace."""
        command = "kubectl"
        if self.config.context:
            command += f" --context {self.config.context}"
        return f"{command} -n {self.config.namespace}"

    def volume(self) -> Check:
        """Whether the volume has its storage, which many nodes can write."""
        name = self.config.volume
        volume = self._found(f"persistentvolumeclaims/{name}")
        if volume is None:
            mend = f"{self.install} --storage 2Ti --storage-class CLASS (see: kubectl get storageclass)"
            return Check("volume", "fail", f"there is no PersistentVolumeClaim {name}", mend)
        spec = volume["spec"]
        status = volume.get("status", {})
        modes = "/".join(spec["accessModes"])
        kind = f"class {spec.get('storageClassName', 'none')}, {modes}"
        phase = status.get("phase", "new")
        if phase != "Bound":
            text = f"{name} is {phase}, not bound ({kind})"
            mend = f"see why: {self.kubectl} describe pvc {name}"
            return Check("volume", "fail", text, mend)
        if "ReadWriteMany" not in spec["accessModes"]:
            text = f"{name} is for one node alone ({kind})"
            mend = f"name another `volume`, then: {self.install} --storage-class CLASS"
            return Check("volume", "fail", text, mend)
        size = status.get("capacity", {}).get("storage", "?")
        return Check("volume", "ok", f"{name} has {size} ({kind})")

    def secrets(self) -> Check:
        """Whether the Secrets are there that pods are to have, where this account may see that; no value is read."""
        config = self.config
        named = [*config.image_pull_secrets]
        for text in config.secrets.values():
            name, _ = parse_secret_key(text)
            named.append(name)
        if not named:
            return Check("secrets", "ok", "pods are to have none")
        names = ", ".join(dict.fromkeys(named))
        if not is_allowed(self.cluster.api, Permission("get", "secrets", "doctor")):
            text = f"{names}: this account may not see whether they are there"
            return Check("secrets", "ok", text)
        for name in named:
            if self._found(f"secrets/{name}", _WITHOUT_VALUES) is None:
                mend = self._secret_command(name)
                return Check("secrets", "fail", f"there is no Secret {name}", mend)
        return Check("secrets", "ok", names)

    def image(self) -> Check:
        """Whether the image can be pulled: the reader's pod has it."""
        pods = self.cluster.api.pods(f"{READER_LABEL}=true")
        if not pods:
            text = "no pod of the reader has tried to pull it"
            return Check("image", "fail", text, self.install)
        images = set()
        for pod in pods:
            statuses = pod["status"].get("containerStatuses")
            if not statuses:
                pod_name = pod["metadata"]["name"]
                text = f"pod {pod_name} has not pulled it yet"
                return Check("image", "warn", text, self._mend_of_reader(pods))
            for container in statuses:
                state = container.get("state", {})
                waiting = state.get("waiting", {})
                reason = waiting.get("reason", "")
                if "Image" in reason:
                    message = waiting.get("message", "")
                    text = f"{reason}: {message}"
                    named = ", ".join(self.config.image_pull_secrets) or "none is named"
                    mend = f"image_pull_secrets ({named}): have one that may pull it"
                    return Check("image", "fail", text, mend)
            for container in pod["spec"]["containers"]:
                images.add(container["image"])
        if self.config.image not in images:
            text = "the reader has another one than runs will have"
            return Check("image", "warn", text, self.install)
        name, _, digest = self.config.image.partition("@sha256:")
        return Check("image", "ok", f"{name}, sha256 {digest[:_SHOWN_DIGITS]}...")

    @property
    def from_own_queue(self) -> str:
        """How what is no run is admitted where Kueue manages every pod of the namespace."""
        how = "name a LocalQueue that runs do not use as `reader_queue`"
        other = "have Kueue manage neither pods nor Jobs here"
        return f"{how}, then: {self.install} (and apply the keeper anew); or {other}"

    def reader(self) -> Check:
        """Whether the reader's pod answers for the run folders."""
        pods = self.cluster.api.pods(f"{READER_LABEL}=true")
        try:
            pod = reader_pod(self.cluster.api)
            count = len(self.cluster.site.ids())
        except Unreachable as error:
            mend = self._mend_of_reader(pods)
            return Check("reader", "fail", str(error), mend)
        text = f"pod {pod} has {count} runs in {self.cluster.home}/runs"
        return Check("reader", "ok", text)

    def _mend_of_reader(self, pods: Sequence[ApiObject]) -> str:
        """What to do about a reader that does not answer."""
        if not pods:
            return self.install
        if any(map(is_held_by_kueue, pods)):
            return self.from_own_queue
        names = " ".join(pod["metadata"]["name"] for pod in pods)
        return f"wait while it starts, or see why it does not: {self.kubectl} describe pod {names}"

    def packages(self) -> Check:
        """Whether the image has what runs need, in our versions; whether names are resolved, the volume written."""
        wanted = {
            "name": self.name,
            "cluster": self.config.model_dump(mode="json"),
            "requirements": installed_lock().requirements.splitlines(),
            "server": _SERVER,
            "test_job": False,
        }
        said = []
        for check in self.cluster.machine.check(wanted):
            if check.level == "fail":
                return check
            said.append(f"{check.name}: {check.found}")
        return Check("packages", "ok", "; ".join(said))

    def quota(self) -> Check:
        """What the quotas of the namespace leave."""
        answer = self.cluster.api.request("GET", f"{self._path}/resourcequotas")
        level: Level = "ok"
        words = []
        for quota in answer["items"]:
            status = quota.get("status", {})
            used = status.get("used", {})
            for resource, most in status.get("hard", {}).items():
                taken = used.get(resource, "0")
                words.append(f"{resource} {taken} of {most}")
                if quantity(taken) >= quantity(most) > 0:
                    level = "warn"
        mend = f"end runs, or have it raised; see: {self.kubectl} describe quota"
        found = ", ".join(words) or "none"
        return Check("quota", level, found, mend)

    @property
    def _path(self) -> str:
        """The path of what the namespace has of core kinds."""
        return f"/api/v1/namespaces/{self.config.namespace}"

    def _found(self, place: str, headers: Mapping[str, str] = JSON) -> ApiObject | None:
        """An object of the namespace; None where it is not there."""
        try:
            return self.cluster.api.request("GET", f"{self._path}/{place}", headers=headers)
        except Rejected as rejected:
            if rejected.status != 404:
                raise
            return None

    def _secret_command(self, name: str) -> str:
        """The command that makes a Secret, whose value is on no command line."""
        create = f"{self.kubectl} create secret generic {name}"
        if name in self.config.image_pull_secrets:
            kind = "--type=kubernetes.io/dockerconfigjson"
            return f"{create} {kind} --from-file=.dockerconfigjson=$HOME/.docker/config.json"
        return f"{create} --from-file=KEY=FILE"
