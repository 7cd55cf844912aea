"""Adapters that are no product of two matrices."""

from collections.abc import Iterable, Mapping
from math import prod
from typing import ClassVar, Literal

from pydantic import Field

from methods.options.base import WEIGHTS_EXPONENT, Count, Fraction, ModuleOptions, Options, Positive, Seed, Targeted
from methods.parts.targets import Linears, Matrices, Others, choose_targets, is_any_named, outputs


class Ia3(ModuleOptions):
    """Learned scales of keys, values and feed-forward inputs."""

    kind: Literal["ia3"] = "ia3"
    implementation: ClassVar[str] = "methods.ia3:Ia3Tuning"
    default_lr: ClassVar[float] = 5e-3  # PEFT's comparison: 46 % on GSM8K, 31 % at 1e-4
    width_exponent: ClassVar[float] = WEIGHTS_EXPONENT
    on_4_bits: ClassVar[bool] = True
    when_to_take: ClassVar[str] = (
        "Take it for very many tasks that are near to what the base can do: an adapter is some hundred thousand "
        "weights, and a merge or a batch of many adapters costs almost nothing. It learns less than LoRA (31 to "
        "46 % on GSM8K where LoRA had 47 to 49 %, in PEFT's method_comparison), and only at rates far above "
        "LoRA's."
    )

    target: tuple[str, ...] = Field(
        ("k_proj", "v_proj", "down_proj"),
        min_length=1,
        description="names of modules whose output (or input) is scaled",
    )
    feedforward: tuple[str, ...] = Field(("down_proj",), description="names of those of them whose input is scaled")

    def targets(self, linears: Linears, others: Others) -> Matrices:  # noqa: ARG002
        """The linear layers that are scaled, with their (out, in)."""
        return choose_targets(self.target, (), linears, {})

    def fed(self, targets: Iterable[str]) -> list[str]:
        """Those of the targets whose input is scaled."""
        scaled_by_input = []
        for name in targets:
            if is_any_named(name, self.feedforward):
                scaled_by_input.append(name)
        return scaled_by_input

    def added_parameters(self, linears: Linears, others: Others) -> int:
        """One scale per output of a target, per input where it is a feed-forward module."""
        chosen = self.targets(linears, others)
        fed = self.fed(chosen)
        total = 0
        for name, (out_features, in_features) in chosen.items():
            if name in fed:
                total += in_features
            else:
                total += out_features
        return total


class Vera(Targeted):
    """Two random projections shared by all modules, with trained scales for each."""

    kind: Literal["vera"] = "vera"
    implementation: ClassVar[str] = "methods.vera:VeraTuning"
    default_lr: ClassVar[float] = 5e-3
    width_exponent: ClassVar[float] = WEIGHTS_EXPONENT
    on_4_bits: ClassVar[bool] = True
    when_to_take: ClassVar[str] = (
        "Take it where very many adapters must be kept in memory together: they share their matrices, and each "
        "trains a seventieth of what LoRA does. A step is no faster, as the shared rank is high, and it was "
        "twelve points behind LoRA in PEFT's method_comparison. For one adapter, or a few, take LoRA."
    )

    rank: Count = Field(256, description="rank r of the shared projections")
    d_initial: float = Field(0.1, description="what all entries of the trained scales d start from")
    dropout: Fraction = Field(0.0, description="probability with which an entry of the adapter's input is dropped")
    projection_seed: Seed = Field(
        0, description="seed of the shared projections, the same for adapters that are to share them"
    )

    def targets(self, linears: Linears, others: Others) -> Matrices:  # noqa: ARG002
        """The linear layers that get an adapter, with their (out, in)."""
        return self.linear_targets(linears)

    def added_parameters(self, linears: Linears, others: Others) -> int:
        """d in R^r and b in R^{out} for every target."""
        chosen = self.targets(linears, others)
        ds = self.rank * len(chosen)
        bs = outputs(chosen)
        return ds + bs


class FourierFt(Targeted):
    """An update whose spectrum has a few trained entries."""

    kind: Literal["fourierft"] = "fourierft"
    implementation: ClassVar[str] = "methods.fourierft:FourierFtTuning"
    default_lr: ClassVar[float] = 3e-2
    on_4_bits: ClassVar[bool] = True
    when_to_take: ClassVar[str] = (
        "Take it where a file of some kilobytes for each task is what counts: a thousand numbers change a whole "
        "matrix. Otherwise take LoRA: the update is built as a dense matrix in every pass, which costs memory and "
        "time, and it needs a rate a hundred times LoRA's: at LoRA's it learned nothing in PEFT's "
        "method_comparison."
    )

    frequencies: Count = Field(
        1000, description="trained entries of each module's spectrum, at most as many as its weights"
    )
    scale: Positive = Field(
        150.0, description="factor of the inverse transform, which divides by the number of weights"
    )
    location_seed: Seed = Field(777, description="seed of the entries' places")

    def targets(self, linears: Linears, others: Others) -> Matrices:  # noqa: ARG002
        """The linear layers that get an adapter; raises ValueError where one has fewer entries than are trained."""
        chosen = self.linear_targets(linears)
        for name, shape in chosen.items():
            entries = prod(shape)
            if entries < self.frequencies:
                raise ValueError(f"found frequencies {self.frequencies}; {name} has {entries} entries")
        return chosen

    def added_parameters(self, linears: Linears, others: Others) -> int:
        """The trained entries of the spectra of all targets."""
        chosen = self.targets(linears, others)
        return self.frequencies * len(chosen)


class Bottleneck(Options):
    """Small networks behind the sublayers: x + up(f(down(x)))."""

    kind: Literal["bottleneck"] = "bottleneck"
    implementation: ClassVar[str] = "methods.bottleneck:BottleneckTuning"
    default_lr: ClassVar[float] = 1e-3
    width_exponent: ClassVar[float] = WEIGHTS_EXPONENT
    on_4_bits: ClassVar[bool] = True
    when_to_take: ClassVar[str] = (
        "Take it where an update should not be linear, or to compare with work on adapters of this kind. Training "
        "is faster than LoRA's, as it is in fewer places. But it can never be merged, so it costs time for every "
        "token that is served, neither PEFT nor transformers load it, and it learned no more than LoRA on the "
        "tiny base."
    )
    refusals: ClassVar[Mapping[str, str]] = {
        "merge": "there is a nonlinearity in it, which no weight of the base can stand for; nearest: lora",
        "export": "neither PEFT nor transformers has it; methods.bottleneck.load puts it on a base",
    }

    placement: Literal["houlsby", "pfeiffer"] = Field(
        "pfeiffer", description="behind attention and feed-forward, or behind feed-forward alone"
    )
    size: Count = Field(64, description="width m of the bottleneck, in features")
    activation: Literal["relu", "gelu", "silu"] = Field("relu", description="the nonlinearity f between down and up")

    def added_parameters(self, linears: Linears, others: Others) -> int:  # noqa: ARG002
        """The matrices down and up with their biases, for every adapter."""
        chosen = choose_targets(self.sublayer_ends, (), linears, {})
        width = outputs(chosen)
        matrices = 2 * width * self.size
        biases = width + self.size * len(chosen)
        return matrices + biases

    @property
    def sublayer_ends(self) -> tuple[str, ...]:
        """The names of the linear layers that get an adapter behind them."""
        if self.placement == "houlsby":
            return ("o_proj", "down_proj")
        return ("down_proj",)
