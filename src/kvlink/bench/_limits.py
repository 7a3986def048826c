"""Typed access to libkvlink_limits.so: the machine's own limits, test patterns and their checks."""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import cffi
import numpy as np
import numpy.typing as npt

from .._native import declarations, find_header, library_path
from ..errors import ChannelUnavailableError, KvlinkError

Blocks = npt.NDArray[np.int64]
OPERATION_CODES = {"put": 0, "get": 1}
COPY_MODES = ("memcpy", "non-temporal copy", "non-temporal copy with prefetch")
LOCAL, REMOTE = 0, 1


class LimitError(KvlinkError):
    """A limit could not be measured; carries errno as ``vendor_code``."""


@dataclass(frozen=True)
class Memory:
    """Bytes of this process.

    Attributes:
        address: Of the first byte.
        nbytes: Their number.
    """

    address: int
    nbytes: int


@cache
def _library() -> tuple[Any, Any]:
    ffi = cffi.FFI()
    ffi.cdef(declarations(find_header("_native/limits.h", "src/limits/limits.h").read_text(encoding="utf-8")))
    path = library_path("limits")
    try:
        return ffi, ffi.dlopen(str(path))
    except OSError as error:
        raise ChannelUnavailableError(f"cannot load {path}: {error}", operation="load") from error


def _seconds(result: float, call: str) -> float:
    if result < 0:
        code = int(-result)
        raise LimitError(os.strerror(code), operation="bench", site=call, vendor_code=code)
    return result


def _table(blocks: Blocks) -> tuple[Any, int]:
    ffi, _ = _library()
    if blocks.dtype != np.int64 or not blocks.flags.c_contiguous:
        raise LimitError(f"blocks has dtype {blocks.dtype}; expected contiguous int64", operation="bench")
    return ffi.cast("int64_t *", blocks.ctypes.data), len(blocks)


def _pointer(memory: Memory) -> Any:
    return _library()[0].cast("char *", memory.address)


def copy(local: Memory, remote: Memory, blocks: Blocks, op: str, mode: int) -> float | None:
    """Copies the blocks inside this process with one thread.

    Args:
        local: What the local offsets refer to.
        remote: What the remote offsets refer to.
        blocks: Array (n, 3) of local offset, remote offset, length.
        op: "put" or "get".
        mode: Index of :data:`COPY_MODES`.

    Returns:
        Seconds, or None when this processor lacks the mode.

    Raises:
        LimitError: The copy failed.
    """
    table, count = _table(blocks)
    result = _library()[1].kvm_copy(_pointer(local), _pointer(remote), table, count, OPERATION_CODES[op], mode)
    return None if result == -errno.ENOTSUP else _seconds(result, "copy")


def process_vm(pid: int, local: Memory, remote_address: int, blocks: Blocks, op: str) -> float:
    """Moves the blocks with bare process_vm_writev or process_vm_readv.

    Args:
        pid: The process of the remote memory.
        local: What the local offsets refer to.
        remote_address: What the remote offsets refer to, in that process.
        blocks: Array (n, 3) of local offset, remote offset, length.
        op: "put" or "get".

    Returns:
        Seconds.

    Raises:
        LimitError: The system call failed.
    """
    table, count = _table(blocks)
    result = _library()[1].kvm_process_vm(pid, _pointer(local), remote_address, table, count, OPERATION_CODES[op])
    return _seconds(result, "process_vm_writev" if op == "put" else "process_vm_readv")


def allow_process_vm() -> None:
    """Lets processes of the same user read and write this one, where Yama would forbid it."""
    _library()[1].kvm_allow_process_vm()


def stream(descriptor: int, memory: Memory, nbytes: int, chunk: int, *, send: bool) -> float:
    """Sends or receives a stream over a blocking socket.

    Args:
        descriptor: The socket.
        memory: Walked over from its start, as often as needed.
        nbytes: Bytes to move.
        chunk: Bytes of one system call.
        send: Whether to send.

    Returns:
        Seconds until the last byte was acknowledged (sender) or received.

    Raises:
        LimitError: The connection failed.
    """
    library = _library()[1]
    function = library.kvm_stream_send if send else library.kvm_stream_receive
    return _seconds(function(descriptor, _pointer(memory), memory.nbytes, nbytes, chunk), "send" if send else "recv")


def exchange_client(descriptor: int, local: Memory, blocks: Blocks, op: str) -> npt.NDArray[np.float64]:
    """Puts (or gets) block after block over a blocking socket, waiting for each acknowledgement (or answer).

    Args:
        descriptor: The socket.
        local: What the local offsets refer to.
        blocks: Array (n, 3) of local offset, remote offset, length.
        op: "put" or "get".

    Returns:
        Seconds of each exchange.

    Raises:
        LimitError: The connection failed.
    """
    table, count = _table(blocks)
    seconds = np.empty(count, dtype=np.float64)
    out = _library()[0].cast("double *", seconds.ctypes.data)
    _seconds(
        _library()[1].kvm_exchange_client(descriptor, _pointer(local), table, count, OPERATION_CODES[op], out),
        "send/recv",
    )
    return seconds


def exchange_server(descriptor: int, remote: Memory, count: int) -> None:
    """Serves exchanges.

    Args:
        descriptor: The socket.
        remote: What the client's remote offsets refer to.
        count: How many exchanges.

    Raises:
        LimitError: The connection failed, or an offset was out of range.
    """
    _seconds(_library()[1].kvm_exchange_server(descriptor, _pointer(remote), remote.nbytes, count), "recv/send")


def fill(memory: Memory, seed: int) -> None:
    """Fills memory with a pattern of seed and place."""
    _library()[1].kvm_fill(_pointer(memory), memory.nbytes, seed)


def clear(memory: Memory) -> None:
    """Sets memory to zero."""
    ctypes.memset(memory.address, 0, memory.nbytes)


def wrong_blocks(memory: Memory, blocks: Blocks, seed: int, side: int) -> int:
    """Counts blocks that do not hold what the other side's memory holds at their place.

    Args:
        memory: The destination.
        blocks: Array (n, 3) of local offset, remote offset, length.
        seed: With which the other side's memory was filled.
        side: LOCAL when the local offsets are those of ``memory``, else REMOTE.

    Returns:
        Their number.
    """
    table, count = _table(blocks)
    return int(_library()[1].kvm_wrong_blocks(_pointer(memory), table, count, seed, side))


def clear_and_check(memory: Memory, blocks: Blocks, side: int) -> bool:
    """Clears the blocks of a memory that was zero before they were written.

    Args:
        memory: The destination.
        blocks: Array (n, 3) of local offset, remote offset, length.
        side: LOCAL or REMOTE.

    Returns:
        Whether everything is zero again: nothing was written beside the blocks.
    """
    table, count = _table(blocks)
    return bool(_library()[1].kvm_clear_and_check(_pointer(memory), memory.nbytes, table, count, side))
