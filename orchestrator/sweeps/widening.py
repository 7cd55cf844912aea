"""The best variants of each method; where the best value is at the end of a range, the next one beyond is tried."""

import math
from collections.abc import Iterable, Mapping, Sequence

from orchestrator.sweeps.spec import six_digits
from orchestrator.sweeps.trials import Variant

MOST_ADDED = 2  # values beyond each end of a range
_FEWEST_VALUES = 3  # of a range, so that an end says something


def widened(
    chosen: Sequence[Variant],
    scores: Mapping[Variant, float],
    begun_with: Sequence[Variant],
) -> list[Variant]:
    """Variants, and for each method whose trials are all judged the next one beyond an end where the best is.

    Low scores are good. `begun_with`: those before any was added.
    """
    extended = list(chosen)
    existing = set(chosen)
    began_with = by_method(begun_with)
    for method, variants in by_method(chosen).items():
        if not all(map(scores.__contains__, variants)):
            continue
        best = min(variants, key=scores.__getitem__)
        for key in best.settings:
            values = _numbers(key, variants)
            began = _numbers(key, began_with[method])
            value = _value_beyond(key, best, values, began)
            if value is None:
                continue
            beyond = best.changed(key, value)
            if beyond not in existing:
                extended.append(beyond)
    return extended


def best_of_methods(scores: Mapping[Variant, float], share: float, least: int) -> list[Variant]:
    """Of each method the best share of its variants, and no less than so many where it has them."""
    kept = []
    for variants in by_method(scores).values():
        best_first = sorted(variants, key=scores.__getitem__)
        kept_share = len(best_first) * share
        count = math.ceil(kept_share)
        count = max(count, least)
        kept += best_first[:count]
    return kept


def by_method(variants: Iterable[Variant]) -> dict[str, list[Variant]]:
    """Variants by the kind of their method."""
    parted: dict[str, list[Variant]] = {}
    for variant in variants:
        of_method = parted.setdefault(variant.method, [])
        of_method.append(variant)
    return parted


def _value_beyond(key: str, best: Variant, values: list[float], began: list[float]) -> float | None:
    """The next value beyond the end of a range at which the best is; None where it is not, or enough were added."""
    if len(began) < _FEWEST_VALUES:
        return None
    value = best.settings[key]
    lowest, second, *_ = began
    *_, last_but_one, highest = began
    added = 0
    if value == values[-1]:
        ratio = highest / last_but_one
        for other in values:
            added += other > highest
    elif value == values[0]:
        ratio = lowest / second
        for other in values:
            added += other < lowest
    else:
        return None
    if added >= MOST_ADDED:
        return None
    return six_digits(value * ratio)


def _numbers(key: str, chosen: Sequence[Variant]) -> list[float]:
    """The values of a setting, rising; none where one is no number above zero with a fraction."""
    values = set()
    for configuration in chosen:
        value = configuration.settings.get(key)
        if not isinstance(value, float) or value <= 0:
            return []
        values.add(value)
    return sorted(values)
