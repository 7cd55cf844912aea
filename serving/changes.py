"""Whether adapters change what their base says: one that does not was never trained, or is of another base.

Shapes: T tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from serving.engine import Engine
from serving.sequence import Request

LONGEST = 256  # tokens of a prompt that are looked at
ROUNDING_SHARE = 1e-5  # of the largest logit in fp32
PromptIds = tuple[int, ...]
ChangeByName = dict[str | None, float]  # by the names of adapters


def changes_of(engine: Engine, names: Sequence[str | None], prompts: Sequence[PromptIds]) -> ChangeByName:
    """The largest change of a logit by each adapter, over the largest logit of the base; 0 where it is only rounding.

    The base itself (None) may be among the names, and is left out. The engine must have nothing else to do.
    """
    adapters = [name for name in names if name is not None]
    if not adapters:
        return {}
    changes: ChangeByName = dict.fromkeys(adapters, 0.0)
    logits = engine.logits(_probes(engine, adapters, prompts))
    for _ in prompts:
        base_TV = next(logits)
        for adapter in adapters:
            change = _logit_change(base_TV, next(logits))
            changes[adapter] = max(changes[adapter], change)
    rounding = max(ROUNDING_SHARE, torch.finfo(engine.base.dtype).eps)
    for name, change in changes.items():
        if change <= rounding:
            changes[name] = 0.0
    return changes


def _probes(engine: Engine, adapters: Sequence[str], prompts: Sequence[PromptIds]) -> Iterator[Request]:
    """The beginning of each prompt to the base, and then to each adapter."""
    names = [None, *adapters]
    for prompt in prompts:
        for name in names:
            room = _room(engine, name)
            yield Request(prompt[:room], name, new_tokens=1)


def _room(engine: Engine, adapter: str | None) -> int:
    """How many tokens of a prompt are looked at, behind an adapter's virtual ones."""
    room = engine.positions - 1
    if adapter is not None:
        packed = engine.pool.packed_of(adapter)
        room -= packed.adapter.virtual
    return min(LONGEST, room)


def _logit_change(base_TV: Tensor, tuned_TV: Tensor) -> float:
    """The largest change of a logit, over the largest one of the base behind the same tokens."""
    tokens = len(tuned_TV)
    same_TV = base_TV[:tokens].float()
    size_TV = same_TV.abs()
    difference_TV = tuned_TV.float() - same_TV
    change_TV = difference_TV.abs()
    return float(change_TV.max()) / float(size_TV.max())
