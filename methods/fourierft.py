"""FourierFT: W + scale * Re(ifft2(S)), where n entries of the spectrum S in R^{out x in} are trained, zero at first.

Gao et al. 2024, arXiv 2405.03003, equations 2 to 4. The places of the entries come from `location_seed`, so modules
of one shape share them. The paper and PEFT start from normal entries; zero leaves the first step at the base, which
normal ones ruin where it is small, since ifft2 divides by out * in. For the same reason a base thousands wide needs a
learning rate far above LoRA's.
"""

import peft

from methods.options.other_adapters import FourierFt
from methods.parts.peft_adapter import PeftAdapter


class FourierFtTuning(PeftAdapter[FourierFt]):
    """Updates whose spectrum is sparse and trained."""

    def peft_config(self, targets: list[str]) -> peft.PeftConfig:
        """How many entries each spectrum has, their scale, and the seed of their places."""
        return peft.FourierFTConfig(
            n_frequency=self.options.frequencies,
            scaling=self.options.scale,
            init_weights=True,  # zero
            random_loc_seed=self.options.location_seed,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )
