"""rsLoRA: LoRA with the scale alpha / sqrt(r), stable in r (Kalajdzievski 2023, arXiv 2312.03732, theorem 3.2)."""

from methods.base import Keywords
from methods.lora import LowRank
from methods.options.low_rank import RsLora


class RsLoraTuning(LowRank[RsLora]):
    """LoRA with the rank-stabilised scale alpha / sqrt(r)."""

    def config(self) -> Keywords:
        """Ask PEFT to divide alpha by the root of the rank."""
        return {"use_rslora": True}
