"""How a run is optimised, what its workers share, and when it is saved and judged; plain data, as all of a job."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from runfolder.resources import Section


class Train(Section):
    """How it is optimised: for how long, in steps of which size, and at which learning rate."""

    steps: int | None = Field(None, ge=1, description="steps of the optimizer; null: as many as epochs needs")
    epochs: float | None = Field(
        None, gt=0, description="passes over the examples, instead of steps; 0.5 is half of them"
    )
    batch_tokens: int = Field(
        16384, ge=1, description="tokens of the global batch, which all workers share; at least data.seq_len"
    )
    micro_batch: int = Field(1, ge=1, description="sequences of seq_len per forward pass and worker")
    lr: float | None = Field(
        None, gt=0, description="peak learning rate; null: the default of method and objective, at the base's width"
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="how lr goes after the warm-up: down to zero by the last step, or not at all"
    )
    warmup: float = Field(0.03, ge=0, le=1, description="share of the steps in which lr rises linearly to its peak")
    weight_decay: float = Field(
        0.0, ge=0, description="AdamW's decoupled decay: a step takes lr times it off a weight"
    )
    betas: tuple[float, float] = Field(
        (0.9, 0.999), description="AdamW's decay rates of the first and of the second moment"
    )
    eps: float = Field(1e-8, gt=0, description="what AdamW adds to the root of the second moment")
    clip: float | None = Field(1.0, gt=0, description="largest global gradient norm; null: nothing is clipped")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of the forward pass; auto: bf16 on a GPU, else fp32"
    )
    master_weights: bool = Field(
        True,
        description="trained weights are fp32; false: bf16 alone, which each step rounds at random (method full)",
    )
    kernels: Literal["auto", "fast", "plain"] = Field(
        "auto",
        description="fast: fused losses, attention without padding, compiled layers; plain: none of these; "
        "auto: fast on a GPU, but for a whole model at sharding.zero 3; else plain",
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, more time"
    )
    calibrate: bool | None = Field(
        None,
        description="try the longest passes before the first step, for their memory; null: on a GPU",
    )
    seed: int = Field(0, ge=0, description="what new weights, the order of examples and all else random come from")

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> "Train":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        return self


class Sharding(Section):
    """What the workers share among each other. World size = data parallel x sequence parallel."""

    zero: Literal[0, 1, 2, 3] = Field(
        0, description="ZeRO stage; 1: workers share the optimizer's state; 2: gradients too; 3: weights too"
    )
    offload: Literal["none", "optimizer"] = Field(
        "none", description="what leaves the device's memory between uses; optimizer: AdamW's moments, to the host's"
    )
    sequence: Literal[1, 2, 4, 8] = Field(
        1, description="workers that share the positions of each row, for rows too long for one; 1: each has its own"
    )

    @property
    def offloads(self) -> bool:
        """Whether AdamW's moments are in the host's memory."""
        return self.offload == "optimizer"


FROZEN_TO_ONE_WHOLE = 8  # weights that ZeRO 3 must share for each one that every worker has whole


def may_be_whole(few: int, shared: int) -> bool:
    """Whether at ZeRO 3 every worker may have so many trained weights whole, beside so many that are shared."""
    return 0 < few * FROZEN_TO_ONE_WHOLE <= shared


class Checkpoint(Section):
    """How often a run saves what it can go on from, and how much of that it keeps."""

    every: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description="steps between two checkpoints; auto: so seldom that saving costs little, by measured time",
    )
    keep: int = Field(2, ge=1, description="newest checkpoints that are kept, over all attempts")


class Evaluation(Section):
    """When and how the rows of `data.eval` are judged: every so many steps, and always at the end."""

    every: int | None = Field(None, ge=1, description="steps; null: at the end only")
    rows: int | None = Field(None, ge=1, description="how many of them, from the first; null: all")
    before: bool = Field(True, description="also judge the untuned base, before the first step")
    max_new_tokens: int = Field(
        256, ge=0, description="longest answer that is generated, for exact match; 0: loss only, no generation"
    )
    keep: Literal["last", "best"] = Field(
        "last",
        description="what the output has: the weights after the last step, or those of the lowest held-out loss",
    )
    stop_after: int | None = Field(
        None, ge=1, description="evaluations without a lower held-out loss after which training ends; null: never"
    )
    test: float = Field(
        0.0, ge=0, lt=1, description="share of the rows, the last ones, that are judged apart, after the last step"
    )
    cool_down: float = Field(0.0, ge=0, le=1, description="share of the steps so far that cool a pausing run down")

    @property
    def goes_by_loss(self) -> bool:
        """Whether what comes of training depends on the held-out loss."""
        can_stop_early = self.stop_after is not None
        return can_stop_early or self.keep == "best"
