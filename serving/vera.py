"""VeRA's files. Shapes: R rank, I inputs, O outputs."""

from torch import Tensor

from serving.adapter import Adapter, Part
from serving.base import FrozenBase
from serving.folder import Folder
from serving.target import AdaptedLinear, targets


class Projections:
    """A and B that all modules share, sliced to the sizes of layers, each slice once so that it is packed once."""

    def __init__(self, folder: Folder, rank: int, adapted: list[AdaptedLinear]) -> None:
        """Take the projections of a folder, which are as large as the largest layer needs."""
        inputs = 0
        outputs = 0
        for target in adapted:
            inputs = max(inputs, target.inputs)
            outputs = max(outputs, target.outputs)
        self._a_RI = folder.take("base_model.vera_A", rank, inputs)
        self._b_OR = folder.take("base_model.vera_B", outputs, rank)
        self._a_slices: dict[int, Tensor] = {}
        self._b_slices: dict[int, Tensor] = {}

    def a_of(self, inputs: int) -> Tensor:
        """A [R, I] for a layer of so many inputs."""
        slices = self._a_slices
        if inputs not in slices:
            slice_RI = self._a_RI[:, :inputs]
            slices[inputs] = slice_RI.contiguous()
        return slices[inputs]

    def b_of(self, outputs: int) -> Tensor:
        """B transposed [R, O], for a layer of so many outputs."""
        slices = self._b_slices
        if outputs not in slices:
            slice_OR = self._b_OR[:outputs]
            slices[outputs] = slice_OR.T.contiguous()
        return slices[outputs]


def read_vera(folder: Folder, base: FrozenBase) -> Adapter:
    """VeRA: diag(b) B diag(d) A, with A and B sliced from projections that all modules share."""
    folder.only("bias", "d_initial", "init_weights", "projection_prng_key", "r", "save_projection")
    config = folder.config
    rank = config["r"]
    found = targets(folder, base, "vera_lambda_d")
    adapted = list(found)
    projections = Projections(folder, rank, adapted)
    parts = {}
    for target in adapted:
        name = target.name
        c_R = folder.take(f"{name}.vera_lambda_d", rank)
        v_O = folder.take(f"{name}.vera_lambda_b", target.outputs)
        a_RI = projections.a_of(target.inputs)
        b_RO = projections.b_of(target.outputs)
        part = Part(a_RI, b_RO, c_R=c_R, v_O=v_O)
        parts[target.place] = part
    return Adapter(folder.digest, parts)
