"""What a worker holds while it trains."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from methods.base import Method
from runfolder.chain import Attempt
from runfolder.job import Job
from trainer.data.batches import Batches
from trainer.data.encode import Reading
from trainer.data.examples import Examples
from trainer.data.tokens import Tokens
from trainer.objectives.base import Objective
from trainer.stop import StopRequests
from trainer.world import World
from trainer.zero.sharded import ShardedModel


@dataclass(frozen=True)
class Run:
    """A job, its data, and the model under its engine."""

    job: Job
    attempt: Attempt
    world: World
    stops: StopRequests
    method: Method[Any]
    tokenizer: Any
    reading: Reading
    objective: Objective
    examples: Examples
    batches: Batches
    sharded: ShardedModel
    dtype: torch.dtype
    schedule: Callable[[int], float]  # the learning rate of a step, from 0

    @property
    def model(self) -> Any:
        """The model under DeepSpeed's engine, of transformers or PEFT: nn.Module has no types for what these add."""
        return self.sharded.engine.module

    @property
    def tokens(self) -> Tokens:
        """The documents of the training data."""
        return self.examples.tokens

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids of the tokens that end an answer."""
        return self.reading.ends

    @property
    def generation(self) -> dict[str, Any]:
        """What the base's generation config says, as plain data; empty for a model that has none."""
        config = getattr(self.model, "generation_config", None)
        if config is None:
            return {}
        return dict(config.to_diff_dict())
