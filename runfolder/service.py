"""The spec of a service: what is served on a cluster, and to whom. It is a run there, in the place of a job."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator

from runfolder.job import JOB_NAME
from runfolder.resources import Resources, Section
from runfolder.variables import Variables


class ServiceSpec(Section):
    """A base and its adapters, served until somebody ends that. Paths are those of the cluster."""

    kind: Literal["service"] = "service"
    name: str = Field("service", description="what run ids begin with, as a job's name")
    base: str = Field(min_length=1, description="a hub id, or a folder")
    adapters: dict[str, str] = Field({}, description="folders of adapters, by the names that clients ask for")
    tenants: str = Field(min_length=1, description="the file that says who has keys")
    resources: Resources = Resources(grace=60)
    env: Variables = Field({}, description="variables for the service, like HF_HUB_OFFLINE: 1")

    @field_validator("name")
    @classmethod
    def _is_name(cls, name: str) -> str:
        if not JOB_NAME.fullmatch(name):
            raise ValueError("must be at most 32 of a-z, 0-9 and -, from a letter on, not ending with -")
        return name

    @field_validator("resources")
    @classmethod
    def _is_on_one_node(cls, resources: Resources) -> Resources:
        if resources.nodes != 1:
            raise ValueError(f"nodes: found {resources.nodes}; allowed for a service: 1")
        return resources

    def dump(self) -> dict[str, Any]:
        """The spec as plain data, for the record of its run."""
        return self.model_dump(mode="json")


def is_service(plain: Mapping[str, Any]) -> bool:
    """Whether the spec in a record is that of a service."""
    return plain.get("kind") == "service"
