"""Copying the A of narrow adapters behind the base's weights, where one dense product computes both.

Shapes: N inputs of a step.
"""

import triton
import triton.language as tl
from triton.language import constexpr

from serving.kernel.entry import COLUMNS, RANK, RANKS, TAIL, A, address_of, entry_offset, number_of
from serving.kernel.memory import load_masked


@triton.jit
def tail_kernel(
    weight, adapter, table, arena, outputs, inputs, sections, layer_stride, adapter_stride, table_layer, N: constexpr
):
    """Rows of one adapter, section and layer; those beyond its rank there are zero."""
    number = tl.program_id(0)
    layer = tl.program_id(1).to(tl.int64)
    section = number % sections
    order = number // sections
    adapter_entry = table + entry_offset(adapter, order, adapter_stride)
    layer_entry = adapter_entry + layer * table_layer
    entry = layer_entry + section * COLUMNS
    rank = number_of(entry, RANK)
    rows = number_of(entry, RANKS)
    first = number_of(entry, TAIL)
    source = address_of(arena, entry, A)
    first_row = outputs + first
    first_row = first_row.to(tl.int64)
    layer_weight = weight + layer * layer_stride
    target = layer_weight + first_row * inputs
    for row in range(rows):
        first_number = row * inputs
        has_row = row < rank
        source_row = source + first_number
        target_row = target + first_number
        copy_row(source_row, target_row, has_row, inputs, N)


@triton.jit
def copy_row(source, target, is_there, inputs, N: constexpr):
    """Copy a row of A, or zeros."""
    n = tl.arange(0, N)
    for start in range(0, inputs, N):
        at_N = start + n
        in_N = at_N < inputs
        mask_N = is_there & in_N
        a_N = load_masked(source + at_N, mask_N)
        tl.store(target + at_N, a_N, mask=in_N)
