"""From a job's options to the method that they describe."""

from importlib import import_module
from typing import Any

from methods.base import Method, Setup
from methods.options import Options

CLASSES = {
    "full": "methods.full:FullTuning",
    "lora": "methods.lora:LoraTuning",
    "rslora": "methods.rslora:RsLoraTuning",
    "dora": "methods.dora:DoraTuning",
    "qlora": "methods.qlora:QLoraTuning",
    "adalora": "methods.adalora:AdaLoraTuning",
    "longlora": "methods.longlora:LongLoraTuning",
    "ia3": "methods.ia3:Ia3Tuning",
    "vera": "methods.vera:VeraTuning",
    "fourierft": "methods.fourierft:FourierFtTuning",
    "prefix": "methods.prefix:PrefixTuning",
    "prompt": "methods.prompt:PromptTuning",
    "ptuning": "methods.ptuning:PTuningTuning",
    "bottleneck": "methods.bottleneck:BottleneckTuning",
    "galore": "methods.galore:GaloreTuning",
    "relora": "methods.relora:ReLoraTuning",
}


def create(options: Options, setup: Setup | None = None) -> Method[Any]:
    """The method of these options; its module (and torch) is imported now."""
    module, name = CLASSES[options.model_dump()["kind"]].split(":")
    method: Method[Any] = getattr(import_module(module), name)(options, setup or Setup())
    return method
