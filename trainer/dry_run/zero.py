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
    those of a head whose weight is gathered for the loss. `trained_are_whole` says that stage 3 shares the frozen
    weights alone.
    """

    trained: int
    frozen: int
    element: int
    held: int = 0
    offloaded: bool = False
    of_layer: int = 0
    of_head: int = 0
    trained_are_whole: bool = False


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
        whole = weights.held
        if weights.trained_are_whole:
            whole += trained
            parts["gathers"] += _gathered_in_turn(weights, workers)
        else:
            parts["gradients"] += min(weights.of_layer, weights.trained) * FP32
            if workers > 1:
                parts["gathers"] += _gathered(weights)
        to_share = alone["weights"] - whole
        parts["weights"] = whole + -(-to_share // workers)
    return parts


def _gathered_in_turn(weights: Weights, workers: int) -> int:
    """Bytes of frozen weights that are whole at most: a layer, the next one that comes, and the head."""
    at_once = weights.of_head
    if workers > 1:  # else a layer's slices are the whole
        at_once += 2 * weights.of_layer
    return at_once * weights.element


def _gathered(weights: Weights) -> int:
    """Bytes of weights that stay gathered, at most, of the head, and of the buffer in which a layer comes."""
    trained = min(weights.trained, LIVE)
    frozen = min(weights.frozen, LIVE - trained)
    trained_bytes = trained * FP32
    frozen_bytes = frozen * weights.element
    at_a_time = weights.of_layer + weights.of_head
    return trained_bytes + frozen_bytes + at_a_time * weights.element
