"""FourierFT's files. Shapes: N trained frequencies, O outputs, I inputs."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from serving.adapter import Adapter, Part
from serving.base import Base
from serving.folder import Folder
from serving.target import targets


def read_fourierft(folder: Folder, base: Base) -> Adapter:
    """FourierFT: a real sparse spectrum S is a sum of 2 N products of waves, scale S_n / (O I) each.

    Re ifft2(S)[o, i] = 1 / (O I) sum_n S_n (cos(2 pi u o / O) cos(2 pi v i / I) - sin(..) sin(..)).
    """
    folder.only("bias", "init_weights", "n_frequency", "random_loc_seed", "scaling")
    count = folder.config["n_frequency"]
    seed = folder.config["random_loc_seed"]
    parts = {}
    for target in targets(folder, base, "fourierft_spectrum"):
        out, inputs = target.out, target.site.inputs
        spectrum_N = folder.take(f"{target.name}.fourierft_spectrum", count)
        a_RI, b_RO = waves(count, seed, out, inputs)
        scale = folder.config["scaling"] / (out * inputs)
        c_R = spectrum_N.repeat(2) * scale
        parts[target.place] = Part(a_RI, b_RO, c_R=c_R)
    return Adapter(folder.digest, parts)


@lru_cache(maxsize=64)
def waves(count: int, seed: int, out: int, inputs: int) -> tuple[Tensor, Tensor]:
    """The waves [2 N, I] and [2 N, O] of a spectrum's places, which a seed draws as PEFT draws them."""
    generator = torch.Generator()
    generator.manual_seed(seed)
    places = torch.randperm(out * inputs, generator=generator)
    places_N = places[:count]
    v_NI = phases(places_N % inputs, inputs)
    u_NO = phases(places_N // inputs, out)
    a_RI = torch.cat([v_NI.cos(), v_NI.sin()])
    b_RO = torch.cat([u_NO.cos(), -u_NO.sin()])
    return a_RI.float(), b_RO.float()


def phases(frequency_N: Tensor, size: int) -> Tensor:
    """2 pi f k / size for k below size, reduced to one turn before it is rounded."""
    k_1K = torch.arange(size)[None]
    turns_NK = frequency_N[:, None] * k_1K % size
    step = 2 * math.pi / size
    return turns_NK.double() * step
