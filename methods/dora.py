"""DoRA: m * (W + s B A) / ||W + s B A||_c, the norm by output row and detached.

Liu et al. 2024, arXiv 2402.09353, equation 5 (and section 4.3 for the detached norm).
The magnitude m in R^{out} starts as ||W||_c, so the first step leaves from the base.
"""

from methods.base import Keywords
from methods.lora import LowRank
from methods.options.low_rank import Dora


class DoraTuning(LowRank[Dora]):
    """LoRA on weights that are decomposed into magnitude and direction."""

    def config(self) -> Keywords:
        """Ask PEFT to decompose weights into magnitude and direction."""
        return {"use_dora": True}
