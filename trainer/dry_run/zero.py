"""What each worker holds under ZeRO, from what a worker alone holds at stage 0.

DeepSpeed keeps an fp32 copy of a worker's part of the trained weights at stages 1 to 3 (none where moments are on the
host), and buckets in which gradients lie as they are reduced. At stage 3 weights that were gathered stay for a while,
up to a number of elements, while a layer is on its way; and a layer's gradients are there together before they are
reduced. What is shared is rounded up.
"""

from dataclasses import dataclass

from trainer.dry_run.ledger import Bytes
from trainer.zero.by_layer import LIVE
from trainer.zero.engine import config

FP32 = 4  # bytes of an element


@dataclass(frozen=True)
class Weights:
    """Elements of the weights that are trained, and of those that are frozen, of `element` bytes each.

    `held` are the bytes of those in 4 bits, which every worker has whole. `offloaded` says that moments are on the
    host, and what is on the device of them are buffers. `of_layer` are the elements of the largest layer, `of_head`
    those of a head whose weight is gathered for the loss.
    """

    trained: int
    frozen: int
    element: int
    held: int = 0
    offloaded: bool = False
    of_layer: int = 0
    of_head: int = 0


def shared(alone: Bytes, weights: Weights, stage: int, workers: int) -> Bytes:
    """The bytes of each of so many workers at a stage, by what they are for."""
    parts = dict(alone)
    if stage == 0:  # gradients are reduced when activations are gone
        return parts
    trained = weights.trained * FP32
    part = -(-trained // workers)
    if not weights.offloaded:
        parts["optimizer"] = part + -(-alone["optimizer"] // workers)
    bucket = config(stage, weights.trained)["zero_optimization"]["reduce_bucket_size"] * FP32
    parts["gathers"] += bucket
    if stage >= 2:
        parts["gradients"] = -(-alone["gradients"] // workers)
        parts["gathers"] += bucket
    if stage == 3:
        to_share = alone["weights"] - weights.held
        parts["weights"] = weights.held + -(-to_share // workers)
        parts["gradients"] += min(weights.of_layer, weights.trained) * FP32
        if workers > 1:
            parts["gathers"] += _gathered(weights)
    return parts


def _gathered(weights: Weights) -> int:
    """Bytes of weights that stay gathered, at most, of the head, and of the buffer in which a layer comes."""
    trained = min(weights.trained, LIVE)
    frozen = min(weights.frozen, LIVE - trained)
    trained_bytes = trained * FP32
    frozen_bytes = frozen * weights.element
    at_a_time = weights.of_layer + weights.of_head
    return trained_bytes + frozen_bytes + at_a_time * weights.element
