"""What a fine-tuning method is: hooks that follow the life of a step. A method overrides the few it needs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from methods.options import Options

O = TypeVar("O", bound=Options)  # noqa: E741
Tensors = dict[str, Tensor]  # by name
Keywords = dict[str, Any]  # arguments of a call
Schedule = Callable[[int], float]  # the learning rate of a step, from 0


class Gather(Protocol):
    """The weights of a model, which ZeRO 3 may have sharded: their shapes, and a way to have them whole for a while.

    Every rank must make the same calls in the same order.
    """

    def shape(self, parameter: Parameter) -> torch.Size:
        """The whole shape of a parameter, sharded or not."""
        ...

    def gathered(self, parameters: Iterable[Parameter], modified: bool = False) -> AbstractContextManager[None]:
        """Within it, the parameters are whole on every rank; where they are `modified`, rank 0's values stay."""
        ...

    def gathered_in_turn(self, model: Module) -> AbstractContextManager[None]:
        """Within it, a model runs before it has an engine: a module's own weights are whole in its forward pass."""
        ...


class Unsharded:
    """The Gather of a model whose weights are whole."""

    def shape(self, parameter: Parameter) -> torch.Size:
        """The parameter's own shape, which is the whole one."""
        return parameter.shape

    def gathered(
        self,
        parameters: Iterable[Parameter],  # noqa: ARG002
        modified: bool = False,  # noqa: ARG002
    ) -> AbstractContextManager[None]:
        """Nothing happens, as the parameters are whole already."""
        return nullcontext()

    def gathered_in_turn(self, model: Module) -> AbstractContextManager[None]:  # noqa: ARG002
        """Nothing happens, as the model runs as it is."""
        return nullcontext()


UNSHARDED = Unsharded()


@dataclass(frozen=True)
class Setup:
    """What a method knows of its run: steps, seed, tokens of a row, tokenizer, and how weights are gathered."""

    steps: int = 1
    seed: int = 0
    seq_len: int = 1024
    tokenizer: Any = None  # the base's
    gather: Gather = UNSHARDED
    master_weights: bool = True  # trained weights are fp32; else bf16, with gradients in fp32


@dataclass(frozen=True)
class Piece:
    """Part [start, ...) of flattened tensors that this rank holds: 1-D, of one length, or 0-d scalars for the whole.

    `replicated` says that every rank holds all of it; else every element is on one rank.
    """

    name: str
    start: int
    tensors: Tensors
    replicated: bool


StatePieces = Sequence[Piece]


def replicated_piece(name: str, tensors: Tensors) -> Piece:
    """The piece of flattened tensors that every rank holds whole."""
    return Piece(name, 0, tensors, True)


class Fragment(Protocol):
    """The part [start, stop) of one flattened trained parameter that this rank holds."""

    @property
    def name(self) -> str:
        """The name of the parameter in the model."""
        ...

    @property
    def start(self) -> int:
        """The first element that this rank holds."""
        ...

    @property
    def stop(self) -> int:
        """The element behind the last that this rank holds."""
        ...

    @property
    def parameter(self) -> Parameter:
        """The master, 1-D, fp32 as a rule; in a step its `grad` is the sum over ranks and micro-batches."""
        ...


Fragments = Mapping[str, Fragment]  # by the name of their parameter


def gradient(fragment: Fragment) -> Tensor:
    """The gradient of a fragment that has one; raises ValueError where it has none."""
    grad = fragment.parameter.grad
    if grad is None:
        raise ValueError(f"{fragment.name} has no gradient in this step")
    return grad


def master(fragment: Fragment) -> Tensor:
    """The fp32 values of what this rank holds of a parameter."""
    return fragment.parameter.data


def part_of(flat: Tensor, fragment: Fragment) -> Tensor:
    """The elements of a whole flattened parameter that a fragment holds, as a view of it."""
    elements = slice(fragment.start, fragment.stop)
    return flat[elements]


class View(Protocol):
    """Masters, gradients and optimizer state by parameter name, whatever the ZeRO stage."""

    @property
    def model(self) -> Module:
        """The model as the method's `attach` gave it."""
        ...

    @property
    def replicated(self) -> bool:
        """Whether every rank holds all of every parameter (ZeRO 0); else every element is on one rank."""
        ...

    def fragments(self) -> Sequence[Fragment]:
        """What this rank holds, in the same order of names everywhere; of some parameters perhaps nothing."""
        ...

    def state(self, fragment: Fragment) -> Keywords:
        """The optimizer's state of a fragment, to be read, changed or cleared; empty before its first step."""
        ...

    def shape(self, name: str) -> torch.Size:
        """The whole shape of a trained parameter."""
        ...

    def whole(self, name: str, part: Callable[[Fragment], Tensor]) -> Tensor:
        """The parts that all ranks have of a trained parameter, together in its shape on every rank; a collective."""
        ...


class MergeRefused(RuntimeError):
    """A merged model would not be the one that was trained."""


class ReferenceRefused(RuntimeError):
    """The policy before the first step is not there any more."""


class Method(Generic[O]):
    """A fine-tuning method with its options; its hooks are called in the order in which they stand here."""

    # What the last merge found, by module: how much it changed beside the update, over the update.
    merge_report: Mapping[str, float] = MappingProxyType({})

    new_tokens = range(0)  # ids that the base had no embedding for; it has one before `attach`, to be trained

    config_is_fixed = False  # of what `export` writes, nothing but the weights changes while a model trains

    reduces = False  # at ZeRO 0 `gradients` finds each rank's own share, and sums over ranks what it wants

    def __init__(self, options: O, setup: Setup) -> None:
        self.options = options
        self.setup = setup

    def load_options(self, config: Any) -> Keywords:  # noqa: ARG002
        """Keyword arguments for `from_pretrained`; may change the base's config, which is one of them."""
        return {}

    def attach(self, model: Module) -> Module:
        """Prepare the base for training: freeze, add adapters. The trained parameters end as fp32."""
        raise NotImplementedError

    def initialise(self, model: Module, examples: Iterable[Tensor]) -> None:
        """Set a start that depends on data, once per run; every rank gets the same examples, token ids [1, T]."""

    def speed_up(self, model: Module, undo: ExitStack, sharded: bool = False) -> None:
        """On the fast path: have the method's modules compute the same in less time, and `undo` what takes it back.

        Where weights are `sharded` (ZeRO 3), those of a decoder layer are whole within its passes alone. What a
        module then does must be free of what `torch.compile` cannot trace.
        """

    def changed_frozen(self, model: Module) -> list[str]:  # noqa: ARG002
        """Names of frozen parameters that training changes all the same; checkpoints hold them too."""
        return []

    def optimizer(self, view: View, lr: float, **adam: Any) -> torch.optim.Optimizer:
        """The optimizer of the view's fragments, whose state the view has from then on; AdamW unless overridden.

        A group's learning rate is the step's, times the group's `lr_ratio` if it has one. A rank may hold nothing.
        """
        fragments = view.fragments()
        parameters = [fragment.parameter for fragment in fragments]
        group = {"params": parameters}
        return torch.optim.AdamW([group], lr=lr, **adam)

    def pieces(self) -> StatePieces:
        """State of the method's own that checkpoints hold and loading writes into, in whatever layout it is."""
        return []

    def schedule(self, base: Schedule) -> Schedule:
        """The learning rate of each step, from the job's."""
        return base

    def penalty(self, view: View) -> None:
        """Add the gradient of a term of the method's own to the gradients, once per step."""

    def gradients(self, view: View) -> list[Tensor]:
        """The gradients whose norm is reported and which clipping scales: the trained weights' own."""
        grads = []
        for fragment in view.fragments():
            grad = fragment.parameter.grad
            if grad is not None:
                grads.append(grad)
        return grads

    def before_step(self, view: View) -> None:
        """Called between clipping and the optimizer's step; nothing unless overridden."""

    def after_step(self, view: View) -> None:
        """Called after the optimizer's step; what it writes into masters is what training goes on with."""

    def state(self) -> Tensors:
        """What a checkpoint must hold beside weights, optimizer state and pieces; equal on every rank."""
        return {}

    def load_state(self, state: Tensors) -> None:
        """Take back what `state` gave; called before `attach`."""

    def reference(self, model: Module) -> AbstractContextManager[None]:  # noqa: ARG002
        """Within it the model is the policy before the first step; raises ReferenceRefused where that is gone."""
        dumped = self.options.model_dump()
        kind = dumped["kind"]
        reason = self.options.refusals["reference"]
        raise ReferenceRefused(f"method {kind} has no reference: {reason}")

    def export(self, model: Module, weights: Tensors, folder: Path) -> None:
        """Write the trained weights as PEFT or transformers load them.

        `weights` holds what is trained or changed (where the output is a model: everything), whole, by name.
        """
        raise NotImplementedError

    def load(self, base: Module, folder: Path) -> Module:
        """The exported adapter on its base, as plain PEFT loads it."""
        from peft import PeftModel

        loaded: Module = PeftModel.from_pretrained(base, folder)
        return loaded

    def merge(self, model: Module) -> Module:
        """The base with the update merged into its weights, from the exported adapter as PEFT loads it.

        May raise MergeRefused, and may leave a `merge_report`.
        """
        raise NotImplementedError
