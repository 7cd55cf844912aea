"""How often the chosen answer of a pair has the higher score: by how sure the scores are, and by lengths.

A reward model that has learned length is right where the chosen answer is the longer one, and wrong where it is not.
Shapes: P pairs.
"""

import math

import torch

from trainer.objectives.base import TensorsByName

TensorsByBucket = dict[str, torch.Tensor]
BOUNDS = (0.5, 1.0, 2.0)  # of the difference of two scores
_WON, _SHARE = "won_", "share_"
_MOMENTS = ("scores", "lengths", "scores_squared", "lengths_squared", "products")


def of_buckets(figures: TensorsByName) -> TensorsByName:
    """Of each pair, by name: whether it is in a bucket, and there whether its chosen answer has won."""
    accuracy_P = figures["accuracy"]
    buckets = _margin_buckets(figures)
    buckets |= _length_buckets(figures)
    shares = {}
    for name, is_in_P in buckets.items():
        share_P = is_in_P.double()
        shares[_SHARE + name] = share_P
        shares[_WON + name] = share_P * accuracy_P
    return shares


def _margin_buckets(figures: TensorsByName) -> TensorsByBucket:
    """Which pairs have scores that differ so much."""
    margin_P = figures["reward_margin"].abs()
    buckets = {}
    low = 0.0
    for high in BOUNDS:
        is_from_P = margin_P >= low
        is_below_P = margin_P < high
        name = f"margin_{low:g}_to_{high:g}"
        buckets[name] = is_from_P & is_below_P
        low = high
    buckets[f"margin_from_{low:g}"] = margin_P >= low
    return buckets


def _length_buckets(figures: TensorsByName) -> TensorsByBucket:
    """Which pairs have a chosen answer with fewer labels, as many, or more."""
    longer_by_P = figures["labels_chosen"] - figures["labels_rejected"]
    return {
        "chosen_shorter": longer_by_P < 0,
        "chosen_as_long": longer_by_P == 0,
        "chosen_longer": longer_by_P > 0,
    }


def of_lengths(figures: TensorsByName) -> TensorsByName:
    """Of each pair, by name, the means over both answers from which a correlation of score and length is found."""
    moments: dict[str, torch.Tensor] = {}
    for side in ("chosen", "rejected"):
        score_P = figures[f"reward_{side}"]
        length_P = figures[f"labels_{side}"]
        product_P = score_P * length_P
        values = (score_P, length_P, score_P**2, length_P**2, product_P)
        for name, value_P in zip(_MOMENTS, values, strict=True):
            so_far = moments.get(name, 0)
            half_P = value_P / 2
            moments[name] = so_far + half_P
    return moments


def accuracies(metrics: dict[str, float]) -> dict[str, float]:
    """The same means with accuracies in the place of won pairs, and one correlation in that of moments.

    `accuracy_by_length_alone` is that of the better of two rules, to prefer the longer answer or the shorter one.
    """
    moments = []
    found = {}
    for name, mean in metrics.items():
        bucket = name.removeprefix(_WON)
        if name in _MOMENTS:
            continue
        if bucket == name:
            found[name] = mean
            continue
        share = metrics[_SHARE + bucket]
        if share:
            name = f"accuracy_{bucket}"
            found[name] = mean / share
    for name in _MOMENTS:
        moments.append(metrics[name])
    found["score_length_correlation"] = correlation(*moments)
    found["accuracy_by_length_alone"] = by_length_alone(metrics)
    return found


def by_length_alone(metrics: dict[str, float]) -> float:
    """How often the longer answer is the chosen one, or the shorter if that is more; equal lengths count half."""
    longer = metrics["share_chosen_longer"]
    shorter = metrics["share_chosen_shorter"]
    equal = metrics["share_chosen_as_long"]
    return max(longer, shorter) + equal / 2


def correlation(x: float, y: float, x_squared: float, y_squared: float, product: float) -> float:
    """Pearson's correlation of two numbers, by five of their means; zero where one of them never changes."""
    variance_x = x_squared - x * x
    variance_y = y_squared - y * y
    if variance_x <= 0 or variance_y <= 0:
        return 0.0
    covariance = product - x * y
    scale = math.sqrt(variance_x * variance_y)
    return covariance / scale
