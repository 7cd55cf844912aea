"""What a trainer imports, for the process that the tests' trainers are forked from (worker.py)."""

import os
from importlib import import_module

from trainer.libraries import import_lean

os.environ["DS_ACCELERATOR"] = "cpu"  # nobody forks it where there is a GPU
import_lean()
for name in ("peft", "transformers.modeling_utils", "transformers.models.llama.modeling_llama", "trainer.__main__"):
    import_module(name)
