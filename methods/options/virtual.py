"""Methods with virtual tokens in front of every document."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from methods.options.base import (
    WEIGHTS_EXPONENT,
    BaseConfig,
    Count,
    Options,
    known_positions,
    plain_attention,
    window,
)
from methods.parts.targets import Linears, Others, choose_targets, outputs


class _Virtual(Options):
    """What methods with virtual tokens share: their number, and the text that they start from."""

    on_4_bits: ClassVar[bool] = True
    refusals: ClassVar[Mapping[str, str]] = {
        "merge": "virtual tokens are inputs, which no weight of the base can stand for; nearest: lora",
        "reference": "it starts from virtual tokens that are trained and not kept; nearest: lora",
    }

    tokens: Count = Field(20, description="number of virtual tokens in front of every document")
    init_text: str | None = Field(
        "Answer the following question.",
        min_length=1,
        description="text that they start from, repeated or cut to their number; null: random",
    )


class Prefix(_Virtual):
    """Trained keys and values in front of every layer's own."""

    kind: Literal["prefix"] = "prefix"
    implementation: ClassVar[str] = "methods.prefix:PrefixTuning"
    default_lr: ClassVar[float] = 5e-3
    width_exponent: ClassVar[float] = WEIGHTS_EXPONENT
    when_to_take: ClassVar[str] = (
        "Take it where many tasks share one base and must be switched at no cost: the adapter is a part of the "
        "cache, and no weight changes. Start it from a text, and give it a rate far above LoRA's. It is slow to "
        "learn what the base cannot do yet (19 to 42 % on GSM8K where LoRA had 47 to 49 %, in PEFT's "
        "method_comparison): then take LoRA."
    )

    @property
    def positions_before(self) -> int:
        """The positions of the prefix, which is no input."""
        return self.tokens

    def check(self, config: BaseConfig, seq_len: int) -> None:
        """A document's positions begin behind the prefix, and its last token must see all of it."""
        plain_attention(config, self.kind, "prompt")
        known = known_positions(config)
        self._check_limit(known, seq_len)
        visible = window(config)
        self._check_limit(visible, seq_len)

    def added_parameters(self, linears: Linears, others: Others) -> int:  # noqa: ARG002
        """A key and a value per layer and virtual token."""
        names = ("k_proj", "v_proj")
        projections = choose_targets(names, (), linears, {})
        return self.tokens * outputs(projections)

    def _check_limit(self, visible: int | None, seq_len: int) -> None:
        """Raise ValueError where a prefix and a sequence are longer than what a base sees; None: it sees all."""
        if visible is None:
            return
        space = visible - self.tokens
        if space < 1:
            raise ValueError(
                f"method.tokens: found {self.tokens}; allowed: fewer than the {visible} that the base sees"
            )
        if seq_len > space:
            raise ValueError(f"data.seq_len: found {seq_len}; allowed beside the prefix: at most {space}")


class EmbeddedOptions(_Virtual):
    """What methods share whose virtual tokens are inputs."""

    @property
    def virtual_tokens(self) -> int:
        """Their number: they are inputs, with places of their own."""
        return self.tokens


class Prompt(EmbeddedOptions):
    """Trained embeddings in front of every document."""

    kind: Literal["prompt"] = "prompt"
    implementation: ClassVar[str] = "methods.prompt:PromptTuning"
    default_lr: ClassVar[float] = 3e-2
    when_to_take: ClassVar[str] = (
        "Take it for the smallest adapter of all, a few vectors that any server can put in front of a prompt, on "
        "a large base: the paper sees it reach full fine-tuning from ten billion parameters on, and stay behind "
        "below. It needs many steps and a rate a hundred times LoRA's; wherever LoRA can be served, LoRA learns "
        "more in less time."
    )

    def added_parameters(self, linears: Linears, others: Others) -> int:  # noqa: ARG002
        """An embedding in R^D for each virtual token."""
        width = _embedding_width(others)
        return self.tokens * width


class PTuning(EmbeddedOptions):
    """Embeddings in front of every document, made by a trained network."""

    kind: Literal["ptuning"] = "ptuning"
    implementation: ClassVar[str] = "methods.ptuning:PTuningTuning"
    default_lr: ClassVar[float] = 1e-2
    when_to_take: ClassVar[str] = (
        "Take it instead of prompt tuning where that learns too slowly: the network eases training, and what is "
        "left is the same few vectors. It has more weights to train and one width more to choose. As for prompt "
        "tuning, LoRA learns more in the same number of steps wherever it can be served."
    )

    hidden: Count = Field(128, description="width of the network's two hidden layers, in features")

    def added_parameters(self, linears: Linears, others: Others) -> int:  # noqa: ARG002
        """The network's inputs, and its three layers with their biases."""
        width = _embedding_width(others)
        hidden = self.hidden
        first = (width + 1) * hidden
        second = (hidden + 1) * hidden
        third = (hidden + 1) * width
        network = first + second + third
        inputs = self.tokens * width
        return inputs + network


def _embedding_width(others: Others) -> int:
    """The base's width: that of its first embedding, as embeddings and the head are the matrices among the others."""
    matrices = (shape for shape in others.values() if len(shape) == 2)
    _, width = next(matrices)
    return width
