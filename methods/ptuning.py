"""P-tuning: f(Z) in front of a document's embeddings, with trained Z in R^{V x D} and a network f (Liu et al. 2021,
arXiv 2103.10385, section 3.3).

f is PEFT's MLP: D -> hidden -> hidden -> D with ReLU between. Only f(Z) is exported; f is of no use after training.
To start from a text, the last layer is solved so that f(Z) is the text's embeddings: exactly up to hidden + 1 tokens,
as near as can be above.
"""

from typing import Any

import peft
import torch
from torch import nn

from methods.options.virtual import PTuning
from methods.parts.virtual import Embedded, common, embedded, text_ids


class PTuningTuning(Embedded[PTuning]):
    """PEFT's PromptEncoder."""

    def config(self, hidden: int) -> Any:
        """An MLP of the options' width."""
        return peft.PromptEncoderConfig(
            **common(self.options.tokens, hidden), encoder_hidden_size=self.options.hidden
        )

    def encoder(self, config: Any) -> nn.Module:
        """Z and f."""
        encoder: nn.Module = peft.PromptEncoder(config)
        return encoder

    def start(self, encoder: Any, model: nn.Module) -> None:
        """Leave Z and f as they are drawn, or let f(Z) be a text."""
        text = self.options.init_text
        if text is not None:
            ids = text_ids(self.setup.tokenizer, text, self.options.tokens)
            goal_VD = embedded(model, ids, self.setup.gather).cpu()
            with torch.no_grad():
                _fit(encoder, goal_VD)


def _fit(encoder: Any, goal_VD: torch.Tensor) -> None:
    """Solve the last layer for an output."""
    features_VH = encoder.mlp_head[:-1](encoder.embedding.weight).double()
    inputs = torch.cat([features_VH, features_VH.new_ones(len(features_VH), 1)], dim=1)
    solution = torch.linalg.pinv(inputs) @ goal_VD.double()
    encoder.mlp_head[-1].weight.copy_(solution[:-1].T)
    encoder.mlp_head[-1].bias.copy_(solution[-1])
