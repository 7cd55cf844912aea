"""What a look at a Kubernetes cluster finds: what it is, what this account may do, and what runs will need there."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from clusters.base import CapacityNotTold, SubmissionRefused, Unreachable
from clusters.checks import Check
from clusters.kubernetes import Kubernetes
from clusters.kubernetes_access import NEEDED, NEEDED_WITH_QUEUE, WISHED, Permission, denied
from clusters.kubernetes_api import ApiObject, Rejected
from clusters.kubernetes_config import KubernetesConfig
from clusters.kubernetes_namespace import NamespaceLook
from clusters.kubernetes_nodes import nodes_of, unfit_nodes
from clusters.kueue import held_back, look_at_queue
from runfolder.job import Job

_OLDEST_SERVER = 30  # of 1.30: the input of a command in a pod can end
_SKEW = 2  # minor versions between client and server
_KUBERAY = "github.com/ray-project/kuberay/ray-operator/config/default?ref=v1.7.0"
_INSTALL_KUBERAY = f'kubectl apply --server-side -k "{_KUBERAY}"'
_VOLCANO = "scheduling.volcano.sh"
_SCHEDULER_PLUGINS = "scheduling.x-k8s.io"
_KEEPER = "fleetune-keeper-"  # as the names of its Jobs begin
_TRIAL = {"base": "trial", "data": "trial.jsonl", "train": {"steps": 1}}
_TRIAL_RUN = "trial-0000000000"


Look = Callable[[], Check]


class KubernetesLook(NamespaceLook):
    """A look at a cluster by its name in the clusters file, and at the namespace of its runs."""

    def checks(self) -> Iterator[Check]:
        """All checks; what needs one that failed is left out. A server that is away is the only one."""
        try:
            yield self._server()
        except Unreachable as error:
            mend = "mend what this says; then see: kubectl cluster-info, with the same kubeconfig"
            yield Check("server", "fail", str(error), mend)
            return
        has_reader = True
        for name, look in self._looks().items():
            if name == "packages" and not has_reader:
                continue
            try:
                check = look()
            except Unreachable as error:
                check = Check(name, "fail", str(error), self.install)
            has_reader = has_reader and not (name == "reader" and check.level == "fail")
            yield check

    def _looks(self) -> dict[str, Look]:
        """What is looked at behind the server, by name, in order."""
        looks: dict[str, Look] = {
            "operator": self._operator,
            "permissions": self._permissions,
            "nodes": self._nodes,
            "volume": self.volume,
            "secrets": self.secrets,
            "image": self.image,
            "reader": self.reader,
            "packages": self.packages,
            "quota": self.quota,
            "keeper": self._keeper,
        }
        if self.config.queue:
            looks["queue"] = self._queue
        if self.config.gang_scheduling:
            looks["gang"] = self._gang
        looks["trial"] = self._trial
        return looks

    def _server(self) -> Check:
        """The server's version beside the client's, which is made for one of them."""
        found = self.cluster.api.request("GET", "/version")
        import kubernetes

        digits = filter(str.isdigit, found["minor"])
        minor = int("".join(digits))
        major, _, _ = kubernetes.__version__.partition(".")
        made_for = int(major)
        text = f"{found['gitVersion']}; the client here, {kubernetes.__version__}, is made for 1.{made_for}"
        if minor < _OLDEST_SERVER:
            mend = f"upgrade the cluster to 1.{_OLDEST_SERVER} or newer"
            return Check("server", "fail", text, mend)
        if minor - made_for > _SKEW:
            mend = "pip install --upgrade 'fleetune[k8s]'"
            return Check("server", "warn", text, mend)
        if made_for - minor > _SKEW:
            mend = "upgrade the cluster when something is refused"
            return Check("server", "warn", text, mend)
        return Check("server", "ok", text)

    def _operator(self) -> Check:
        """KubeRay's version, by what its RayJob has: the operator itself is in somebody else's namespace."""
        try:
            api = self.cluster.api.request("GET", "/openapi/v3/apis/ray.io/v1")
        except Rejected as rejected:
            if rejected.status != 404:
                raise
            text = "the server knows no RayJob (ray.io/v1)"
            return Check("operator", "fail", text, _INSTALL_KUBERAY)
        rayjob = _schema_of_rayjob(api)
        if "preRunningDeadlineSeconds" not in rayjob["spec"]["properties"]:
            text = "RayJob of KubeRay older than 1.6"
            return Check("operator", "fail", text, _INSTALL_KUBERAY)
        if "jobStatusCheckFailureStartTime" not in rayjob["status"]["properties"]:
            text = "RayJob of KubeRay 1.6: a run whose head's node is lost seems to run for ever"
            return Check("operator", "warn", text, _INSTALL_KUBERAY)
        return Check("operator", "ok", "RayJob of KubeRay 1.7 or newer")

    def _permissions(self) -> Check:
        """What of all that is asked for this account may not do."""
        needed = (*NEEDED, *NEEDED_WITH_QUEUE) if self.config.queue else NEEDED
        lacking = denied(self.cluster.api, needed)
        missed = denied(self.cluster.api, WISHED)
        if not lacking and not missed:
            used = len(needed) + len(WISHED)
            return Check("permissions", "ok", f"all {used} that are used")
        words = []
        for permission in (*lacking, *missed):
            words.append(f"{permission} ({permission.what_for})")
        found = ", ".join(words)
        binding = self._binding(lacking, missed)
        mend = f"have an administrator run: {binding}"
        if not lacking:
            return Check("permissions", "warn", f"runs go on without these, which are not allowed: {found}", mend)
        return Check("permissions", "fail", f"not allowed: {found}", mend)

    def _binding(self, lacking: Sequence[Permission], missed: Sequence[Permission]) -> str:
        """The commands that give an account what it lacks; nodes are no namespace's, and have a role of their own."""
        commands = []
        in_namespace = [*lacking]
        for permission in missed:
            if permission.resource != "nodes":
                in_namespace.append(permission)
        if not lacking and in_namespace:
            commands.append(self.install)  # the role of an older version
        elif in_namespace:
            commands.append(f"{self.kubectl} create rolebinding NAME --role=fleetune-client --user=YOU")
        if len(in_namespace) < len(lacking) + len(missed):
            commands.append(f"{self.kubectl} create clusterrolebinding NAME --clusterrole=fleetune-nodes --user=YOU")
        return " && ".join(commands)

    def _nodes(self) -> Check:
        """What there is for workers, on nodes that they may be on."""
        config = self.config
        try:
            nodes = nodes_of(self.cluster.api)
        except CapacityNotTold:
            text = "this account may not see them: whether a job fits is not known before it is submitted"
            return Check("nodes", "warn", text, f"have an administrator run: {self._binding((), WISHED[-1:])}")
        unfit = unfit_nodes(nodes, config.node_selector, config.tolerations)
        fit = len(nodes) - len(unfit)
        if fit == 0:
            words = unfit[0] if unfit else "there are none"
            mend = "change node_selector or tolerations in the clusters file"
            return Check("nodes", "fail", f"no node is for workers: {words}", mend)
        capacity = self.cluster.capacity()
        resource = config.gpu_resource
        if capacity.kind == "cpu":
            text = f"no node has {resource}: jobs without GPUs alone; {capacity.total} cores"
            mend = "install the device plugin of your GPUs, or change gpu_resource"
            return Check("nodes", "warn", text, mend)
        amount = f"{capacity.total} of {resource}, {capacity.free} not asked for here"
        return Check("nodes", "ok", f"{amount}; {fit} of {len(nodes)} nodes fit")

    def _queue(self) -> Check:
        """Whether Kueue has the queue."""
        queue = str(self.config.queue)
        view = look_at_queue(self.cluster.api, queue)
        if view.trouble:
            mend = f"see: {self.kubectl} get localqueue {queue}"
            return Check("queue", "fail", view.trouble, mend)
        return Check("queue", "ok", f"{view.waiting} wait in {queue}")

    def _keeper(self) -> Check:
        """Whether Kueue holds passes of the keeper back: a CronJob says nothing of that."""
        held = held_back(self.cluster.api, _KEEPER)
        for name, why in held.items():
            found = f"Kueue holds Job {name} back ({why})"
            return Check("keeper", "warn", found, self.from_own_queue)
        return Check("keeper", "ok", "Kueue holds no pass of one back")

    def _gang(self) -> Check:
        """Which batch schedulers have their API here; which of them KubeRay uses is in its operator's options."""
        answer = self.cluster.api.request("GET", "/apis")
        groups = {group["name"] for group in answer["groups"]}
        if _VOLCANO in groups:
            return Check("gang", "ok", f"Volcano is here ({_VOLCANO}), if KubeRay's operator was started with it")
        mend = "name a `queue` of Kueue's, not `gang_scheduling`; or have KubeRay's operator started with Volcano"
        if _SCHEDULER_PLUGINS in groups:
            text = f"scheduler-plugins is here ({_SCHEDULER_PLUGINS}): with it KubeRay makes no pods of a RayJob"
            return Check("gang", "fail", text, mend)
        text = "no Volcano is here; YuniKorn would need labels (yunikorn.apache.org/app-id) that runs have not"
        return Check("gang", "warn", text, mend)

    def _trial(self) -> Check:
        """Whether the server would take a RayJob: strict validation, quota, and what else looks at new ones."""
        job = Job.model_validate(_TRIAL)
        request = self.cluster.request(job, _TRIAL_RUN)
        try:
            self.cluster.forecast(request)
        except SubmissionRefused as refused:
            mend = "mend what is above, or what this says"
            return Check("trial", "fail", str(refused), mend)
        return Check("trial", "ok", "a RayJob would be taken")


def _schema_of_rayjob(api: ApiObject) -> ApiObject:
    """The parts of a RayJob in what the server says of the API of KubeRay; raises Unreachable where it has none."""
    for schema in api["components"]["schemas"].values():
        for kind in schema.get("x-kubernetes-group-version-kind", []):
            if kind["kind"] == "RayJob":
                parts: ApiObject = schema["properties"]
                return parts
    raise Unreachable("Kubernetes: the server says nothing of RayJob's parts (/openapi/v3); is KubeRay new there?")


def kubernetes_checks(name: str, config: KubernetesConfig, home: Path) -> list[Check]:
    """What a look at the cluster of this name finds."""
    cluster = Kubernetes(config, home)
    look = KubernetesLook(name, cluster)
    return list(look.checks())
