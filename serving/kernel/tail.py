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
    mine = tl.program_id(0)
    layer = tl.program_id(1)
    chosen = tl.load(slot + mine // sections)
    section = mine % sections
    entry = table + chosen * slot_stride + layer * table_layer + section * columns
    rank = tl.load(entry + RANK)
    rows = tl.load(entry + RANKS)
    first = tl.load(entry + TAIL)
    source = piece(arena, entry, A)
    target_row = (out + first).to(tl.int64)
    target = weight + layer.to(tl.int64) * layer_stride + target_row * inputs
    n = tl.arange(0, N)
    for row in range(rows):
        for start in range(0, inputs, N):
            in_N = start + n < inputs
            at = row * inputs + start + n
            a_N = tl.load(source + at, mask=(row < rank) & in_N, other=0.0)
            tl.store(target + at, a_N, mask=in_N)
