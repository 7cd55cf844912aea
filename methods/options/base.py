"""What the options of all methods share: what a method costs, what it refuses, and which modules it takes."""

from collections.abc import Mapping
from math import gcd, prod
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from methods.parts.targets import Linears, Matrices, Others, Target, choose_targets

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]  # of a whole, which it never is
BaseConfig = Mapping[str, Any]  # a base's config.json, or a part of it
Footprint = tuple[int, int]  # bytes that ZeRO shares among ranks, and bytes that every rank holds

WIDTH = 2048
# The best rate falls like this power of the hidden size on Llama (hardly on Qwen), and LoRA's is about ten times that
# of full fine-tuning: Schulman et al. 2025, "LoRA Without Regret", and Tinker's guide to hyperparameters.
WEIGHTS_EXPONENT = 0.78
NO_SECOND_MODEL = {"reference": "it trains the base's own weights, and no second model is kept; nearest: lora"}


class Options(BaseModel):
    """What all methods share: a kind, and a default learning rate for it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: str  # how a job names the method: a Literal with a default, in each class that stands for one
    implementation: ClassVar[str]  # "module:class" of its hooks, which are imported where it trains
    default_lr: ClassVar[float]  # for a base of hidden size WIDTH
    width_exponent: ClassVar[float] = 0.0  # how the best rate falls with the hidden size
    falls_beyond_width: ClassVar[bool] = True  # whether it goes on to fall on bases that are wider than WIDTH
    makes_model: ClassVar[bool] = False  # the output is a whole model, not an adapter
    on_4_bits: ClassVar[bool] = False  # whether it works on a base whose linear layers are in 4 bits already
    trains_new_tokens: ClassVar[bool] = False  # whether it trains embeddings that a base was given for new tokens
    refusals: ClassVar[Mapping[str, str]] = {}  # why it has no merge, export, reference or offload
    when_to_take: ClassVar[str] = ""  # sentences for its page: when it is the right choice, and when LoRA is

    def added_parameters(self, linears: Linears, others: Others) -> int:
        """How many parameters the method adds to a base of these shapes; raises ValueError for a bad target."""
        raise NotImplementedError

    def trained_parameters(self, linears: Linears, others: Others) -> int:
        """How many parameters the method trains on a base of these shapes; raises ValueError for a bad target."""
        return self.added_parameters(linears, others)

    def rate(self, hidden: int | None) -> float:
        """The default peak learning rate on a base of this hidden size."""
        width = hidden or WIDTH
        if not self.falls_beyond_width:
            width = min(width, WIDTH)
        ratio = WIDTH / width
        factor = ratio**self.width_exponent
        rate = self.default_lr * factor
        return float(rate)

    def in_use(self) -> dict[str, Any]:
        """The options as they are used, by name; those that are empty are left out."""
        in_use = {}
        for name, value in self.model_dump(exclude={"kind"}).items():
            is_empty = value is None or value == ()
            if not is_empty:
                in_use[name] = value
        return in_use

    def optimizer_bytes(self, linears: Linears, others: Others) -> Footprint:
        """Bytes of the optimizer's state (two fp32 moments per weight): what ZeRO shares, and what it does not."""
        trained = self.trained_parameters(linears, others)
        return 8 * trained, 0

    def frozen_bytes(self, linears: Linears, others: Others, element: int) -> Footprint:
        """Bytes of the frozen weights of `element` bytes each: those that ZeRO 3 shares, those that it does not."""
        base = element_count(linears) + element_count(others)
        added = self.added_parameters(linears, others)
        trained = self.trained_parameters(linears, others)
        total = base + added
        frozen = total - trained
        return frozen * element, 0

    @property
    def virtual_tokens(self) -> int:
        """Number of virtual tokens in front of every document; they take positions, and have the ids -1, -2, ..."""
        return 0

    @property
    def positions_before(self) -> int:
        """Number of positions in front of a document's own, beside those of its virtual tokens."""
        return 0

    @property
    def quantises(self) -> bool:
        """Whether the method keeps the base's linear layers in 4 bits."""
        return False

    def check(self, config: BaseConfig, seq_len: int) -> None:
        """Raise ValueError where a base with this config.json cannot be tuned on sequences of this length."""
        known = known_positions(config)
        if known is not None and seq_len > known:
            raise ValueError(f"data.seq_len: found {seq_len}; allowed: at most {known} (positions of the base)")

    def check_in_4_bits(self, quantization: BaseConfig) -> None:
        """Raise ValueError where the options do not fit a base in 4 bits of this quantization_config."""


class ModuleOptions(Options):
    """Options of methods that work on some of the base's modules."""

    def targets(self, linears: Linears, others: Others) -> Matrices:
        """The modules that the method works on, with their (out, in); raises ValueError for a bad target."""
        raise NotImplementedError


class Targeted(ModuleOptions):
    """Options of methods that work on modules which the job chooses freely."""

    target: Target = Field("all-linear", description="names of the modules that get an adapter, or all-linear")
    exclude: tuple[str, ...] = Field((), description="names of modules that get none")

    def targets(self, linears: Linears, others: Others) -> Matrices:
        """The modules of the job, with their (out, in); a name stands for every module that ends with it."""
        wanted = self.target
        excluded = self.exclude
        return choose_targets(wanted, excluded, linears, others)

    def linear_targets(self, linears: Linears) -> Matrices:
        """The same of linear layers alone, for methods that cannot adapt embeddings and head."""
        no_others: Others = {}
        return choose_targets(self.target, self.exclude, linears, no_others)


def known_positions(config: BaseConfig) -> int | None:
    """How many positions a base knows, by its config.json; None when that does not say."""
    count = config.get("n_positions")
    count = config.get("max_position_embeddings", count)
    if isinstance(count, int):
        return count
    return None


def plain_attention(config: BaseConfig, kind: str, nearest: str) -> None:
    """Raise ValueError where a base caps its attention's logits, which not all attention functions can do."""
    cap = config.get("attn_logit_softcapping")
    if cap is None:
        return
    raise ValueError(f"method.kind: {kind} cannot cap attention's logits, as this base does; nearest: {nearest}")


def check_heads(config: BaseConfig, ranks: int) -> None:
    """Raise ValueError where so many ranks cannot share a base's heads, each with as many keys as the others."""
    heads = config.get("num_attention_heads", ranks)
    for_keys = config.get("num_key_value_heads") or heads
    if heads % ranks or for_keys % ranks:
        most = gcd(heads, for_keys)
        raise ValueError(
            f"sharding.sequence: found {ranks}; allowed: a divisor of {most}, as the base has {heads} heads of "
            f"attention, and {for_keys} of keys"
        )


def window(config: BaseConfig) -> int | None:
    """How many tokens a base's attention sees back; None when it sees all of them."""
    if config.get("use_sliding_window", True):
        return config.get("sliding_window")
    return None


def four_bit_bytes(linears: Linears, double: bool) -> int:
    """Bytes of matrices in 4 bits, with a constant for 64 weights: fp32, or a byte and an fp32 for 256 of them."""
    constant = 4.0
    if double:
        constant = 1 + 4 / 256
    share_of_constant = constant / 64
    bytes_per_weight = 1 / 2 + share_of_constant
    weights = element_count(linears)
    total = weights * bytes_per_weight
    return round(total)


def element_count(shapes: Linears | Others) -> int:
    """Number of elements of all these weights together."""
    counts = map(prod, shapes.values())
    return sum(counts)
