"""VeRA: W + diag(b) B diag(d) A, with random A in R^{r x in} and B in R^{out x r} that all modules share, frozen.

Kopiczko et al. 2024, arXiv 2310.11454, equation 2 and section 3.2: d starts at 0.1 and b at zero. A and B have the
largest in and out of all targets and are sliced. They come from a generator of their own on the CPU, seeded by
`projection_seed`, so they are the same on every rank, in every layout and for every adapter of that seed and shape.
The exported adapter holds them, as another version of torch may draw others.
"""

from pathlib import Path

import peft
from torch.nn import Module

from methods.base import Tensors
from methods.options.other_adapters import Vera
from methods.parts.peft_adapter import ADAPTER, PeftAdapter


class VeraTuning(PeftAdapter[Vera]):
    """Trained scales of two random projections that all modules share."""

    def peft_config(self, targets: list[str]) -> peft.PeftConfig:
        """Rank and seed of the shared projections, and what the scales d start from."""
        return peft.VeraConfig(
            r=self.options.rank,
            d_initial=self.options.d_initial,
            vera_dropout=self.options.dropout,
            projection_prng_key=self.options.projection_seed,
            save_projection=True,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )

    def export(self, model: Module, weights: Tensors, folder: Path) -> None:
        """Write the adapter together with the projections that it scales."""
        with_projections = dict(weights)
        for side in "AB":
            name = f"base_model.vera_{side}.{ADAPTER}"
            projection = model.get_buffer(name)
            with_projections[name] = projection.cpu()
        super().export(model, with_projections, folder)
