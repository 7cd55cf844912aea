"""How far two passes in bf16 are apart in nats a token: transformers with one kind of attention, and with another.

    python benchmarks/bf16_distance.py --out benchmarks/results/bf16-distance.json
    python benchmarks/bf16_distance.py --base meta-llama/Llama-3.2-1B
    python benchmarks/bf16_distance.py --layers 2                        (without a GPU)

No engine is nearer to a trainer than such passes are to each other, where their sums have another order: this is what
`engine_distance` of `preferences.py --rows grpo` is to be held against. Tokens are drawn from the fp32 pass, as a
policy draws its answers. Without --base, the weights are random and of Llama-3.2-1B's shape.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import llama_1b
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

PASSES = {
    "fp32": (torch.float32, "sdpa"),
    "bf16 with sdpa": (torch.bfloat16, "sdpa"),
    "bf16 with eager": (torch.bfloat16, "eager"),
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    """Write and print the mean distances of each two passes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="a model id or folder; default: random weights of Llama-3.2-1B's shape")
    parser.add_argument("--layers", type=int, default=llama_1b.SHAPE["num_hidden_layers"])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=356, help="of a row")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model = loaded(arguments)
    torch.manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (arguments.rows, arguments.tokens), device=DEVICE)
    found: dict[str, Tensor] = {}
    drawn = None
    for name, (dtype, attention) in PASSES.items():
        model.set_attn_implementation(attention)
        logs = passed(model, ids, dtype)
        if drawn is None:
            drawn = [row.exp().multinomial(1) for row in logs]
        pairs = zip(logs, drawn, strict=True)
        found[name] = torch.cat([row.gather(1, chosen) for row, chosen in pairs])
    distances = {}
    for one, other in itertools.combinations(found, 2):
        distances[f"{one} and {other}"] = (found[one] - found[other]).abs().mean().item()
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    base = arguments.base or f"Llama-3.2-1B's shape, {arguments.layers} layers, random"
    figures = {"device": device, "versions": versions, "base": base, "mean_distance": distances}
    text = json.dumps(figures, indent=2)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    print(text)


def loaded(arguments: argparse.Namespace) -> Any:
    """The base in fp32, with weights that bf16 has too."""
    torch.manual_seed(0)
    if arguments.base:
        model = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.bfloat16)
    else:
        shape = llama_1b.SHAPE | {"num_hidden_layers": arguments.layers}
        with torch.device(DEVICE):
            model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16)
    return in_type(model.to(DEVICE).eval(), torch.float32)


def in_type(model: Any, dtype: torch.dtype) -> Any:
    """The model with its weights in another type; the frequencies of its rotary positions stay in fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@torch.no_grad()
def passed(model: Any, ids: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """What a pass says of the token behind each one: log-probabilities [tokens, vocabulary] of each row, fp32."""
    in_type(model, dtype)
    return [model(input_ids=row[None]).logits[0].float().log_softmax(-1) for row in ids]


if __name__ == "__main__":
    main()
