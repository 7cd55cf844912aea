"""Methods with virtual tokens in front of every document."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from methods.options.base import WEIGHTS_EXPONENT, Options, plain_attention, positions, window
from methods.parts.targets import Linears, Others, choose


class _Virtual(Options):
    on_4_bits: ClassVar[bool] = True
    refusals: ClassVar[Mapping[str, str]] = {
        "merge": "virtual tokens are inputs, which no weight of the base can stand for; nearest: lora",
        "reference": "it starts from virtual tokens that are trained and not kept; nearest: lora",
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
    implementation: ClassVar[str] = "methods.prefix:PrefixTuning"
    default_lr: ClassVar[float] = 5e-3
    width_exponent: ClassVar[float] = WEIGHTS_EXPONENT

    @property
    def positions_before(self) -> int:
        """Those of the prefix, which is no input."""
        return self.tokens

    def check(self, config: Mapping[str, Any], seq_len: int) -> None:
        """A document's positions begin behind the prefix, and its last token must see all of it."""
        plain_attention(config, self.kind, "prompt")
        for seen in (positions(config), window(config)):
            room = seq_len if seen is None else seen - self.tokens
            if room < 1:
                raise ValueError(
                    f"method.tokens: found {self.tokens}; allowed: fewer than the {seen} that the base sees"
                )
            if seq_len > room:
                raise ValueError(f"data.seq_len: found {seq_len}; allowed beside the prefix: at most {room}")

    def adds(self, linears: Linears, others: Others) -> int:  # noqa: ARG002
        """A key and a value per layer and virtual token."""
        chosen = choose(("k_proj", "v_proj"), (), linears, {})
        return self.tokens * sum(out for out, _ in chosen.values())


class EmbeddedOptions(_Virtual):
    """What methods share whose virtual tokens are inputs."""

    @property
    def virtual_tokens(self) -> int:
        """They are inputs, with places of their own."""
        return self.tokens


class Prompt(EmbeddedOptions):
    """Trained embeddings in front of every document."""

    kind: Literal["prompt"] = "prompt"
    implementation: ClassVar[str] = "methods.prompt:PromptTuning"
    default_lr: ClassVar[float] = 3e-2

    def adds(self, linears: Linears, others: Others) -> int:  # noqa: ARG002
        """An embedding per virtual token."""
        return self.tokens * _hidden(others)


class PTuning(EmbeddedOptions):
    """Embeddings in front of every document, made by a trained network."""

    kind: Literal["ptuning"] = "ptuning"
    implementation: ClassVar[str] = "methods.ptuning:PTuningTuning"
    default_lr: ClassVar[float] = 1e-2

    hidden: int = Field(128, ge=1, description="width of the network")

    def adds(self, linears: Linears, others: Others) -> int:  # noqa: ARG002
        """The network's inputs, and its three layers with their biases."""
        size, width = _hidden(others), self.hidden
        return self.tokens * size + (size + 1) * width + (width + 1) * width + (width + 1) * size


def _hidden(others: Others) -> int:
    """The base's width: that of its first embedding, as embeddings and the head are the matrices among the others."""
    return next(shape[1] for shape in others.values() if len(shape) == 2)
