"""The options of every method: plain frozen data, no torch, so that a laptop can validate a job."""

from collections.abc import Iterable, Mapping
from math import prod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from methods.parts.targets import Linears, Others, Target, choose, is_named

WIDTH = 2048
# The best rate falls like this power of the hidden size on Llama (hardly on Qwen), and LoRA's is about ten times that
# of full fine-tuning: Schulman et al. 2025, "LoRA Without Regret", and Tinker's guide to hyperparameters.
WEIGHTS_EXPONENT = 0.78


class Options(BaseModel):
    """What all methods share: a kind, and a default learning rate for it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    default_lr: ClassVar[float]  # for a base of hidden size WIDTH
    width_exponent: ClassVar[float] = 0.0  # how the best rate falls with the hidden size
    makes_model: ClassVar[bool] = False  # the output is a whole model, not an adapter
    refusals: ClassVar[Mapping[str, str]] = {}  # what it cannot do (merge, export), and why

    def adds(self, linears: Linears, others: Others) -> int:
        """How many parameters the method adds to a base of these shapes; raises ValueError for a bad target."""
        raise NotImplementedError

    def trained(self, linears: Linears, others: Others) -> int:
        """How many parameters it trains on a base of these shapes; raises ValueError for a bad target."""
        return self.adds(linears, others)

    def rate(self, hidden: int | None) -> float:
        """The default peak learning rate on a base of this hidden size."""
        return float(self.default_lr * (WIDTH / (hidden or WIDTH)) ** self.width_exponent)

    def optimizer_elements(self, linears: Linears, others: Others) -> int:
        """Numbers that the optimizer keeps, over all workers: two moments per trained parameter."""
        return 2 * self.trained(linears, others)

    def frozen_bytes(self, linears: Linears, others: Others, element: int) -> tuple[int, int]:
        """Bytes of the frozen weights of `element` bytes each: those that ZeRO 3 shares, those that it does not."""
        base = _size(linears) + _size(others)
        return (base + self.adds(linears, others) - self.trained(linears, others)) * element, 0

    @property
    def quantises(self) -> bool:
        """Whether it keeps the base's linear layers in 4 bits."""
        return False

    def extends(self, config: Mapping[str, Any]) -> bool:  # noqa: ARG002
        """Whether it can train a base with this config.json on sequences longer than the base's."""
        return False


class Full(Options):
    """Train every weight of the base, or those that are not frozen."""

    kind: Literal["full"] = "full"
    default_lr: ClassVar[float] = 2e-5
    width_exponent: ClassVar[float] = WEIGHTS_EXPONENT
    makes_model: ClassVar[bool] = True

    freeze: tuple[str, ...] = Field((), description="patterns of weights that stay as they are, like *embed_tokens*")
    lisa_layers: int | None = Field(None, ge=1, description="layers trained at a time, drawn at random; null: all")
    lisa_every: int = Field(20, ge=1, description="steps between two draws of lisa_layers")

    def adds(self, linears: Linears, others: Others) -> int:  # noqa: ARG002
        """Nothing."""
        return 0

    def trained(self, linears: Linears, others: Others) -> int:
        """Every weight that is not frozen."""
        shapes = {f"{name}.weight": shape for name, shape in linears.items()} | dict(others)
        for pattern in self.freeze:
            if not any(is_named(name, pattern) for name in shapes):
                raise ValueError(f"found the pattern {pattern!r} in freeze, which no weight of the base matches")
        layers = {layer_of(name) for name in shapes} - {None}
        if self.lisa_layers is not None and self.lisa_layers > len(layers):
            raise ValueError(f"found lisa_layers {self.lisa_layers}; allowed: up to the base's {len(layers)} layers")
        trained = sum(prod(shape) for name, shape in shapes.items() if not self.freezes(name))
        if trained == 0:
            raise ValueError("found patterns in freeze that match every weight; allowed: to leave one to train")
        return trained

    def freezes(self, name: str) -> bool:
        """Whether the weight of this name stays as it is."""
        return any(is_named(name, pattern) for pattern in self.freeze)


class _Targeted(Options):
    target: Target = Field("all-linear", description="names of the modules that get an adapter, or all-linear")
    exclude: tuple[str, ...] = Field((), description="names of modules that get none")

    def targets(self, linears: Linears, others: Others) -> dict[str, tuple[int, int]]:
        """The modules that get an adapter, with their (out, in); a name stands for every module that ends with it."""
        return choose(self.target, self.exclude, linears, others)


class _LowRank(_Targeted):
    default_lr: ClassVar[float] = 2e-4
    width_exponent: ClassVar[float] = WEIGHTS_EXPONENT

    rank: int = Field(16, ge=1, description="rank r of the update B A")
    alpha: float | None = Field(None, gt=0, description="numerator of the update's scale; null: 2 x rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    lr_ratio: float = Field(1.0, gt=0, description="LoRA+: learning rate of B over that of A")

    @property
    def scale_numerator(self) -> float:
        """Alpha, with its default of twice the rank."""
        return self.alpha if self.alpha is not None else 2.0 * self.rank

    def adds(self, linears: Linears, others: Others) -> int:
        """A in R^{r x in} and B in R^{out x r} for every target."""
        return sum(self.rank * (out + in_) for out, in_ in self.targets(linears, others).values())


class Lora(_LowRank):
    """Low-rank update W + (alpha / r) B A."""

    kind: Literal["lora"] = "lora"

    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora", "eva"] = Field(
        "default", description="how A and B start: Kaiming and zero, or from the base's (eva: the data's) directions"
    )

    @model_validator(mode="after")
    def _halves(self) -> "Lora":
        if self.init == "orthogonal" and self.rank % 2:
            raise ValueError(f"found rank {self.rank} with init orthogonal; allowed: an even rank")
        return self

    def targets(self, linears: Linears, others: Others) -> dict[str, tuple[int, int]]:
        """The modules that get an adapter; raises ValueError where the start has no meaning for one."""
        if self.init in ("default", "gaussian"):
            return super().targets(linears, others)
        chosen = choose(self.target, self.exclude, linears, {})
        _check_directions(self, chosen)
        return chosen


class RsLora(_LowRank):
    """LoRA with the rank-stabilised scale alpha / sqrt(r)."""

    kind: Literal["rslora"] = "rslora"


class Dora(_LowRank):
    """LoRA on the direction of each weight column, with a trained magnitude."""

    kind: Literal["dora"] = "dora"

    def targets(self, linears: Linears, others: Others) -> dict[str, tuple[int, int]]:  # noqa: ARG002
        """The linear layers that get an adapter, with their (out, in)."""
        return choose(self.target, self.exclude, linears, {})

    def adds(self, linears: Linears, others: Others) -> int:
        """What LoRA adds, and a magnitude in R^{out} for every target."""
        return super().adds(linears, others) + sum(out for out, _ in self.targets(linears, others).values())


class QLora(_LowRank):
    """LoRA over a base in 4 bits."""

    kind: Literal["qlora"] = "qlora"

    quant: Literal["nf4", "fp4"] = Field("nf4", description="4-bit data type of the base")
    double_quant: bool = Field(True, description="quantise the quantisation constants too")
    init: Literal["default", "gaussian", "loftq"] = Field(
        "default", description="how A and B start; loftq: from what quantisation lost"
    )

    def targets(self, linears: Linears, others: Others) -> dict[str, tuple[int, int]]:  # noqa: ARG002
        """The linear layers that get an adapter, with their (out, in); all linear layers are in 4 bits."""
        chosen = choose(self.target, self.exclude, linears, {})
        _check_directions(self, chosen)
        return chosen

    @property
    def quantises(self) -> bool:
        """It does."""
        return True

    def frozen_bytes(self, linears: Linears, others: Others, element: int) -> tuple[int, int]:
        """Every worker holds the linear layers in 4 bits; ZeRO 3 shares the rest."""
        return _size(others) * element, _packed(linears, self.double_quant)


class AdaLora(_Targeted):
    """Low-rank update B diag(E) A whose ranks are chosen while it trains."""

    kind: Literal["adalora"] = "adalora"
    default_lr: ClassVar[float] = 5e-4
    width_exponent: ClassVar[float] = WEIGHTS_EXPONENT

    rank: int = Field(8, ge=1, description="average rank at the end")
    initial_rank: int = Field(12, ge=1, description="rank of every module at the start")
    alpha: float = Field(32.0, gt=0, description="numerator of the update's scale")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps before ranks are cut")
    final: float = Field(0.3, ge=0, lt=1, description="share of the steps after the last cut")
    every: int = Field(10, ge=1, description="steps between two cuts")
    beta1: float = Field(0.85, gt=0, lt=1, description="averaging of the importance")
    beta2: float = Field(0.85, gt=0, lt=1, description="averaging of its uncertainty")
    orthogonality: float = Field(0.5, ge=0, description="weight of the penalty that keeps A and B orthogonal")

    @model_validator(mode="after")
    def _ranks_fall(self) -> "AdaLora":
        if self.rank > self.initial_rank:
            raise ValueError(f"found rank {self.rank} above initial_rank {self.initial_rank}")
        if self.warmup + self.final >= 1:
            raise ValueError("warmup and final together must leave steps in which ranks are cut")
        return self

    def targets(self, linears: Linears, others: Others) -> dict[str, tuple[int, int]]:  # noqa: ARG002
        """The linear layers that get an adapter, with their (out, in)."""
        return choose(self.target, self.exclude, linears, {})

    def adds(self, linears: Linears, others: Others) -> int:
        """A in R^{r x in}, B in R^{out x r} and E in R^r for every target, at the initial rank."""
        return sum(self.initial_rank * (out + in_ + 1) for out, in_ in self.targets(linears, others).values())


class LongLora(_LowRank):
    """LoRA with shifted sparse attention for long sequences; embeddings and norms are trained too."""

    kind: Literal["longlora"] = "longlora"

    target: Target = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj"), description="modules that get an adapter by name, or all-linear"
    )
    rank: int = Field(8, ge=1, description="rank r of the update B A")
    groups: int = Field(4, ge=1, description="parts of seq_len within which heads attend; 1: dense attention")
    rope: Literal["linear", "yarn"] = Field("linear", description="how positions beyond the base's are reached")

    def targets(self, linears: Linears, others: Others) -> dict[str, tuple[int, int]]:  # noqa: ARG002
        """The linear layers that get an adapter: embeddings are trained themselves."""
        return choose(self.target, self.exclude, linears, {})

    def adds(self, linears: Linears, others: Others) -> int:
        """What LoRA adds, and a trained copy of each embedding and norm."""
        return super().adds(linears, others) + sum(prod(s) for name, s in others.items() if self.copies(name))

    def copies(self, name: str) -> bool:
        """Whether a copy of this weight, which is no linear layer's, is trained."""
        return "embed" in name or "norm" in name

    def extends(self, config: Mapping[str, Any]) -> bool:
        """Whether positions beyond those of this base can be reached: where nothing scales its rotary frequencies."""
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        nested = any(isinstance(value, Mapping) for value in rope.values())
        return not nested and rope.get("rope_type", rope.get("type", "default")) == "default"


class Ia3(Options):
    """Learned scales of keys, values and feed-forward inputs."""

    kind: Literal["ia3"] = "ia3"
    default_lr: ClassVar[float] = 2e-2

    target: tuple[str, ...] = Field(
        ("k_proj", "v_proj", "down_proj"), min_length=1, description="modules whose output (or input) is scaled"
    )
    feedforward: tuple[str, ...] = Field(("down_proj",), description="those of them whose input is scaled")

    def targets(self, linears: Linears, others: Others) -> dict[str, tuple[int, int]]:  # noqa: ARG002
        """The linear layers that are scaled, with their (out, in)."""
        return choose(self.target, (), linears, {})

    def fed(self, targets: Iterable[str]) -> list[str]:
        """Those of the targets whose input is scaled."""
        return [name for name in targets if any(is_named(name, pattern) for pattern in self.feedforward)]

    def adds(self, linears: Linears, others: Others) -> int:
        """One scale per output of a target, per input where it is a feed-forward module."""
        chosen = self.targets(linears, others)
        fed = self.fed(chosen)
        return sum(in_ if name in fed else out for name, (out, in_) in chosen.items())


class Vera(_Targeted):
    """Two random projections shared by all modules, with trained scales for each."""

    kind: Literal["vera"] = "vera"
    default_lr: ClassVar[float] = 2e-2

    rank: int = Field(256, ge=1, description="rank r of the shared projections")
    d_initial: float = Field(0.1, description="start of the trained scales d")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    projection_seed: int = Field(0, ge=0, description="seed of the shared projections")

    def targets(self, linears: Linears, others: Others) -> dict[str, tuple[int, int]]:  # noqa: ARG002
        """The linear layers that get an adapter, with their (out, in)."""
        return choose(self.target, self.exclude, linears, {})

    def adds(self, linears: Linears, others: Others) -> int:
        """d in R^r and b in R^{out} for every target."""
        return sum(self.rank + out for out, _ in self.targets(linears, others).values())


class FourierFt(_Targeted):
    """An update whose spectrum has a few trained entries."""

    kind: Literal["fourierft"] = "fourierft"
    default_lr: ClassVar[float] = 3e-2

    frequencies: int = Field(1000, ge=1, description="trained entries of each module's spectrum")
    scale: float = Field(150.0, gt=0, description="factor of the update")
    location_seed: int = Field(777, ge=0, description="seed of the entries' places")

    def targets(self, linears: Linears, others: Others) -> dict[str, tuple[int, int]]:  # noqa: ARG002
        """The linear layers that get an adapter; raises ValueError where one has fewer entries than are trained."""
        chosen = choose(self.target, self.exclude, linears, {})
        for name, shape in chosen.items():
            if prod(shape) < self.frequencies:
                raise ValueError(f"found frequencies {self.frequencies}; {name} has {prod(shape)} entries")
        return chosen

    def adds(self, linears: Linears, others: Others) -> int:
        """The trained entries of every target."""
        return self.frequencies * len(self.targets(linears, others))


class _Virtual(Options):
    refusals: ClassVar[Mapping[str, str]] = {
        "merge": "virtual tokens are inputs, which no weight of the base can stand for; nearest: lora"
    }

    tokens: int = Field(20, ge=1, description="virtual tokens in front of every document")
    init_text: str | None = Field(
        "Answer the following question.",
        min_length=1,
        description="text that they start from, repeated; null: random",
    )


class Prefix(_Virtual):
    """Trained keys and values in front of every layer's own."""

    kind: Literal["prefix"] = "prefix"
    default_lr: ClassVar[float] = 5e-3
    width_exponent: ClassVar[float] = WEIGHTS_EXPONENT

    def adds(self, linears: Linears, others: Others) -> int:
        """A key and a value per layer and virtual token."""
        chosen = choose(("k_proj", "v_proj"), (), linears, others)
        return self.tokens * sum(out for out, _ in chosen.values())


class Prompt(_Virtual):
    """Trained embeddings in front of every document."""

    kind: Literal["prompt"] = "prompt"
    default_lr: ClassVar[float] = 3e-2

    def adds(self, linears: Linears, others: Others) -> int:  # noqa: ARG002
        """An embedding per virtual token."""
        return self.tokens * _hidden(others)


class PTuning(_Virtual):
    """Embeddings in front of every document, made by a trained network."""

    kind: Literal["ptuning"] = "ptuning"
    default_lr: ClassVar[float] = 1e-2

    hidden: int = Field(128, ge=1, description="width of the network")

    def adds(self, linears: Linears, others: Others) -> int:  # noqa: ARG002
        """The network's inputs, and its three layers with their biases."""
        size, width = _hidden(others), self.hidden
        return self.tokens * size + (size + 1) * width + (width + 1) * width + (width + 1) * size


class Bottleneck(Options):
    """Small networks behind the sublayers: x + up(f(down(x)))."""

    kind: Literal["bottleneck"] = "bottleneck"
    default_lr: ClassVar[float] = 1e-3
    width_exponent: ClassVar[float] = WEIGHTS_EXPONENT
    refusals: ClassVar[Mapping[str, str]] = {
        "merge": "there is a nonlinearity in it, which no weight of the base can stand for; nearest: lora",
        "export": "neither PEFT nor transformers has it; methods.bottleneck.load puts it on a base",
    }

    placement: Literal["houlsby", "pfeiffer"] = Field(
        "pfeiffer", description="behind attention and feed-forward, or behind feed-forward alone"
    )
    size: int = Field(64, ge=1, description="width of the bottleneck")
    activation: Literal["relu", "gelu", "silu"] = Field("relu", description="what stands between down and up")

    def adds(self, linears: Linears, others: Others) -> int:
        """down and up with their biases, per adapter."""
        names = ("o_proj", "down_proj") if self.placement == "houlsby" else ("down_proj",)
        chosen = choose(names, (), linears, others)
        return sum(2 * out * self.size + out + self.size for out, _ in chosen.values())


class Galore(_Targeted):
    """Full fine-tuning whose optimizer lives in a low-rank subspace of each matrix's gradient."""

    kind: Literal["galore"] = "galore"
    default_lr: ClassVar[float] = 1e-3
    makes_model: ClassVar[bool] = True

    variant: Literal["galore", "q-galore", "apollo"] = Field(
        "galore", description="q-galore: 4-bit projector, lazy refresh; apollo: random projection, scaled gradient"
    )
    rank: int = Field(128, ge=1, description="rank r of the subspace")
    refresh_every: int = Field(200, ge=1, description="steps between two refreshes of the subspace")
    refresh: Literal["exact", "fast"] = Field("exact", description="singular vectors, exact or by random sketching")
    scale: float = Field(0.25, gt=0, description="factor of the projected update")
    optimizer: Literal["adamw", "adamw8bit"] = Field("adamw", description="what moves in the subspace")

    def adds(self, linears: Linears, others: Others) -> int:  # noqa: ARG002
        """Nothing."""
        return 0

    def trained(self, linears: Linears, others: Others) -> int:
        """Every weight."""
        self.targets(linears, others)
        return _size(linears) + _size(others)

    def optimizer_elements(self, linears: Linears, others: Others) -> int:
        """Moments and bases of the targets, and the other weights' moments, over all ranks (each has all bases)."""
        chosen = self.targets(linears, others)
        ranks = {name: min(self.rank, *shape) for name, shape in chosen.items()}
        low = sum(ranks[name] * (2 * max(shape) + min(shape)) for name, shape in chosen.items())
        return low + 2 * (self.trained(linears, others) - _size(chosen))


class ReLora(_LowRank):
    """LoRA that is merged into the base and started anew, again and again; leaves a whole model."""

    kind: Literal["relora"] = "relora"
    makes_model: ClassVar[bool] = True

    every: float = Field(0.25, gt=0, le=1, description="share of the steps between two merges")
    rewarmup: float = Field(0.02, ge=0, lt=1, description="share of the steps of warm-up after a merge")
    keep: float = Field(0.0, ge=0, lt=1, description="share of the optimizer's state that outlives a merge")
    others: bool = Field(True, description="train embeddings, norms, biases and head too, as the paper does")
    full_rank: float = Field(
        0.0, ge=0, lt=1, description="share of the steps that train the weights themselves first"
    )
    quantised: bool = Field(False, description="keep linear layers in 4 bits (NF4); a merge quantises them anew")

    @model_validator(mode="after")
    def _fits(self) -> "ReLora":
        if self.rewarmup >= self.every:
            raise ValueError(f"found rewarmup {self.rewarmup}; allowed: less than every ({self.every})")
        if self.full_rank and self.quantised:
            raise ValueError(
                "found full_rank with quantised, but weights in 4 bits cannot be trained themselves; "
                "nearest: a job of kind full whose output is the base of this one"
            )
        return self

    @property
    def quantises(self) -> bool:
        """Where it is asked to."""
        return self.quantised

    def targets(self, linears: Linears, others: Others) -> dict[str, tuple[int, int]]:  # noqa: ARG002
        """As for LoRA, but linear layers alone."""
        return choose(self.target, self.exclude, linears, {})

    def trained(self, linears: Linears, others: Others) -> int:
        """The factors, every weight that is no linear layer's, and those too where they are trained first."""
        return self.adds(linears, others) + self._directly(others) + (_size(linears) if self.full_rank else 0)

    def optimizer_elements(self, linears: Linears, others: Others) -> int:
        """Two moments of what is trained at a time: factors, or before them the linear layers' weights."""
        most = max(self.adds(linears, others), _size(linears) if self.full_rank else 0)
        return 2 * (most + self._directly(others))

    def frozen_bytes(self, linears: Linears, others: Others, element: int) -> tuple[int, int]:
        """As for LoRA; where it quantises, every worker holds the linear layers in 4 bits."""
        if not self.quantised:
            return super().frozen_bytes(linears, others, element)
        return (_size(others) - self._directly(others)) * element, _packed(linears, double=True)

    def _directly(self, others: Others) -> int:
        return _size(others) if self.others else 0


def layer_of(name: str) -> int | None:
    """The transformer layer that a weight is in, by the first number in its name; None outside of all layers."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _check_directions(options: Lora | QLora, chosen: Linears) -> None:
    """Raise ValueError where a start from singular vectors asks for more than a matrix has."""
    for name, shape in chosen.items() if options.init in ("pissa", "olora", "eva", "loftq") else ():
        if options.rank > min(shape):
            raise ValueError(f"found rank {options.rank} for init {options.init}; {name} has {min(shape)} directions")


def _packed(linears: Linears, double: bool) -> int:
    """Bytes of matrices in 4 bits, with a constant for 64 weights: fp32, or a byte and an fp32 for 256 of them."""
    constant = 1 + 4 / 256 if double else 4
    return round(_size(linears) * (1 / 2 + constant / 64))


def _size(shapes: Linears | Others) -> int:
    return sum(map(prod, shapes.values()))


def _hidden(others: Others) -> int:
    return next(shape[1] for name, shape in others.items() if len(shape) == 2 and "embed" in name)


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
