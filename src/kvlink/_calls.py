"""Small helpers of every call into the engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ._native import ffi
from ._status import Status, raise_status

MAX_MS = 0xFFFFFFFF
_MOST_BLOB_BYTES = 1 << 24


def new_error() -> Any:
    """Makes a clean ``kvl_error *``."""
    return ffi.new("kvl_error *", {"struct_size": ffi.sizeof("kvl_error")})


def milliseconds(seconds: float) -> int:
    """Converts a timeout; rounds up, so that a positive one never becomes "none given"."""
    if seconds >= MAX_MS / 1000:
        return MAX_MS
    return max(0, math.ceil(seconds * 1000))


def read_blob(call: Callable[[Any, Any, Any], int], operation: str, peer: str | None = None) -> bytes:
    """The two-call idiom: ask for the size, then for the bytes; a blob that grew in between is asked for again."""
    room = 512
    while True:
        buffer, length, err = ffi.new("char[]", room), ffi.new("uint64_t *", room), new_error()
        status = call(buffer, length, err)
        if status == 0:
            return bytes(ffi.buffer(buffer, length[0]))
        if status != Status.NO_RESOURCE or not room < length[0] <= _MOST_BLOB_BYTES:
            raise_status(err, operation, peer=peer, status=status)
        room = int(length[0])
