"""What makes a step fast: the same arithmetic as the plain path in fewer passes over memory and fewer launches.

- `documents.py`: attention within documents of different lengths, without a mask and without padding.
- `head.py`, `cross_entropy.py`: the cross entropy of labels without holding the logits of all of them.
- `layers.py`: decoder layers compiled one by one.
- `shared_products.py`: adapters that have one input multiply it once.
- `fused_gates.py`, `gate.py`, `gate_kernels.py`: what lies between the adapters of a gated MLP, as one operation.
- `fast.py`: which of these a model gets.
- `probe.py`: the check that it then computes what the plain path does.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trainer.shared_rows.group import OWN_ROWS, SequenceGroup

if TYPE_CHECKING:
    from trainer.kernels.head import LinearHead


@dataclass(frozen=True)
class Kernels:
    """What of the fast path a run uses, nothing where it is plain; and what was found against more of it.

    Beside it, on either path, the ranks that share rows with this one.
    """

    head: "LinearHead | None" = None  # the loss takes hidden states and computes their logits in chunks
    in_one_row: bool = False  # documents of a micro-batch lie in one row, by whose starts attention keeps them apart
    compiled: bool = False  # decoder layers are compiled
    fused_step: bool = False  # the optimizer's step is one kernel for many weights
    problems: list[str] = field(default_factory=list)
    sequence: SequenceGroup = OWN_ROWS

    @property
    def names(self) -> list[str]:
        """What is in use, in words."""
        names = []
        if self.head:
            names.append("losses in chunks")
        if self.in_one_row:
            names.append("attention within documents")
        if self.compiled:
            names.append("compiled layers")
        if self.fused_step:
            names.append("fused optimizer")
        return names
