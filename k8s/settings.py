"""What is said of a Kubernetes cluster: which image runs, where its pods may be, and what they get."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from k8s.names import (
    ImageName,
    LabelKey,
    LabelValue,
    NamespaceName,
    ObjectName,
    QueueName,
    ResourceName,
    SecretKeyText,
    TaintText,
)


def _as_choice(values: object) -> object:
    """Let a bare text stand for a choice of one."""
    if isinstance(values, str):
        return [values]
    return values


_OTHER_ACCOUNTS = ("fleetune-client", "fleetune-keeper")
LabelChoice = Annotated[tuple[LabelValue, ...], BeforeValidator(_as_choice), Field(min_length=1)]
Selector = dict[LabelKey, LabelChoice]


class KubernetesSection(BaseModel):
    """A part of the settings: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class HeadPodSettings(KubernetesSection):
    """The pod that runs controller and driver, which has no GPU."""

    cpus: int = Field(2, ge=1, le=1024, description="cores of the head pod")
    memory: int = Field(8, ge=1, le=65536, description="GiB of the head pod")
    node_selector: Selector = Field({}, description="labels of nodes that the head pod may be on")
    tolerations: tuple[TaintText, ...] = Field(
        (), description="taints that the head pod tolerates, as key=value:effect"
    )


class KubernetesSettings(KubernetesSection):
    """A namespace of a Kubernetes cluster that has the KubeRay operator."""

    context: str | None = Field(
        None, min_length=1, max_length=1024, description="the context of the kubeconfig; null: its current one"
    )
    namespace: NamespaceName = Field("fleetune", description="where runs are, with all that `install` makes")
    image: ImageName = Field(description="the image of all pods, by its digest")
    image_pull_secrets: tuple[ObjectName, ...] = Field((), description="Secrets for the image's registry")
    volume: ObjectName = Field(
        "fleetune", description="the ReadWriteMany PersistentVolumeClaim that has the run folders"
    )
    service_account: ObjectName = Field("fleetune-run", description="the account of the pods, which may do nothing")
    secrets: dict[str, SecretKeyText] = Field(
        {}, description="variables from Secrets of the namespace, like HF_TOKEN: hf/token"
    )
    user: int = Field(1000, ge=1, lt=1 << 31, description="the numeric user and group of the pods, never root")

    gpu_resource: ResourceName = Field("nvidia.com/gpu", description="the resource that a worker with a GPU asks for")
    extended_resources: dict[ResourceName, Annotated[int, Field(ge=1)]] = Field(
        {}, description="other resources of device plugins for each worker pod, like rdma/hca: 1"
    )
    cpus_per_worker: int = Field(4, ge=1, le=1024, description="cores for each worker")
    memory_per_worker: int = Field(16, ge=1, le=65536, description="GiB for each worker")
    shared_memory: int = Field(
        4, ge=1, le=65536, validate_default=True, description="GiB of /dev/shm for each pod, out of its memory"
    )
    host_network: bool = Field(
        False, description="pods use the network of their nodes, as some RDMA needs; not `restricted` any more"
    )

    egress_ports: tuple[Annotated[int, Field(ge=1, le=65535)], ...] = Field(
        (443, 5000), min_length=1, description="TCP ports by which pods reach the hub, MLflow, and a proxy"
    )

    node_selector: Selector = Field({}, description="labels of nodes that workers may be on; a list: any of these")
    tolerations: tuple[TaintText, ...] = Field((), description="taints that workers tolerate, as key=value:effect")
    head_pod: HeadPodSettings = Field(
        HeadPodSettings(), validate_default=True, description="the pod that runs controller and driver"
    )
    priority_class: ObjectName | None = Field(None, description="the PriorityClass of the pods")
    queue: QueueName | None = Field(None, description="Kueue's LocalQueue that admits runs whole; null: none")
    queue_priority: QueueName | None = Field(None, description="Kueue's WorkloadPriorityClass of runs")
    reader_queue: QueueName | None = Field(
        None, description="the LocalQueue of reader and keeper, where Kueue manages every pod of the namespace"
    )
    gang_scheduling: bool = Field(
        False, description="the batch scheduler that KubeRay was started with places a run's pods together or not"
    )

    keep_finished: int = Field(
        30, ge=1, le=3650, description="days that the keeper leaves the RayJobs of runs that have ended"
    )

    @field_validator("shared_memory")
    @classmethod
    def _fits_workers(cls, size: int, info: ValidationInfo) -> int:
        memory = info.data.get("memory_per_worker", size + 1)
        if size >= memory:
            raise ValueError(f"found {size}; allowed: less than memory_per_worker, {memory}, which it is a part of")
        return size

    @field_validator("head_pod")
    @classmethod
    def _has_shared_memory(cls, head_pod: HeadPodSettings, info: ValidationInfo) -> HeadPodSettings:
        shared = info.data.get("shared_memory", 0)
        if shared >= head_pod.memory:
            raise ValueError(
                f"memory: found {head_pod.memory}; allowed: more than shared_memory, {shared}, a part of it"
            )
        return head_pod

    @field_validator("service_account")
    @classmethod
    def _is_of_runs(cls, account: str) -> str:
        if account in _OTHER_ACCOUNTS:
            raise ValueError(f"found {account!r}, which may make RayJobs; allowed: one that may do nothing")
        return account

    @field_validator("egress_ports", "image_pull_secrets")
    @classmethod
    def _are_different(cls, values: tuple[int | str, ...]) -> tuple[int | str, ...]:
        if len(set(values)) < len(values):
            raise ValueError("found one of them twice; allowed: each once")
        return values

    @field_validator("queue_priority")
    @classmethod
    def _has_queue(cls, priority: str | None, info: ValidationInfo) -> str | None:
        if priority and "queue" in info.data and info.data["queue"] is None:
            raise ValueError("Kueue's priorities are for what has a queue: give queue, too")
        return priority

    @field_validator("gang_scheduling")
    @classmethod
    def _is_alone(cls, is_gang: bool, info: ValidationInfo) -> bool:
        if is_gang and info.data.get("queue"):
            raise ValueError("found beside queue, where Kueue admits runs whole; allowed: one of them")
        return is_gang
