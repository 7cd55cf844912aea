"""The options of every method: plain frozen data, no torch, so that a laptop can validate a job.

A method is one class of options in a module of this folder, and its hooks in the class that `implementation` names.
"""

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from methods.options.base import Options
from methods.options.discovery import defined_in, registered

_BUILT_IN = defined_in(__name__)
_REGISTERED, UNUSABLE = registered(_BUILT_IN)  # UNUSABLE: by kind, why a registered method is not among KINDS
KINDS: dict[str, type[Options]] = _BUILT_IN | _REGISTERED

if TYPE_CHECKING:
    AnyOptions = Options
else:
    AnyOptions = Annotated[Union[tuple(KINDS.values())], Field(discriminator="kind")]  # noqa: UP007 (as many as there are)

__all__ = ["KINDS", "UNUSABLE", "AnyOptions", "Options"]
