"""Beyond the ends of ranges: where the best value of a method is the first or the last one, the next one is tried."""

from collections.abc import Mapping, Sequence

from orchestrator.sweeps.trials import Variant

_MOST_ADDED = 2  # values beyond each end of a range
_FEWEST_VALUES = 3  # of a range, so that an end says something


def widened(
    chosen: Sequence[Variant],
    scores: Mapping[Variant, float],
    begun_with: Sequence[Variant] | None = None,
) -> list[Variant]:
    """Configurations, and for each method whose trials are all judged the next one beyond an end where the best is.

    Low scores are good. `begun_with`: those before any was added, where some were.
    """
    original = begun_with or chosen
    extended = list(chosen)
    existing = set(chosen)
    for method in dict.fromkeys(configuration.method for configuration in chosen):
        of_method = [configuration for configuration in chosen if configuration.method == method]
        if any(configuration not in scores for configuration in of_method):
            continue
        best = min(of_method, key=scores.__getitem__)
        for key in best.settings:
            began = [configuration for configuration in original if configuration.method == method]
            value = _value_beyond(key, best, _numbers(key, of_method), _numbers(key, began))
            if value is None:
                continue
            beyond = best.changed(key, value)
            if beyond not in existing:
                extended.append(beyond)
    return extended


def _value_beyond(key: str, best: Variant, values: list[float], began: list[float]) -> float | None:
    """The next value beyond the end of a range at which the best is; None where it is not, or enough were added."""
    if len(began) < _FEWEST_VALUES:
        return None
    value = best.settings[key]
    if value == values[-1]:
        added = [other for other in values if other > began[-1]]
        ratio = began[-1] / began[-2]
    elif value == values[0]:
        added = [other for other in values if other < began[0]]
        ratio = began[0] / began[1]
    else:
        return None
    if len(added) >= _MOST_ADDED:
        return None
    beyond = value * ratio
    return float(f"{beyond:.6g}")


def _numbers(key: str, chosen: Sequence[Variant]) -> list[float]:
    """The values of a setting, rising; none where one is no number above zero with a fraction."""
    values = set()
    for configuration in chosen:
        value = configuration.settings.get(key)
        if not isinstance(value, float) or value <= 0:
            return []
        values.add(value)
    return sorted(values)
