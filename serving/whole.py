"""A whole model of the base's shape, as full training, GaLore and ReLoRA leave it, as its difference to the base.

The difference of each linear layer is kept as two factors: those of its largest singular values, as many as KEPT_RANK
(truncated SVD, the best approximation of that rank; Eckart and Young 1936). What that leaves out is said. All else
is kept exactly: biases, norms, embedding and head. A weight that is as in the base costs nothing.
Shapes: R rank, I inputs, O outputs, V vocabulary, D width, L layers.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from serving.adapter import Adapter, Part, Place
from serving.base import FrozenBase
from serving.error import AdapterRefused
from serving.folder import FILES, as_product, fits, is_finite
from serving.lora import changed_config, norm_module
from serving.target import module_name

KEPT_RANK = 128  # an eighth of a layer of width 2048
EXACT = 1024  # inputs or outputs up to which all singular values are computed
MORE_COLUMNS = 16  # than are kept, for a range that is found at random (Halko, Martinsson and Tropp 2011)
ROUNDS = 4
LEAST = 1e-6  # of the largest singular value: what is smaller is rounding


class WholeModel:
    """The files of a model; what is taken from them must be all there is."""

    def __init__(self, path: Path, limit: int) -> None:
        """Open a folder; raises AdapterRefused for files that are broken or have over `limit` bytes."""
        self.path = path
        files = model_files(path)
        size = 0
        for file in files:
            status = file.stat()
            size += status.st_size
        if size > limit:
            raise AdapterRefused(f"{path}: found {size} bytes; allowed: at most {limit}")
        self._files: dict[str, Any] = {}  # by the name of a tensor
        for file in files:
            try:
                opened: Any = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise AdapterRefused(f"{file}: found a broken or truncated file: {error}") from error
            for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                self._files[name] = opened
        self._left = set(self._files)

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._files

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor as it is stored; raises AdapterRefused for another shape, and for numbers that are not finite."""
        if name not in self._files:
            raise AdapterRefused(f"{self.path}: found no tensor {name}, which a model of this base's shape has")
        tensor: Tensor = self._files[name].get_tensor(name)
        if not fits(tensor.shape, shape):
            found = as_product(tensor.shape)
            allowed = as_product(shape)
            raise AdapterRefused(f"{self.path}: found {name} of shape {found}; allowed on this base: {allowed}")
        if not is_finite(tensor):
            raise AdapterRefused(f"{self.path}: found values in {name} that are not finite")
        self._left.discard(name)
        return tensor

    def finish(self) -> None:
        """Raise AdapterRefused where tensors are left that nobody has taken."""
        if self._left:
            name = min(self._left)
            raise AdapterRefused(f"{self.path}: found {name}, which has no place on this base")


@dataclass
class Difference:
    """How much differs from the base, and how much of that is left out: squares of Frobenius norms."""

    whole: float = 0.0
    left_out: float = 0.0

    def add(self, change_OI: Tensor, kept_OI: Tensor) -> None:
        """Count the change of a layer, of which this much is kept."""
        left_OI = change_OI - kept_OI
        change = change_OI.square().sum()
        left = left_OI.square().sum()
        self.whole += float(change)
        self.left_out += float(left)

    @property
    def share(self) -> float:
        """The share of the difference that is left out."""
        if self.whole == 0:
            return 0.0
        square = self.left_out / self.whole
        return float(square**0.5)


def is_whole_model(path: Path) -> bool:
    """Whether a folder holds a model, and no adapter."""
    for name in FILES:
        config = path / name
        if config.is_file():
            return False
    config = path / "config.json"
    return config.is_file() and bool(model_files(path))


def model_files(path: Path) -> list[Path]:
    """The files of a model's weights."""
    return sorted(path.glob("*.safetensors"))


def whole_digest(path: Path) -> str:
    """The digest that a model is known by as an adapter: of its weights and config, and of the rank that is kept."""
    rank = str(KEPT_RANK)
    digest = hashlib.sha256(rank.encode())
    config = path / "config.json"
    for file in (config, *model_files(path)):
        with file.open("rb") as stream:
            of_file = hashlib.file_digest(stream, "sha256")
        digest.update(of_file.digest())
    return digest.hexdigest()


def read_whole(path: Path, base: FrozenBase, limit: int) -> Adapter:
    """The adapter that a model is to a base of its shape; raises AdapterRefused for a model of another one."""
    config_path = path / "config.json"
    text = config_path.read_text()
    config = json.loads(text)
    if config.get("quantization_config"):
        raise AdapterRefused(f"{path}: found quantised weights; allowed: weights in 16 or 32 bits")
    model = WholeModel(path, limit)
    difference = Difference()
    parts = linear_parts(model, base, difference)
    parts |= norm_parts(model, base)
    shape = base.shape
    embed_VD = model.take("model.embed_tokens.weight", shape.vocabulary, shape.width)
    head_VD = embed_VD
    if model.has("lm_head.weight"):
        head_VD = model.take("lm_head.weight", shape.vocabulary, shape.width)
    model.finish()
    return Adapter(
        whole_digest(path),
        parts,
        embed_VD=changed(embed_VD, base.embed_VD),
        head_VD=changed(head_VD, base.head_VD),
        config=changed_config(path, base),
        left_out=difference.share,
    )


def changed(weight: Tensor, of_base: Tensor) -> Tensor | None:
    """A weight in fp32; None where it is that of the base."""
    rounded = weight.to(of_base)  # its type and device
    if torch.equal(rounded, of_base):
        return None
    return rounded.float().cpu()


@torch.inference_mode()
def linear_parts(model: WholeModel, base: FrozenBase, difference: Difference) -> dict[Place, Part]:
    """What is added to each linear layer that differs; what of it is left out is added up in `difference`."""
    parts = {}
    for layer, linear_layer in base.linears():
        name = module_name(layer, linear_layer)
        place = (layer, linear_layer.name)
        weight_OI = base.weight(*place)
        taken_OI = model.take(f"{name}.weight", *weight_OI.shape)
        rounded_OI = taken_OI.to(weight_OI)  # as the base is: its rounding is no difference
        change_OI = rounded_OI.float() - weight_OI.float()
        beta_O = changed_bias(model, base, place, f"{name}.bias")
        if change_OI.any():
            a_RI, b_RO = factors_of(change_OI, difference)
            parts[place] = Part(a_RI, b_RO, beta_O=beta_O)
        elif beta_O is not None:
            parts[place] = Part(beta_O=beta_O)
    return parts


def changed_bias(model: WholeModel, base: FrozenBase, place: Place, name: str) -> Tensor | None:
    """What is added to the bias of a linear layer; None where nothing is."""
    bias_O = base.bias(*place)
    if bias_O is None or not model.has(name):  # a layer may have none in a group that has some
        return None
    taken_O = model.take(name, len(bias_O))
    rounded_O = taken_O.to(bias_O)
    change_O = rounded_O.float() - bias_O.float()
    if change_O.any():
        return change_O.cpu()
    return None


def factors_of(change_OI: Tensor, difference: Difference) -> tuple[Tensor, Tensor]:
    """A [R, I] and B [R, O] on the host, whose product is the best approximation of a change at KEPT_RANK."""
    u_OR, s_R, v_IR = largest_singular(change_OI)
    least = LEAST * s_R[0]
    is_more = s_R > least
    count = int(is_more.sum())
    count = min(count, KEPT_RANK)
    root_R = s_R[:count].sqrt()
    a_IR = v_IR[:, :count] * root_R
    b_OR = u_OR[:, :count] * root_R
    kept_OI = b_OR @ a_IR.T
    difference.add(change_OI, kept_OI)
    a_RI = a_IR.T.cpu()
    b_RO = b_OR.T.cpu()
    return a_RI.contiguous(), b_RO.contiguous()


def largest_singular(change_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values of a matrix, with their vectors; of a large one from a range drawn at random."""
    if min(change_OI.shape) <= EXACT:
        u_OR, s_R, v_RI = torch.linalg.svd(change_OI, full_matrices=False)
        return u_OR, s_R, v_RI.T
    devices = [change_OI.device] if change_OI.is_cuda else []
    columns = KEPT_RANK + MORE_COLUMNS
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)  # the same model is the same adapter
        u_OR, s_R, v_IR = torch.svd_lowrank(change_OI, columns, ROUNDS)
    return u_OR, s_R, v_IR


def norm_parts(model: WholeModel, base: FrozenBase) -> dict[Place, Part]:
    """The weights of the norms that differ, the offset that the base has included; the last norm is in layer 0."""
    offset = base.shape.norm_offset
    parts = {}
    for name, weight_LD in base.norms.items():
        for layer, weight_D in enumerate(weight_LD):
            module = norm_module(layer, name)
            taken_D = model.take(f"{module}.weight", len(weight_D))
            rounded_D = taken_D.to(base.dtype)
            m_D = rounded_D.float() + offset
            if not torch.equal(m_D, weight_D.cpu()):
                parts[layer, name] = Part(m_O=m_D)
    return parts
