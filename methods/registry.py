"""From a job's options to the method that they describe."""

from typing import Any

from methods.base import Method
from methods.options import Dora, Full, Lora, Options, RsLora


def create(options: Options) -> Method[Any]:
    """The method of these options; its module (and torch) is imported now."""
    match options:
        case Full():
            from methods.full import FullTuning

            return FullTuning(options)
        case Lora():
            from methods.lora import LoraTuning

            return LoraTuning(options)
        case RsLora():
            from methods.rslora import RsLoraTuning

            return RsLoraTuning(options)
        case Dora():
            from methods.dora import DoraTuning

            return DoraTuning(options)
    raise ValueError(f"no method for {type(options).__name__}")
