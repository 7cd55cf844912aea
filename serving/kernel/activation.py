"""Activations of bottlenecks, and of the base's gates."""

import triton
import triton.language as tl
from triton.language import constexpr


@triton.jit
def activated(x, code):
    """none, relu, gelu or silu, by number."""
    is_relu = code == 1
    is_gelu = code == 2
    is_silu = code == 3
    relu = tl.maximum(x, 0.0)
    scaled = x * 0.7071067811865476
    error = tl.erf(scaled)
    gelu = 0.5 * x * (1.0 + error)
    power = tl.exp(-x)
    silu = x / (1.0 + power)
    x = tl.where(is_relu, relu, x)
    x = tl.where(is_gelu, gelu, x)
    return tl.where(is_silu, silu, x)


@triton.jit
def gate_function(x, GELU: constexpr):
    """GELU by its approximation with tanh, or SiLU."""
    if GELU:
        square = x * x
        cube = 0.044715 * square * x
        z = 0.7978845608028654 * (x + cube)
        power = tl.exp(-2.0 * z)
    else:
        power = tl.exp(-x)
    return x / (1.0 + power)
