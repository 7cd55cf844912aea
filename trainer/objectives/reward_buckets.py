"""How often the chosen answer of a pair has the higher score: by how sure the scores are, and by lengths.

A reward model that has learned length is right where the chosen answer is the longer one, and wrong where it is not.
Shapes: P pairs, B buckets.
"""

import math

import torch

from trainer.objectives.base import TensorsByName

BOUNDS = (0.5, 1.0, 2.0)  # of the difference of two scores
_WON, _SHARE = "won_", "share_"
_SUMS = ("scores", "lengths", "scores_squared", "lengths_squared", "products")  # means over all answers


def of_buckets(figures: TensorsByName) -> TensorsByName:
    """Of each pair, by name: whether it is in a bucket, and there whether its chosen answer has won."""
    accuracy_P = figures["accuracy"]
    shares: dict[str, torch.Tensor] = {}
    for name, is_in_P in _buckets(figures).items():
        of_bucket_P = is_in_P.double()
        shares[_SHARE + name] = of_bucket_P
        shares[_WON + name] = of_bucket_P * accuracy_P
    return shares


def _buckets(figures: TensorsByName) -> dict[str, torch.Tensor]:
    """Which pairs are in each bucket, by its name."""
    sure_P = figures["reward_margin"].abs()
    buckets = {}
    low = 0.0
    for high in (*BOUNDS, math.inf):
        name = f"margin_{low:g}_to_{high:g}"
        if high == math.inf:
            name = f"margin_from_{low:g}"
        buckets[name] = (sure_P >= low) & (sure_P < high)
        low = high
    longer_by_P = figures["labels_chosen"] - figures["labels_rejected"]
    buckets["chosen_shorter"] = longer_by_P < 0
    buckets["chosen_as_long"] = longer_by_P == 0
    buckets["chosen_longer"] = longer_by_P > 0
    return buckets


def of_lengths(figures: TensorsByName) -> TensorsByName:
    """Of each pair, by name, the means over both answers from which a correlation of score and length is found."""
    means: dict[str, torch.Tensor] = dict.fromkeys(_SUMS, torch.zeros_like(figures["accuracy"]))
    for side in ("chosen", "rejected"):
        scores_P = figures[f"reward_{side}"]
        lengths_P = figures[f"labels_{side}"]
        values = (scores_P, lengths_P, scores_P**2, lengths_P**2, scores_P * lengths_P)
        for name, value_P in zip(_SUMS, values, strict=True):
            means[name] = means[name] + value_P / 2
    return means


def accuracies(metrics: dict[str, float]) -> dict[str, float]:
    """The same means with accuracies in the place of won pairs, and one correlation for the sums of lengths."""
    found = {}
    for name, mean in metrics.items():
        if name.startswith(_WON):
            bucket = name.removeprefix(_WON)
            share = metrics[_SHARE + bucket]
            if share:
                found[f"accuracy_{bucket}"] = mean / share
        elif name not in _SUMS:
            found[name] = mean
    found["score_length_correlation"] = _correlation(*(metrics[name] for name in _SUMS))
    return found


def _correlation(x: float, y: float, x_squared: float, y_squared: float, product: float) -> float:
    """Pearson's correlation of two numbers by their means; zero where one of them never changes."""
    variances = (x_squared - x * x) * (y_squared - y * y)
    if variances <= 0:
        return 0.0
    return (product - x * y) / math.sqrt(variances)
