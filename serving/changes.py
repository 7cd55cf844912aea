"""Whether an adapter changes what its base says: one that does not was never trained, or is of another base.

Shapes: T tokens, V vocabulary.
"""

from collections.abc import Sequence

import torch

from serving.engine import Engine
from serving.sequence import Request

LONGEST = 256  # tokens of a prompt that are looked at
ROUNDING_SHARE = 1e-5  # of the largest logit in fp32
PromptIds = tuple[int, ...]


def change_of(engine: Engine, adapter: str, prompts: Sequence[PromptIds]) -> float:
    """The largest change of a logit by an adapter, over the largest logit of the base; 0 where it is only rounding.

    The engine must have nothing else to do.
    """
    largest = 0.0
    rounding = max(ROUNDING_SHARE, torch.finfo(engine.base.dtype).eps)
    packed = engine.pool.packed_of(adapter)
    room = engine.positions - packed.adapter.virtual - 1
    length = min(LONGEST, room)
    for prompt in prompts:
        beginning = prompt[:length]
        base_TV = engine.logits(Request(beginning, new_tokens=1))
        tuned_TV = engine.logits(Request(beginning, adapter, new_tokens=1))
        size_TV = base_TV.float().abs()
        difference_TV = tuned_TV.float() - base_TV.float()
        change_TV = difference_TV.abs()
        change = float(change_TV.max()) / float(size_TV.max())
        largest = max(largest, change)
    return largest if largest > rounding else 0.0
