"""What the workers of a job need, and what every section of a job has."""

import re
from collections.abc import Iterable
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

_SURROGATE = re.compile("[\ud800-\udfff]")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def read_duration(value: object) -> object:
    """Seconds, where a value is like `90s`, `30m`, `8h`, `2d`; any other value as it is."""
    if not isinstance(value, str):
        return value
    duration = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", value)
    if duration is None:
        return value
    amount, unit = duration.groups()
    return int(float(amount) * _UNITS[unit])


def as_mapping(key: str) -> BeforeValidator:
    """Let a bare string stand for a mapping with one key."""

    def wrap(value: object) -> object:
        if isinstance(value, str):
            return {key: value}
        return value

    return BeforeValidator(wrap)


class Section(BaseModel):
    """A part of a job, or of the clusters file: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _is_unicode(cls, value: object) -> object:
        texts: Iterable[object] = [value]
        if isinstance(value, dict):
            texts = [*value, *value.values()]
        elif isinstance(value, tuple):
            texts = value
        for text in texts:
            if isinstance(text, str) and _SURROGATE.search(text):  # no file of the run could hold it
                raise ValueError("must be Unicode text, without halves of surrogate pairs")
        return value


class Resources(Section):
    """What the workers need. A worker is one GPU, or one process where there is none."""

    nodes: Annotated[int, Field(ge=1)] | Annotated[str, Field(pattern=r"^[1-9]\d{0,5}-[1-9]\d{0,5}$")] = Field(
        1, description="machines that the workers are spread over; like 2-4: as many of them as there are"
    )
    gpus_per_node: int | None = Field(
        None, ge=1, description="GPUs on each node, a worker for each; null: as workers_per_node says"
    )
    workers_per_node: int | None = Field(
        None,
        ge=1,
        description="workers on each node, where there is no GPU; null: one, unless gpus_per_node says more",
    )
    walltime: Annotated[int | None, BeforeValidator(read_duration)] = Field(
        None, ge=1, description="seconds, or like 90s, 30m, 8h, 2d, after which an attempt must end; null: no limit"
    )
    grace: Annotated[int, BeforeValidator(read_duration)] = Field(
        30, ge=0, description="how long a run that must end has to save: seconds, or like 2m"
    )

    @model_validator(mode="after")
    def _gpus_or_workers(self) -> "Resources":
        if self.gpus_per_node and self.workers_per_node:
            raise ValueError("give gpus_per_node, or workers_per_node where there is no GPU, not both")
        return self

    @field_validator("nodes")
    @classmethod
    def _is_ascending(cls, nodes: int | str) -> int | str:
        if isinstance(nodes, str):
            fewest, most = map(int, nodes.split("-"))
            if fewest > most:
                raise ValueError(f"must begin with the fewer of the two: {most}-{fewest}")
        return nodes

    @property
    def fewest_nodes(self) -> int:
        """How many nodes the run needs."""
        fewest, _, _ = str(self.nodes).partition("-")
        return int(fewest)

    @property
    def is_elastic(self) -> bool:
        """Whether the run goes on with the nodes that are left where some are lost."""
        return isinstance(self.nodes, str)

    @property
    def workers_on_node(self) -> int:
        """How many workers each node has."""
        return self.gpus_per_node or self.workers_per_node or 1

    @property
    def world_size(self) -> int:
        """The world size: how many workers the run has, on the fewest nodes that it goes on with."""
        return self.fewest_nodes * self.workers_on_node
