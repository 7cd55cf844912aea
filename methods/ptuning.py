"""P-tuning: f(Z) in front of a document's embeddings, with trained Z in R^{V x D} and a network f (Liu et al. 2021,
arXiv 2103.10385, section 3.3).

f is PEFT's MLP: D -> hidden -> hidden -> D with ReLU between. Only f(Z) is exported; f is of no use after training.
To start from a text, the last layer is solved so that f(Z) is the text's embeddings: exactly up to hidden + 1 tokens,
as near as can be above.
"""

from typing import Any

import peft
import torch
from torch import Tensor
from torch.nn import Module

from methods.options.virtual import PTuning
from methods.parts.virtual import Embedded, common, embedded, text_ids


class PTuningTuning(Embedded[PTuning]):
    """P-tuning with PEFT's PromptEncoder, which holds Z and f."""

    def config(self, hidden: int) -> Any:
        """PEFT's config of an MLP as wide as the options say."""
        options = self.options
        shared = common(options.tokens, hidden)
        return peft.PromptEncoderConfig(**shared, encoder_hidden_size=options.hidden)

    def encoder(self, config: Any) -> Module:
        """PEFT's encoder, which holds Z and the network f."""
        encoder: Module = peft.PromptEncoder(config)
        return encoder

    def start(self, encoder: Any, model: Module) -> None:
        """Leave Z and f as they are drawn, or let f(Z) be a text."""
        text = self.options.init_text
        if text is None:
            return
        ids = text_ids(self.setup.tokenizer, text, self.options.tokens)
        goal_VD = embedded(model, ids, self.setup.gather)
        if goal_VD.is_meta:  # weights without values
            return
        goal_VD = goal_VD.cpu()
        with torch.no_grad():
            _solve_last_layer(encoder, goal_VD)


def _solve_last_layer(encoder: Any, goal_VD: Tensor) -> None:
    """Set weight and bias of f's last layer by least squares, so that f(Z) is the goal."""
    hidden_layers = encoder.mlp_head[:-1]
    last = encoder.mlp_head[-1]
    features_VH = hidden_layers(encoder.embedding.weight)
    features_VH = features_VH.double()
    ones_V1 = features_VH.new_ones(len(features_VH), 1)
    inputs = torch.cat([features_VH, ones_V1], dim=1)
    inverse = torch.linalg.pinv(inputs)
    solution = inverse @ goal_VD.double()
    weight = solution[:-1]
    bias = solution[-1]
    last.weight.copy_(weight.T)
    last.bias.copy_(bias)
