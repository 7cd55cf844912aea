"""LoRA for sequences that are longer than the base's."""

from math import ceil, prod
from typing import ClassVar, Literal

from pydantic import Field

from methods.options.base import BaseConfig, Count, known_positions, plain_attention, window
from methods.options.lora_family import LowRankOptions, is_scaled
from methods.parts.targets import Linears, Matrices, Others, Target


class LongLora(LowRankOptions):
    """LoRA with shifted sparse attention for long sequences; embeddings and norms are trained too."""

    kind: Literal["longlora"] = "longlora"
    implementation: ClassVar[str] = "methods.longlora:LongLoraTuning"
    on_4_bits: ClassVar[bool] = True
    when_to_take: ClassVar[str] = (
        "Take it to reach sequences that are longer than the base's positions, at a cost of attention that falls "
        "with the number of groups. Where the base reaches your sequences already, take LoRA: in training a head "
        "sees no more than its group, so an answer may lose sight of its prompt (`groups: 1` is dense attention), "
        "and trained embeddings make the adapter large."
    )

    target: Target = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj"), description="modules that get an adapter by name, or all-linear"
    )
    rank: Count = Field(8, description="rank r of the update B A, the same for every module")
    groups: Count = Field(4, description="parts of seq_len within which heads attend; 1: dense attention")
    rope: Literal["linear", "yarn"] = Field("linear", description="how positions beyond the base's are reached")

    def targets(self, linears: Linears, others: Others) -> Matrices:  # noqa: ARG002
        """The linear layers that get an adapter: embeddings are trained themselves."""
        return self.linear_targets(linears)

    def added_parameters(self, linears: Linears, others: Others) -> int:
        """What LoRA adds, and a trained copy of each embedding and norm."""
        total = super().added_parameters(linears, others)
        for name, shape in others.items():
            if self.copies(name):
                total += prod(shape)
        return total

    def copies(self, name: str) -> bool:
        """Whether a copy of this weight, which is no linear layer's, is trained."""
        return "embed" in name or "norm" in name

    def check(self, config: BaseConfig, seq_len: int) -> None:
        """Beyond the base's positions it goes where nothing scales the rotary frequencies yet."""
        if self.groups > 1:
            plain_attention(config, self.kind, "lora")
            self._check_window(config, seq_len)
        known = known_positions(config)
        if known is None or seq_len <= known:
            return
        if is_scaled(config):
            raise ValueError(
                f"data.seq_len: found {seq_len}; allowed: at most {known} (the base's positions are scaled already)"
            )

    def _check_window(self, config: BaseConfig, seq_len: int) -> None:
        """Raise ValueError where a group is longer than what the base's attention sees."""
        visible = window(config)
        if visible is None:
            return
        group = ceil(seq_len / self.groups)
        if group > visible:
            most = visible * self.groups
            allowed = f"at most {most}, in {self.groups} groups of the {visible} tokens"
            raise ValueError(f"data.seq_len: found {seq_len}; allowed: {allowed} that the base's attention sees")
