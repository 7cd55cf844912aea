"""Virtual tokens: trained vectors in front of every document, as PEFT writes and loads them.

In training they are ids -1, ..., -V in front of the document's own, which the input embedding knows. So packing,
restarting positions, padding, generation and sharding treat them as tokens, and packed documents equal solo ones.
Shapes: B rows, T positions, V virtual tokens, D hidden size.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.functional import embedding

from methods.base import Gather, Keywords, Method, Tensors
from methods.options.virtual import EmbeddedOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

E = TypeVar("E", bound=EmbeddedOptions)


class VirtualEmbedding(Module):
    """The base's input embedding, which gives an encoder's V vectors for the ids -1, ..., -V."""

    def __init__(self, base: Any, encoder: Module, tokens: int) -> None:
        super().__init__()
        self.base = base
        self.encoder = encoder
        self.tokens = tokens

    @property
    def weight(self) -> Parameter:
        """The vocabulary's vectors; the output layer may share them."""
        weight: Parameter = self.base.weight
        return weight

    def forward(self, ids_BT: Tensor) -> Tensor:
        """The vectors [B, T, D] of ids [B, T], virtual or of the vocabulary."""
        is_virtual_BT = ids_BT < 0
        vocabulary_ids_BT = ids_BT.masked_fill(is_virtual_BT, 0)
        vocabulary_BTD = self.base(vocabulary_ids_BT)
        places_V = torch.arange(self.tokens, device=ids_BT.device)
        trained_VD = self.encoder(places_V)
        trained_VD = trained_VD.float()
        # One more row for the tokens that are not virtual: it gets no gradient, so that none is summed in vain.
        width = trained_VD.shape[1]
        zeros_1D = trained_VD.new_zeros(1, width)
        table = torch.cat([trained_VD, zeros_1D])
        places_BT = -1 - ids_BT
        rows_BT = torch.where(is_virtual_BT, places_BT, self.tokens)
        virtual_BTD = embedding(rows_BT, table, padding_idx=self.tokens)
        virtual_BTD = virtual_BTD.to(vocabulary_BTD.dtype)
        is_virtual_BT1 = is_virtual_BT[..., None]
        return torch.where(is_virtual_BT1, virtual_BTD, vocabulary_BTD)


class Embedded(Method[E]):
    """What prompt tuning and p-tuning share: an encoder from PEFT whose output stands in front of documents."""

    def config(self, hidden: int) -> Any:
        """PEFT's config for a base of this hidden size."""
        raise NotImplementedError

    def encoder(self, config: Any) -> Module:
        """PEFT's encoder for its config, with weights as PEFT draws them."""
        raise NotImplementedError

    def start(self, encoder: Any, model: "PreTrainedModel") -> None:
        """Give the encoder the values that training starts from."""
        raise NotImplementedError

    def attach(self, model: "PreTrainedModel") -> "PreTrainedModel":
        """Freeze the base and put the encoder into its input embedding."""
        model.requires_grad_(False)
        config = self.config(_hidden_size(model))
        encoder = self.encoder(config)
        self.start(encoder, model)
        base = model.get_input_embeddings()
        virtual = VirtualEmbedding(base, encoder, self.options.tokens)
        model.set_input_embeddings(virtual)
        return model

    def export(self, model: "PreTrainedModel", weights: Tensors, folder: Path) -> None:
        """Write adapter_config.json and adapter_model.safetensors with the encoder's output."""
        config = self.config(_hidden_size(model))
        encoder = self.encoder(config)
        state: Tensors = {}
        for name, value in weights.items():
            _, _, name_in_encoder = name.rpartition("encoder.")
            state[name_in_encoder] = value
        encoder.load_state_dict(state)
        places_V = torch.arange(self.options.tokens)
        with torch.no_grad():
            prompt_VD = encoder(places_V)
            write(model, config, prompt_VD, folder)


def common(tokens: int, width: int) -> Keywords:
    """What PEFT's config says of virtual tokens of any kind: how many, and how many numbers each has."""
    return {
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": tokens,
        "num_transformer_submodules": 1,
        "token_dim": width,
    }


def write(model: "PreTrainedModel", config: Any, prompt: Tensor, folder: Path) -> None:
    """Write what PEFT calls the prompt embeddings of an adapter, and its config."""
    folder.mkdir(parents=True, exist_ok=True)
    config.base_model_name_or_path = model.name_or_path
    config.inference_mode = True
    config.save_pretrained(str(folder))
    prompt = prompt.detach().contiguous()
    tensors = {"prompt_embeddings": prompt}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def text_ids(tokenizer: Any, text: str, tokens: int) -> Tensor:
    """The ids of a text, repeated or cut to a number of tokens."""
    encoded = tokenizer(text)
    ids = list(encoded["input_ids"])
    if not ids:
        raise ValueError(f"method.init_text: found {text!r}, which has no token; allowed: a text, or null")
    repeats = -(-tokens // len(ids))  # rounded up
    repeated = ids * repeats
    return torch.tensor(repeated[:tokens])


def embedded(model: "PreTrainedModel", ids: Tensor, gather: Gather) -> Tensor:
    """The base's vectors of ids, fp32, whether it is sharded or not."""
    layer = model.get_input_embeddings()
    with torch.no_grad(), gather.gathered(layer.parameters()):
        ids = ids.to(layer.weight.device)
        vectors: Tensor = layer(ids)
        vectors = vectors.float()
    return vectors.clone()


def _hidden_size(model: "PreTrainedModel") -> int:
    """The hidden size D of a base."""
    config = model.config.get_text_config()
    return int(config.hidden_size)
