"""Prompt tuning: P in R^{V x D} in front of a document's embeddings, [P; E(x)] (Lester et al. 2021, arXiv 2104.08691,
section 2). It starts from vectors of the vocabulary (section 3.2): those of a text, or of random tokens.
"""

from typing import TYPE_CHECKING, Any

import peft
import torch
from torch.nn import Module, Parameter

from methods.options.virtual import Prompt
from methods.parts.virtual import Embedded, common, embedded, text_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PromptTuning(Embedded[Prompt]):
    """Prompt tuning with PEFT's PromptEmbedding as its encoder."""

    def config(self, hidden: int) -> Any:
        """PEFT's config without how P started, so that loading it needs no tokenizer."""
        shared = common(self.options.tokens, hidden)
        return peft.PromptTuningConfig(**shared)

    def encoder(self, config: Any) -> Module:
        """PEFT's encoder, whose one weight is P."""
        encoder: Module = peft.PromptEmbedding(config, None)
        return encoder

    def start(self, encoder: Any, model: "PreTrainedModel") -> None:
        """Let P be the embeddings of a text, or of random tokens."""
        tokens = self.options.tokens
        text = self.options.init_text
        if text is None:
            vocabulary = model.get_input_embeddings().num_embeddings
            ids = torch.randint(0, vocabulary, (tokens,))
        else:
            ids = text_ids(self.setup.tokenizer, text, tokens)
        vectors_VD = embedded(model, ids, self.setup.gather)
        encoder.embedding.weight = Parameter(vectors_VD)
