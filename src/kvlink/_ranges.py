"""The unit of work: one NumPy array whose dtype is the ABI's own ``kvl_range`` struct."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .errors import RangeError

RANGE: np.dtype[np.void] = np.dtype(
    [("mem", "<u4"), ("rmem", "<u4"), ("local_offset", "<u8"), ("remote_offset", "<u8"), ("length", "<u8")]
)
"""One range: local memory [local_offset, +length) with the peer's [remote_offset, +length).

``mem`` is :attr:`Region.handle`, ``rmem`` :attr:`RemoteRegion.handle`; offsets and length are bytes.
"""

_COLUMNS = ("local_offset", "remote_offset", "length")


class HasHandle(Protocol):
    """A region or a remote region."""

    @property
    def handle(self) -> int:
        """The integer that stands for it in :data:`RANGE`."""


def _handle(region: HasHandle | int, what: str) -> int:
    handle = region if isinstance(region, (int, np.integer)) else getattr(region, "handle", None)
    if isinstance(handle, bool) or not isinstance(handle, (int, np.integer)):
        raise RangeError(f"{what} is {type(region).__name__}; expected a region or its integer handle")
    if not 0 <= handle < 2**32:
        raise RangeError(f"{what} handle {handle} is outside 0..2**32-1")
    return int(handle)


def ranges(local: HasHandle | int, remote: HasHandle | int, blocks: npt.ArrayLike) -> npt.NDArray[np.void]:
    """Builds the ranges between one local and one remote region.

    Arrays for several region pairs are joined with ``numpy.concatenate``. Bounds are checked when they are used.

    Args:
        local: The local region, or its handle.
        remote: The peer's region, or its handle.
        blocks: Integers of shape (n, 3): local offset, remote offset and length of each block, in bytes.

    Returns:
        An array of n ranges, dtype :data:`RANGE`.

    Raises:
        RangeError: Wrong shape or dtype, or a negative value, which is named by row and column.
    """
    mem, rmem = _handle(local, "local"), _handle(remote, "remote")
    table = np.asarray(blocks)
    if table.size == 0 and (table.ndim == 1 or (table.ndim == 2 and table.shape[1] == 3)):
        return np.empty(0, dtype=RANGE)
    if table.ndim != 2 or table.shape[1] != 3:
        raise RangeError(f"blocks has shape {table.shape}; expected (n, 3): local offset, remote offset, length")
    if table.dtype.kind not in "iu":
        raise RangeError(f"blocks has dtype {table.dtype}; expected int64 (bytes)")
    if table.dtype.kind == "i" and int(table.min()) < 0:
        row, column = (int(index) for index in np.argwhere(table < 0)[0])
        raise RangeError(f"blocks[{row}]: {_COLUMNS[column]} is {int(table[row, column])}; it may not be negative")
    out = np.empty(len(table), dtype=RANGE)
    out["mem"] = mem
    out["rmem"] = rmem
    for index, column_name in enumerate(_COLUMNS):
        out[column_name] = table[:, index]
    return out


def check_ranges(array: Any) -> None:
    """Says why an array cannot be submitted; the caller has seen that something is wrong with it.

    Raises:
        RangeError: Always, when the array is not a C-contiguous one-dimensional array of :data:`RANGE`.
    """
    expected = "expected a one-dimensional C-contiguous array of kvlink.RANGE, as kvlink.ranges() builds it"
    if not isinstance(array, np.ndarray):
        raise RangeError(f"ranges is {type(array).__name__}; {expected}")
    if array.dtype != RANGE:
        raise RangeError(f"ranges has dtype {array.dtype}; the dtype must be {RANGE}; {expected}")
    if array.ndim != 1:
        raise RangeError(f"ranges has shape {array.shape}; {expected}")
    if not array.flags.c_contiguous:
        raise RangeError(f"ranges is a strided view; {expected}: pass numpy.ascontiguousarray(ranges)")


def refuse_unwritable(array: npt.NDArray[np.void], handles: Collection[int]) -> None:
    """Refuses a get into memory that this process may not write.

    Raises:
        RangeError: A range does so; names the first.
    """
    bad = np.isin(array["mem"], list(handles))
    if bad.any():
        raise RangeError(
            f"range {int(bad.argmax())}: a get would write into a region of read-only memory", operation="get"
        )
