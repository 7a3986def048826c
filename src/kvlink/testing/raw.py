"""A provider's function table itself, without the engine: for what only the boundary shows."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .._native import ffi
from .._status import Status, c_text
from .suite import check

POISON = 0xDB
TABLE_BYTES = int(ffi.sizeof("kvl_provider"))
MANDATORY = (
    "probe",
    "engine_open",
    "engine_close",
    "engine_query",
    "mem_open",
    "mem_close",
    "mem_export",
    "link_open",
    "link_describe",
    "link_connect",
    "link_close",
    "rmem_open",
    "rmem_close",
    "submit",
    "poll",
    "wait",
    "wake",
)
_INIT = "kvl_provider_init"


def new_error(room: int | None = None) -> Any:
    """Returns a ``kvl_error``; with ``room`` it says that it has only so many bytes, and is poisoned behind them."""
    size = int(ffi.sizeof("kvl_error"))
    error = ffi.new("kvl_error *")
    if room is not None:
        ffi.buffer(error)[room:size] = bytes([POISON]) * (size - room)
    error.struct_size = size if room is None else room
    return error


class Table:
    """What ``kvl_provider_init`` filled.

    Args:
        path: The library.
        version: The ABI version to ask for.
        room: Bytes that the table is said to have; there is poisoned memory behind.

    Attributes:
        status: What the function returned.
        error: The ``kvl_error`` it was given.
        raw: The ``kvl_provider``.
    """

    def __init__(self, path: str, *, version: int = 1, room: int = TABLE_BYTES) -> None:
        self._library = ffi.dlopen(path)  # kept: slots point into it
        self._memory = ffi.new("char[]", TABLE_BYTES + 1024)
        self._room = room
        ffi.buffer(self._memory)[:] = bytes([POISON]) * len(self._memory)
        self.raw = ffi.cast("kvl_provider *", self._memory)
        self.raw.struct_size = room
        self.error = new_error()
        self.status = int(getattr(self._library, _INIT)(version, self.raw, self.error))

    @property
    def size(self) -> int:
        """Bytes that the provider says it filled."""
        return int(self.raw.struct_size)

    def check_room(self) -> None:
        """Fails when something behind the given room was written."""
        behind = bytes(ffi.buffer(self._memory)[self._room :])
        check(set(behind) <= {POISON}, f"{_INIT} wrote behind the {self._room} bytes that it was given")

    def has(self, slot: str) -> bool:
        """Whether an optional function is there."""
        offset = int(ffi.offsetof("kvl_provider", slot))
        return offset + 8 <= self.size and getattr(self.raw, slot) != ffi.NULL


class RawEngine:
    """An open engine of a table; closes it at the end of a ``with``."""

    def __init__(self, table: Table, options: Mapping[str, str], device: str) -> None:
        self._owner = table  # holds the memory that `table` points into
        self.table = table.raw
        self._keep = [(ffi.new("char[]", k.encode()), ffi.new("char[]", v.encode())) for k, v in options.items()]
        self._options = ffi.new("kvl_option[]", [{"name": name, "value": value} for name, value in self._keep])
        self._device = ffi.new("char[]", device.encode())
        self._params = ffi.new(
            "kvl_engine_params *",
            {
                "struct_size": ffi.sizeof("kvl_engine_params"),
                "option_count": len(self._keep),
                "options": self._options,
                "device": self._device,
            },
        )
        out = ffi.new("kvl_engine **")
        self.error = new_error()
        self.status = int(self.table.engine_open(self._params, out, self.error))
        self.handle = out[0]

    def __enter__(self) -> RawEngine:
        check(self.status == 0, f"engine_open: {c_text(self.error.message)}")
        return self

    def __exit__(self, *_: object) -> None:
        self.table.engine_close(self.handle)

    @contextmanager
    def link(self, role: int = 0) -> Iterator[Any]:
        """Opens a link that is never connected."""
        params = ffi.new(
            "kvl_link_params *",
            {
                "struct_size": ffi.sizeof("kvl_link_params"),
                "role": role,
                "epoch": 1,
                "session": b"s" * 16,
                "session_key": b"k" * 32,
                "local_id": b"raw",
                "peer_id": b"other",
            },
        )
        out, error = ffi.new("kvl_link **"), new_error()
        status = self.table.link_open(self.handle, params, out, error)
        check(status == 0, f"link_open: {c_text(error.message)}")
        try:
            yield out[0]
        finally:
            self.table.link_close(out[0], 100)


def check_two_calls(call: Callable[[Any, Any, Any], int], limit: int, what: str) -> bytes:
    """Holds a function against the two-call idiom for blobs.

    Args:
        call: Takes buffer, length and error.
        limit: What the provider declares as the longest blob.
        what: Name of the function.

    Returns:
        The blob.
    """
    length = ffi.new("uint64_t *", 0)
    status = call(ffi.NULL, length, new_error())
    needed = int(length[0])
    check(status == Status.NO_RESOURCE, f"{what} without a buffer returned {status} instead of NO_RESOURCE")
    check(0 < needed <= limit, f"{what} needs {needed} bytes; the provider declares at most {limit}")
    memory = ffi.new("char[]", needed + 64)
    ffi.buffer(memory)[:] = bytes([POISON]) * len(memory)
    length[0] = needed - 1
    status = call(memory, length, new_error())
    check(status == Status.NO_RESOURCE, f"{what} with one byte too few returned {status} instead of NO_RESOURCE")
    check(int(length[0]) == needed, f"{what} with one byte too few says {int(length[0])} bytes instead of {needed}")
    blobs = []
    for room in (needed, needed + 32):
        length[0] = room
        error = new_error()
        status = call(memory, length, error)
        check(status == 0, f"{what} with {room} bytes: {c_text(error.message)}")
        check(int(length[0]) <= needed, f"{what} says {int(length[0])} bytes after {needed}")
        blobs.append(bytes(ffi.buffer(memory, int(length[0]))))
    check(set(bytes(ffi.buffer(memory)[needed + 32 :])) <= {POISON}, f"{what} wrote behind its buffer")
    check(blobs[0] == blobs[1], f"{what} gives another blob each time")
    return blobs[0]


def exported_symbols(path: str) -> list[str]:
    """Returns the names that a 64-bit ELF library defines for others, without the linker's and the compiler's own."""
    data = Path(path).read_bytes()
    check(data[:5] == b"\x7fELF\x02", f"{path} is no 64-bit ELF file")
    section_offset = struct.unpack_from("<Q", data, 0x28)[0]
    entry, count = struct.unpack_from("<HH", data, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, section_offset + index * entry) for index in range(count)]
    names = []
    for section in sections:
        kind, offset, size, link, item = section[1], section[4], section[5], section[6], section[9]
        if kind != 11:  # SHT_DYNSYM
            continue
        strings = sections[link][4]
        for place in range(offset, offset + size, item):
            name, info, _, index = struct.unpack_from("<IBBH", data, place)
            if index != 0 and info >> 4 in (1, 2):  # defined here; global or weak
                end = data.index(b"\0", strings + name)
                names.append(data[strings + name : end].decode())
    return sorted(name for name in names if not name.startswith("_"))
