"""LongLoRA (Chen et al. 2023, arXiv 2309.12307): long sequences with LoRA, embeddings and norms trained too.

W + (alpha / r) B A on the targets (by default the attention's four projections, section 3.3), and trained copies of
all weights whose names contain "embed" or "norm", without which LoRA does not adapt to longer sequences. In training,
heads attend within groups of ceil(seq_len / groups) positions (parts/shifted_attention.py); evaluation and
inference are dense.

Positions beyond the base's are reached by dividing all rotary frequencies by f = ceil(seq_len / positions of the
base) (`linear`: Chen et al. 2023, arXiv 2306.15595), or by YaRN with that factor (arXiv 2309.00071). A base whose
frequencies are scaled already is refused.

Where input and output embedding are one, so are their trained copies: counted once, written under both names as PEFT
reads them.

The adapter needs the changed frequencies, which are in the config.json beside it, and plain PEFT does not read that:

    config = AutoConfig.from_pretrained(adapter)
    base = AutoModelForCausalLM.from_pretrained(base, config=config)
    model = PeftModel.from_pretrained(base, adapter)
"""

from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
from torch.nn import Module

from methods.base import Keywords, Tensors
from methods.lora import LowRank
from methods.options.low_rank_long import LongLora
from methods.parts import attention
from methods.parts.shifted_attention import NAME, sparse_in_training
from methods.parts.weights import shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LongLoraTuning(LowRank[LongLora]):
    """LoRA for sequences longer than the base's, with sparse attention while it trains."""

    _extras: Keywords

    @property
    def group(self) -> int:
        """Number of positions that see each other: seq_len over the number of groups, rounded up."""
        size = self.setup.seq_len / self.options.groups
        return ceil(size)

    def load_options(self, config: Any) -> Keywords:
        """Let the base's config reach seq_len; raises ValueError where it cannot."""
        self.options.check(config.to_dict(), self.setup.seq_len)
        self._extend(config)
        return {}

    def attach(self, model: "PreTrainedModel") -> Module:
        """Freeze the base; add adapters and trained copies, and make attention sparse in training."""
        if self.options.groups > 1:
            attention.replace(model, NAME, self.options.kind, "lora")
            sparse_in_training(model.get_decoder(), self.group)
        _, others = shapes(model, self.setup.gather)
        copied = set()
        for name in others:
            if self.options.copies(name):
                module = name.split(".")[-2]
                copied.add(module)
        # What the config says of it is not asked: files that hold both are loaded as two.
        head = model.get_output_embeddings()
        embedding = model.get_input_embeddings()
        tied = head.weight is embedding.weight
        self._extras = {"modules_to_save": sorted(copied), "ensure_weight_tying": tied}
        return super().attach(model)

    def config(self) -> Keywords:
        """Name the modules of which PEFT trains copies."""
        return self._extras

    def export(self, model: peft.PeftModel, weights: Tensors, folder: Path) -> None:
        """Write what PEFT loads, and the config of the base that it belongs to."""
        # A weight that two modules share is in `weights` once; PEFT writes and reads it under both names.
        first_names = {id(parameter): name for name, parameter in model.named_parameters()}
        by_every_name: Tensors = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            first_name = first_names[id(parameter)]
            if first_name in weights:
                by_every_name[name] = weights[first_name]
        super().export(model, by_every_name, folder)
        model.config.save_pretrained(folder)

    def _extend(self, config: Any) -> None:
        """Scale the rotary frequencies of a config for as many positions as seq_len, if it has fewer."""
        seq_len = self.setup.seq_len
        known = config.max_position_embeddings
        if seq_len <= known:
            return
        if not getattr(config, "rope_parameters", None):
            raise ValueError(f"data.seq_len: found {seq_len}; allowed: at most {known} (they are not rotary)")
        factor = ceil(seq_len / known)
        scaling = {"rope_type": self.options.rope, "factor": float(factor)}
        config.rope_parameters |= scaling
        if self.options.rope == "yarn":
            config.rope_parameters["original_max_position_embeddings"] = known
        config.max_position_embeddings = factor * known
