"""What can be registered: tensors, storages, arrays, buffers and bare pointers, all described the same way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ._native import ffi
from .errors import ConfigError

HOST, DEVICE = 0, 1
READ, WRITE = 1, 2


@dataclass(frozen=True)
class MemoryView:
    """Memory to register.

    Attributes:
        address: Where it starts.
        nbytes: Its bytes, at least 1.
        kind: HOST (0) or DEVICE (1).
        device: Device index; -1 for host memory.
        device_name: "cpu", "npu:0".
        readonly: This process may not write it.
        keepalive: Holds the memory; None for a bare pointer, which the caller keeps alive.
    """

    address: int
    nbytes: int
    kind: int
    device: int
    device_name: str
    readonly: bool
    keepalive: Any = field(repr=False, compare=False)


def parse_access(access: str) -> int:
    """Converts "r", "w" or "rw" (what peers may do) to the bits of ``enum kvl_access``.

    Raises:
        ConfigError: Another text.
    """
    bits = {"r": READ, "w": WRITE, "rw": READ | WRITE, "wr": READ | WRITE}.get(access)
    if bits is None:
        raise ConfigError(f"access is {access!r}; expected 'r', 'w' or 'rw'", operation="register")
    return bits


def access_name(bits: int) -> str:
    """Converts the bits of ``enum kvl_access`` to "r", "w", "rw" or ""."""
    return ("r" if bits & READ else "") + ("w" if bits & WRITE else "")


def describe(memory: object, *, access: str = "rw") -> MemoryView:
    """Describes memory for registration. Nothing is copied.

    Args:
        memory: A torch tensor or storage on any device, a NumPy array, an object with the buffer protocol, or a tuple
            ``(pointer, nbytes, device)`` with device "cpu" or "npu:0". Contiguous, at least one byte.
        access: What peers may do: "r", "w" or "rw".

    Returns:
        Address, bytes and device, and what keeps them alive.

    Raises:
        ConfigError: Not such an object; empty; not contiguous; or read-only while peers may write.
    """
    bits = parse_access(access)
    if isinstance(memory, tuple):
        view = _describe_pointer(memory)
    elif hasattr(memory, "data_ptr") and hasattr(memory, "device"):
        view = _describe_torch(memory)
    elif isinstance(memory, np.ndarray):
        view = _describe_array(memory)
    else:
        view = _describe_buffer(memory)
    if view.nbytes <= 0:
        raise ConfigError("the memory is empty; a region has at least one byte", operation="register")
    if view.readonly and bits & WRITE:
        raise ConfigError(
            f"the memory is read-only, but access {access!r} lets peers write it",
            operation="register",
            hint="pass access='r' or a writable buffer",
        )
    return view


def parse_device(device: str) -> tuple[str, int]:
    """Splits a device: ("cpu", -1) for "cpu", ("npu", 0) for "npu" and "npu:0".

    Raises:
        ConfigError: Not of that form.
    """
    kind, colon, index = device.partition(":")
    if not kind.isalpha() or (colon and not index.isdecimal()):
        raise ConfigError(f"device is {device!r}; expected 'cpu' or a kind and an index as in 'npu:0'")
    if kind == "cpu":
        return kind, -1
    return kind, int(index or 0)


def _view(address: int, nbytes: int, device: str, keepalive: Any, *, readonly: bool = False) -> MemoryView:
    kind, index = parse_device(device)
    if address == 0 and nbytes:
        raise ConfigError("the memory has address 0: it was never allocated, or is not backed", operation="register")
    return MemoryView(
        address=address,
        nbytes=nbytes,
        kind=HOST if kind == "cpu" else DEVICE,
        device=index,
        device_name="cpu" if kind == "cpu" else f"{kind}:{index}",
        readonly=readonly,
        keepalive=keepalive,
    )


def _describe_pointer(memory: tuple[Any, ...]) -> MemoryView:
    match memory:
        case (int(address), int(nbytes), str(device)) if 0 < address < 2**64 and 0 <= nbytes <= 2**64 - address:
            return _view(address, nbytes, device, None)
    raise ConfigError(
        f"memory is {memory!r}; expected (pointer, nbytes, device), for instance (0x7f0000000000, 4096, 'cpu')",
        operation="register",
    )


def _describe_torch(memory: Any) -> MemoryView:
    """A tensor or a storage; duck-typed, so that torch is imported only by who uses it."""
    device = str(memory.device)
    is_contiguous = getattr(memory, "is_contiguous", None)
    if is_contiguous is None:  # a storage: plain bytes
        nbytes = memory.nbytes() if callable(memory.nbytes) else memory.nbytes
        return _view(int(memory.data_ptr()), int(nbytes), device, memory)
    if getattr(memory, "is_sparse", False) or device == "meta":
        raise ConfigError(f"a {memory.layout} tensor on {device} has no memory to register", operation="register")
    if not is_contiguous():
        raise ConfigError(
            f"the tensor of shape {tuple(memory.shape)} with strides {tuple(memory.stride())} is not contiguous",
            operation="register",
            hint="register its storage (tensor.untyped_storage()) or a contiguous tensor",
        )
    nbytes = int(memory.numel()) * int(memory.element_size())
    return _view(int(memory.data_ptr()) if nbytes else 0, nbytes, device, memory)


def _describe_array(memory: np.ndarray[Any, Any]) -> MemoryView:
    if memory.dtype.hasobject:
        raise ConfigError(f"an array of dtype {memory.dtype} holds Python objects, not bytes", operation="register")
    if not memory.flags.c_contiguous:
        raise ConfigError(
            f"the array of shape {memory.shape} with strides {memory.strides} is not C-contiguous",
            operation="register",
            hint="pass numpy.ascontiguousarray(array) or the array it is a view of",
        )
    return _view(
        int(memory.ctypes.data) if memory.nbytes else 0,
        memory.nbytes,
        "cpu",
        memory,
        readonly=not memory.flags.writeable,
    )


def _describe_buffer(memory: object) -> MemoryView:
    try:
        buffer = memoryview(memory)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigError(
            f"memory is {type(memory).__name__}; expected a tensor, an array, a buffer or (pointer, nbytes, device)",
            operation="register",
        ) from None
    if not buffer.c_contiguous:
        raise ConfigError("the buffer is not C-contiguous", operation="register")
    # The export held by `keepalive` also stops a bytearray from being resized while peers can reach it.
    keepalive = ffi.from_buffer("char[]", buffer)
    address = int(ffi.cast("uintptr_t", keepalive)) if buffer.nbytes else 0
    return _view(address, buffer.nbytes, "cpu", keepalive, readonly=buffer.readonly)


def host_buffer(address: int, nbytes: int) -> memoryview:
    """Returns a writable view of host memory; whoever uses it keeps that memory alive.

    Args:
        address: Where it starts.
        nbytes: Its bytes.
    """
    return memoryview(ffi.buffer(ffi.cast("char *", address), nbytes)).cast("B")
