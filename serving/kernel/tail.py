"""Copying the A of narrow adapters behind the base's weights, where one dense product computes both.

Shapes: N inputs of a step.
"""

import triton
import triton.language as tl

from serving.kernel.entry import RANK, RANKS, TAIL, A, piece


@triton.jit
def tail_kernel(
    weight,
    slot,
    table,
    arena,
    out,
    inputs,
    layer_stride,
    slot_stride,
    table_layer,
    columns,
    sections,
    N: tl.constexpr,
):
    """Rows of one adapter, section and layer; those beyond its rank there are zero."""
    mine, layer = tl.program_id(0), tl.program_id(1)
    chosen = tl.load(slot + mine // sections)
    entry = table + chosen * slot_stride + layer * table_layer + (mine % sections) * columns
    rank, rows, first = tl.load(entry + RANK), tl.load(entry + RANKS), tl.load(entry + TAIL)
    source = piece(arena, entry, A)
    target = weight + layer.to(tl.int64) * layer_stride + (out + first).to(tl.int64) * inputs
    n = tl.arange(0, N)
    for row in range(rows):
        for start in range(0, inputs, N):
            at = row * inputs + start + n
            a_N = tl.load(source + at, mask=(row < rank) & (start + n < inputs), other=0.0)
            tl.store(target + at, a_N, mask=start + n < inputs)
