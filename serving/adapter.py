"""What an adapter adds to its base, whatever method trained it.

At a linear layer with input x and weight W, with the parts that are there:

    y = m * (W (u * x) + v * (B (c * (A (u * x))))) + beta

and behind a layer's output y, where A, B have an activation f between them: y + B f(A y + bias) + beta.
Beside that: keys and values, or embeddings, in front of every document; norms, embedding and head of its own; other
rotary positions. Shapes: R rank, I inputs, O outputs, L layers, H key-value heads, V tokens, E head size, D width.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

ACTIVATION_NAMES = ("none", "relu", "gelu", "silu")
Place = tuple[int, str]  # a decoder layer, and the name of a submodule in it


@dataclass(frozen=True)
class Part:
    """What an adapter does in one place; what is None is not there."""

    a_RI: Tensor | None = None
    b_RO: Tensor | None = None  # transposed: a row for each rank
    c_R: Tensor | None = None
    v_O: Tensor | None = None
    m_O: Tensor | None = None  # in the place of a norm, its weight
    u_I: Tensor | None = None
    bias_R: Tensor | None = None
    beta_O: Tensor | None = None
    activation: str = "none"

    @property
    def rank(self) -> int:
        """Number of rows of A."""
        if self.a_RI is None:
            return 0
        return len(self.a_RI)

    @property
    def has_gain(self) -> bool:
        """Whether it changes complete outputs."""
        is_added_to = self.beta_O is not None
        return is_added_to or self.m_O is not None

    @property
    def has_scale(self) -> bool:
        """Whether it changes inputs."""
        return self.u_I is not None


@dataclass(frozen=True)
class Adapter:
    """One adapter on the host; `digest` is the sha256 of its weights and config, and its identity everywhere."""

    digest: str
    parts: dict[Place, Part] = field(default_factory=dict)
    prefix_L2VHE: Tensor | None = None
    prompt_VD: Tensor | None = None
    embed_VD: Tensor | None = None
    head_VD: Tensor | None = None
    config: Any = None  # of the base as this adapter wants it, where its rotary positions differ
    left_out: float = 0.0  # of its difference to the base, as a share by Frobenius norms: what a low rank cannot hold

    @property
    def virtual(self) -> int:
        """Number of positions in front of every document."""
        if self.prefix_L2VHE is not None:
            return self.prefix_L2VHE.shape[2]
        if self.prompt_VD is not None:
            return len(self.prompt_VD)
        return 0
