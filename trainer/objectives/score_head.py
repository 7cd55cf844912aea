"""The head of a reward model, in the place of the vocabulary's: so packing, methods and ZeRO need not know of it.

It is called as the vocabulary's head is until the end, as methods know by that name what they leave alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

SCORE_WEIGHT = "score.weight"  # what it is called in transformers' class that scores
_SCALES = ("logit_scale", "logits_scaling")  # what bases multiply or divide logits with, behind the head
_CAP = "final_logit_softcapping"


class ScoreHead(nn.Linear):
    """A score [..., 1] of each hidden state [..., D], in fp32; all are zero at the start."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 1, bias=False)
        self.reveals = False

    def reset_parameters(self) -> None:
        """Set the weight to zero, so that a first step finds all answers equal."""
        nn.init.zeros_(self.weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The scores; the hidden states themselves while they are revealed."""
        if self.reveals:
            return hidden
        kind = hidden.device.type
        with torch.autocast(kind, enabled=False):
            weight = self.weight.float()
            exact = hidden.float()
            return linear(exact, weight)


def replace_head(model: Any) -> None:
    """Give a base of transformers a head for scores; raises ValueError where it changes logits behind the head."""
    config = model.config.get_text_config()
    base = f"objective reward: a base of type {config.model_type}"
    for name in _SCALES:
        scale = getattr(config, name, 1)
        if scale != 1:
            raise ValueError(f"{base} scales what its head gives, by {name}")
    if hasattr(config, _CAP):
        setattr(config, _CAP, None)
    old = model.get_output_embeddings()
    if old is None:
        raise ValueError(f"{base} has no head to be replaced")
    width = config.hidden_size
    head = ScoreHead(width)
    model.set_output_embeddings(head)
    # It is tied to no embedding, whatever the base's was.
    model.all_tied_weights_keys = {}
    for each in (model.config, config):
        each.tie_word_embeddings = False


def score_head(model: nn.Module) -> tuple[str, ScoreHead]:
    """The name of a model's head for scores, and the head; raises ValueError where a method has adapted it."""
    for name, module in model.named_modules():
        is_adapted = name.endswith("base_layer")
        if isinstance(module, ScoreHead) and not is_adapted:
            return name, module
    raise ValueError("method.target: found the head, which is trained as a whole with objective reward; leave it out")


@contextmanager
def revealed(model: nn.Module) -> Iterator[None]:
    """Within it, a reward model gives hidden states for scores: at the start, those say nothing of its layers."""
    heads = []
    for module in model.modules():
        if isinstance(module, ScoreHead):
            heads.append(module)
            module.reveals = True
    try:
        yield
    finally:
        for head in heads:
            head.reveals = False
