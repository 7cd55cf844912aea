"""FourierFT's files. Shapes: N trained frequencies, K positions, O outputs, I inputs."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from serving.adapter import Adapter, Part
from serving.base import FrozenBase
from serving.folder import Folder
from serving.target import targets


def read_fourierft(folder: Folder, base: FrozenBase) -> Adapter:
    """FourierFT: a real sparse spectrum S is a sum of 2 N products of waves, scale S_n / (O I) each.

    Re ifft2(S)[o, i] = 1 / (O I) sum_n S_n (cos(2 pi u o / O) cos(2 pi v i / I) - sin(..) sin(..)).
    """
    folder.only("bias", "init_weights", "n_frequency", "random_loc_seed", "scaling")
    config = folder.config
    count = config["n_frequency"]
    seed = config["random_loc_seed"]
    parts = {}
    for target in targets(folder, base, "fourierft_spectrum"):
        outputs = target.outputs
        inputs = target.inputs
        spectrum_N = folder.take(f"{target.name}.fourierft_spectrum", count)
        a_RI, b_RO = waves(count, seed, outputs, inputs)
        numbers = outputs * inputs
        scale = config["scaling"] / numbers
        scaled_N = spectrum_N * scale
        c_R = scaled_N.repeat(2)
        parts[target.place] = Part(a_RI, b_RO, c_R=c_R)
    return Adapter(folder.digest, parts)


Waves = tuple[Tensor, Tensor]  # A, and B transposed


@lru_cache(maxsize=64)
def waves(count: int, seed: int, outputs: int, inputs: int) -> Waves:
    """The waves [2 N, I] and [2 N, O] of a spectrum's places, which a seed draws as PEFT draws them."""
    generator = torch.Generator()
    generator.manual_seed(seed)
    numbers = outputs * inputs
    places = torch.randperm(numbers, generator=generator)
    place_N = places[:count]
    column_N = place_N % inputs
    row_N = place_N // inputs
    v_NI = phases(column_N, inputs)
    u_NO = phases(row_N, outputs)
    cos_NI = v_NI.cos()
    sin_NI = v_NI.sin()
    cos_NO = u_NO.cos()
    sin_NO = u_NO.sin()
    a_RI = torch.cat([cos_NI, sin_NI])
    b_RO = torch.cat([cos_NO, -sin_NO])
    return a_RI.float(), b_RO.float()


def phases(frequency_N: Tensor, size: int) -> Tensor:
    """2 pi f k / size [N, K] for k below size, reduced to one turn before it is rounded."""
    k_K = torch.arange(size)
    frequency_N1 = frequency_N[:, None]
    product_NK = frequency_N1 * k_K
    turn_NK = product_NK % size
    turn_NK = turn_NK.double()
    step = 2 * math.pi / size
    return turn_NK * step
