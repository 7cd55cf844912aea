"""The options of every method: plain frozen data, no torch, so that a laptop can validate a job."""

from typing import Annotated

from pydantic import Field

from methods.options.base import Options
from methods.options.low_rank import AdaLora, Dora, LongLora, Lora, QLora, ReLora, RsLora
from methods.options.other_adapters import Bottleneck, FourierFt, Ia3, Vera
from methods.options.virtual import Prefix, Prompt, PTuning
from methods.options.whole import Full, Galore, layer_of

Method = Annotated[
    Full
    | Lora
    | RsLora
    | Dora
    | QLora
    | AdaLora
    | LongLora
    | Ia3
    | Vera
    | FourierFt
    | Prefix
    | Prompt
    | PTuning
    | Bottleneck
    | Galore
    | ReLora,
    Field(discriminator="kind"),
]
ALL: tuple[type[Options], ...] = (
    Full,
    Lora,
    RsLora,
    Dora,
    QLora,
    AdaLora,
    LongLora,
    Ia3,
    Vera,
    FourierFt,
    Prefix,
    Prompt,
    PTuning,
    Bottleneck,
    Galore,
    ReLora,
)

__all__ = [
    "ALL",
    "AdaLora",
    "Bottleneck",
    "Dora",
    "FourierFt",
    "Full",
    "Galore",
    "Ia3",
    "LongLora",
    "Lora",
    "Method",
    "Options",
    "PTuning",
    "Prefix",
    "Prompt",
    "QLora",
    "ReLora",
    "RsLora",
    "Vera",
    "layer_of",
]
