"""What the options of all objectives share: plain data, so that a laptop imports no torch."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from runfolder.resources import Section

RowsRead = Literal["answers", "pairs", "margins", "judged"]
GENTLE = 0.05  # 1e-6 in TRL, where supervised tuning of all weights has 2e-5


class ObjectiveOptions(Section):
    """What all objectives share: a kind, and the rows that they read."""

    kind: str  # how a job names the objective: a Literal with a default, in each class that stands for one
    implementation: ClassVar[str]  # "module:class" of what is imported where it trains
    rows: ClassVar[RowsRead] = "answers"
    rate_factor: ClassVar[float] = 1.0  # of the method's default learning rate, which is one for supervised tuning
    needs: ClassVar[str] = ""  # what it takes beside a forward and a backward pass over its rows, in words
    refused_methods: ClassVar[Mapping[str, str]] = {}  # the methods that do not work with it, and why
    generates: ClassVar[bool] = False  # it learns from what the model itself writes in each step
    replaces_head: ClassVar[bool] = False  # what is trained has a head of the objective's, not the vocabulary's

    @property
    def reward_file(self) -> str | None:
        """The file whose function judges what the model writes; None where there is none."""
        return None

    @property
    def reward_folder(self) -> str | None:
        """The folder of a reward model that judges what the model writes; None where there is none."""
        return None
