"""A model from its folder, and the space that an engine gives it."""

from pathlib import Path
from typing import Any

import torch

TAIL_OF_RESIDENT = 16  # ranks behind the base's weights


def loaded(place: str | Path, dtype: torch.dtype | None = None, revision: str = "main") -> Any:
    """A model from its folder or by its hub id, on the GPU if there is one, in this type or its own.

    Code of its own is never run.
    """
    from transformers import AutoModelForCausalLM

    wanted = dtype or "auto"
    model = AutoModelForCausalLM.from_pretrained(place, dtype=wanted, revision=revision, trust_remote_code=False)
    if torch.cuda.is_available():
        model = model.to("cuda")
    return model.eval()


def tail_ranks(model: Any, residents: int) -> int:
    """Ranks behind the base's weights: some for each adapter on a GPU, where kernels use them; none on the CPU."""
    weight = next(model.parameters())
    if weight.device.type != "cuda":
        return 0
    return residents * TAIL_OF_RESIDENT
