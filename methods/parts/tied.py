"""Bases whose input and output embedding are one weight."""

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn import Parameter


def untie(model: Any) -> None:
    """Give the base of a PEFT model a head of its own where an adapter changes only one use of the shared weight.

    An adapter on the embedding leaves the head as it was, one on the head leaves the embedding, and adapters on both
    change each in its own way. A merge into the weight that both use would change both alike, so another model would
    come of it. The config says then that they are two, as `from_pretrained` must know.
    """
    base = model.get_base_model()
    embedding = base.get_input_embeddings()
    head = base.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    head_is_adapted = isinstance(head, BaseTunerLayer)
    if not head_is_adapted and not isinstance(embedding, BaseTunerLayer):
        return
    if head_is_adapted:
        head = head.get_base_layer()
    copy = head.weight.detach().clone()
    head.weight = Parameter(copy, requires_grad=False)
    for config in (base.config, base.config.get_text_config()):
        config.tie_word_embeddings = False
