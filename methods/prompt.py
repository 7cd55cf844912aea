"""Prompt tuning: P in R^{V x D} in front of a document's embeddings, [P; E(x)] (Lester et al. 2021, arXiv 2104.08691,
section 2). It starts from vectors of the vocabulary (section 3.2): those of a text, or of random tokens.
"""

from typing import TYPE_CHECKING, Any

import peft
import torch
from torch import nn

from methods.options.virtual import Prompt
from methods.parts.virtual import Embedded, common, embedded, text_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PromptTuning(Embedded[Prompt]):
    """PEFT's PromptEmbedding."""

    def config(self, hidden: int) -> Any:
        """Without how it started, so that loading it needs no tokenizer."""
        return peft.PromptTuningConfig(**common(self.options.tokens, hidden))

    def encoder(self, config: Any) -> nn.Module:
        """P."""
        encoder: nn.Module = peft.PromptEmbedding(config, None)
        return encoder

    def start(self, encoder: Any, model: "PreTrainedModel") -> None:
        """P from a text, or from random tokens."""
        tokens, text = self.options.tokens, self.options.init_text
        if text is None:
            ids = torch.randint(0, model.get_input_embeddings().num_embeddings, (tokens,))
        else:
            ids = text_ids(self.setup.tokenizer, text, tokens)
        encoder.embedding.weight = nn.Parameter(embedded(model, ids, self.setup.gather))
