"""The memory of a base with all of its layers, from two bases with few: a straight line in the number of layers."""

from methods.options.base import BaseConfig
from trainer.dry_run.model import layer_count, with_layers
from trainer.dry_run.steps import DryRun, Passes, TriedPasses

FIRST_DEPTH = 2


def whole_base(passes: Passes, config: BaseConfig) -> TriedPasses:
    """What a job holds on a base of this config.json, with all of its layers."""
    layers = layer_count(config)
    shallow, deep = depths(config)
    dry_run = DryRun(passes)
    if layers <= deep:
        return dry_run.on(config)
    at_shallow = dry_run.on(with_layers(config, shallow))
    at_deep = dry_run.on(with_layers(config, deep))

    def along(first: int, second: int) -> int:
        """Where the line through two depths is at all layers."""
        grown = second - first
        beyond = layers - shallow
        return first + grown * beyond // (deep - shallow)

    moments = {}
    for phase, parts in at_shallow.moments.items():
        extended = {}
        for part, size in parts.items():
            extended[part] = along(size, at_deep.moments[phase][part])
        moments[phase] = extended
    trained = along(at_shallow.trained, at_deep.trained)
    frozen = along(at_shallow.frozen, at_deep.frozen)
    held = along(at_shallow.held, at_deep.held)
    of_layer = at_deep.of_layer
    of_head = at_deep.of_head
    return TriedPasses(moments, trained, frozen, held, of_layer, of_head, at_deep.base_is_frozen)


def depths(config: BaseConfig) -> tuple[int, int]:
    """The numbers of layers that are tried; where kinds of layers take turns, both are whole rounds."""
    kinds = config.get("layer_types")
    if not isinstance(kinds, list):
        return FIRST_DEPTH, FIRST_DEPTH + 1
    period = _period(kinds)
    if period == 1:
        return FIRST_DEPTH, FIRST_DEPTH + 1
    return period, 2 * period


def _period(kinds: list[str]) -> int:
    """After how many layers their kinds repeat."""
    count = len(kinds)
    for period in range(1, count):
        later = kinds[period:]
        earlier = kinds[: count - period]
        if later == earlier:
            return period
    return count
