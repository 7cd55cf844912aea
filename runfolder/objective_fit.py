"""Which methods, bases and ZeRO stages an objective works with; each refusal names what is allowed instead."""

from methods.options import Options
from runfolder.group_objectives import GroupOptions
from runfolder.objective import ObjectiveOptions
from runfolder.objectives import OutsideOptions, shares_prompts

_MOVES_BASE = ("pissa", "olora")  # starts that take from the base's weights what they give the adapter


def check_method(objective: ObjectiveOptions, method: Options) -> None:
    """Raise ValueError where an objective does not work with a method."""
    reason = objective.refused_methods.get(method.kind)
    if reason is not None:
        raise ValueError(f"objective {objective.kind} with method {method.kind}: {reason}")
    if shares_prompts(objective) and method.kind == "longlora":
        raise ValueError(
            "objective.share_prompts with method longlora, whose attention in training is by places in a row; "
            "allowed: false, or method lora"
        )
    if isinstance(objective, GroupOptions):
        _check_writer(objective, method)


def _check_writer(objective: GroupOptions, method: Options) -> None:
    """Raise ValueError where what writes the answers would not be what is trained on them."""
    start = getattr(method, "init", None)
    if start in _MOVES_BASE:
        raise ValueError(
            f"objective {objective.kind} with method.init {start}, which moves the base's weights: the generating "
            "engine would add to them what is left for the base as it was; allowed: default"
        )
    dropout = getattr(method, "dropout", 0.0)
    if dropout > 0:
        raise ValueError(
            f"objective {objective.kind} with method.dropout {dropout:g}: what writes the answers drops nothing, so "
            "they would be another policy's; allowed: 0"
        )


def check_base(objective: ObjectiveOptions, method: Options, resizes_embeddings: bool) -> None:
    """Raise ValueError where an objective cannot have a base whose embeddings are resized."""
    if not resizes_embeddings:
        return
    if objective.replaces_head and not method.makes_model:
        raise ValueError(
            f"base.resize_embeddings with objective {objective.kind} and method {method.kind}, which would train "
            "rows of a head that is not there; allowed: method full or galore"
        )
    if objective.generates:
        raise ValueError(
            f"base.resize_embeddings with objective {objective.kind}, whose generating engine has the base's own "
            "embeddings; allowed: false"
        )


def check_stage(objective: ObjectiveOptions, zero: int) -> None:
    """Raise ValueError where an objective does not work at a ZeRO stage."""
    if objective.generates and zero == 3:
        raise ValueError(
            f"sharding.zero 3 with objective {objective.kind}, which writes with the whole base on each worker, and "
            "gathers none for it yet; allowed: 0, 1 or 2"
        )


def check_sequence(objective: ObjectiveOptions, sequence: int) -> None:
    """Raise ValueError where so many workers cannot share the rows of an objective."""
    if sequence > 1 and isinstance(objective, OutsideOptions):
        raise ValueError(
            f"sharding.sequence {sequence} with objective {objective.kind}, which is another package's and may read "
            "logits that another worker has; allowed: 1"
        )
