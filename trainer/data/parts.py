"""The part of a micro-batch's positions that one of several ranks computes which share its rows.

All of it is a pure function. Shapes: B rows, T positions, P of them on a rank, N labels, n of them on a rank, K
positions whose logits are kept.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.data.examples import Indices
from trainer.data.layout import IGNORED

ArraysByName = Mapping[str, npt.NDArray[Any]]
_POSITIONS = "position_ids"


def part_of_rows(
    arrays: ArraysByName,
    index: int,
    count: int,
) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a micro-batch for the rank of `index` among `count`, which divides T.

    It gets P of the T `input_ids` and `position_ids`, of which `whole_position_ids` has all, and the labels that its
    logits are before. `slot` [N] says where each label of the whole rows is among its own, and n where it is not.
    What else there is of rows, documents and labels stays whole.
    """
    completed = dict(arrays)
    for name in arrays:
        if name.endswith(_POSITIONS):
            prefix = name.removesuffix(_POSITIONS)
            part = _part(arrays, prefix, index, count)
            for own_name, array in part.items():
                completed[prefix + own_name] = np.ascontiguousarray(array)
    return completed


def _part(
    arrays: ArraysByName,
    prefix: str,
    index: int,
    count: int,
) -> dict[str, npt.NDArray[Any]]:
    """A rank's part of those arrays whose names have a prefix."""
    position_BT = arrays[prefix + _POSITIONS]
    length = position_BT.shape[1] // count
    start = index * length
    stop = start + length
    ids_BT = arrays[prefix + "input_ids"]
    kept_K = arrays[prefix + "kept"]
    column_N = arrays[prefix + "column"]
    place_N = kept_K[column_N]
    is_behind_start_N = place_N >= start
    is_before_stop_N = place_N < stop
    is_own_N = is_behind_start_N & is_before_stop_N
    row_N = arrays[prefix + "row"]
    row_n = row_N[is_own_N]
    place_n = place_N[is_own_N]
    place_n = place_n - start
    part = {}
    label_N = arrays.get(prefix + "label")
    if label_N is not None:
        label_n = label_N[is_own_N]
        part["label"] = _or_stand_in(label_n, IGNORED)
    row_n = _or_stand_in(row_n, 0)
    place_n = _or_stand_in(place_n, 0)
    own_K, column_n = np.unique(place_n, return_inverse=True)
    part["input_ids"] = ids_BT[:, start:stop]
    part["position_ids"] = position_BT[:, start:stop]
    part["whole_position_ids"] = position_BT
    part["kept"] = own_K
    part["row"] = row_n
    part["column"] = column_n
    part["slot"] = _slots(is_own_N, len(row_n))
    return part


def _or_stand_in(values_n: Indices, stand_in: int) -> Indices:
    """Values of labels, or of one that stands in where a rank has none."""
    if len(values_n):
        return values_n
    return np.array([stand_in], np.int64)


def _slots(is_own_N: npt.NDArray[np.bool_], behind: int) -> Indices:
    """The place of each label among a rank's own; `behind` where it is not one of them."""
    count = len(is_own_N)
    slots_N = np.full(count, behind, np.int64)
    own = int(is_own_N.sum())
    slots_N[is_own_N] = np.arange(own)
    return slots_N
