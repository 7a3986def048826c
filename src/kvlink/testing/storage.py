"""Memory under test: one small interface, whether the CPU can touch it or only the provider can copy it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from .._engine_types import Capability
from .._memory import DEVICE, HOST, READ, WRITE, parse_device
from .patterns import Bytes, expected, first_difference, pattern
from .suite import check

if TYPE_CHECKING:
    from .._engine import EngineChannel
    from ..channel import Channel
    from ..region import Region

GUARD = 4096
"""Bytes before and behind plain memory that nobody may touch."""
_GUARD_SEED = 0x6A5D
_PAGE = 4096


class Storage:
    """Memory of one region. The base class holds it through the region's own read and write."""

    def __init__(self, channel: Channel, name: str, nbytes: int, access: str) -> None:
        self.name = name
        self.nbytes = nbytes
        self.region: Region = self._make(channel, access)

    def _make(self, channel: Channel, access: str) -> Region:
        return channel.allocate(self.nbytes, name=self.name, access=access)

    def read(self, offset: int, length: int) -> Bytes:
        """Copies bytes out of the region."""
        raise NotImplementedError

    def write(self, offset: int, content: Bytes) -> None:
        """Copies bytes into the region."""
        raise NotImplementedError

    def check_guards(self) -> None:
        """Fails when something outside the region was written, where this memory can tell."""

    def fill(self, seed: int, offset: int = 0, length: int | None = None) -> None:
        """Writes the pattern of ``seed``; by default over the whole region."""
        length = self.nbytes - offset if length is None else length
        self.write(offset, pattern(seed, offset, length))

    def compare(self, seed: int, patches: list[list[int]]) -> str | None:
        """Compares the whole region and its guards.

        Args:
            seed: What :meth:`fill` wrote.
            patches: What was written over it (:class:`~kvlink.testing.patterns.Patch`).

        Returns:
            None when every byte is as expected, else what differs.
        """
        difference = first_difference(self.read(0, self.nbytes), expected(seed, self.nbytes, patches))
        if difference is None:
            self.check_guards()
            return None
        return f"region {self.name!r}: {difference}"


class PlainStorage(Storage):
    """Ordinary memory of this process with guards around the region."""

    def __init__(self, channel: Channel, name: str, nbytes: int, access: str, alignment: int = 1) -> None:
        self._whole = np.empty(nbytes + 2 * GUARD + alignment, dtype=np.uint8)
        self._start = GUARD + (-(self._whole.ctypes.data + GUARD)) % alignment
        self._guards = pattern(_GUARD_SEED, 0, len(self._whole)).copy()
        self._whole[:] = self._guards
        super().__init__(channel, name, nbytes, access)

    def _make(self, channel: Channel, access: str) -> Region:
        return channel.register(self._body, name=self.name, access=access)

    @property
    def _body(self) -> Bytes:
        return self._whole[self._start : self._start + self.nbytes]

    def read(self, offset: int, length: int) -> Bytes:
        """Copies bytes out of the region."""
        return self._body[offset : offset + length].copy()

    def write(self, offset: int, content: Bytes) -> None:
        """Copies bytes into the region."""
        self._body[offset : offset + len(content)] = content

    def check_guards(self) -> None:
        """Fails when something outside the region was written."""
        end = self._start + self.nbytes
        for part, where in ((slice(0, self._start), "before"), (slice(end, None), "behind")):
            difference = first_difference(self._whole[part], self._guards[part])
            check(difference is None, f"memory {where} region {self.name!r} was written: {difference}")


class AllocatedStorage(Storage):
    """Host memory that the provider allocated."""

    def _make(self, channel: Channel, access: str) -> Region:
        region = channel.allocate(self.nbytes, name=self.name, access=access, device="cpu")
        self._view: Bytes = np.frombuffer(region.buffer(), dtype=np.uint8)[: self.nbytes]
        return region

    def read(self, offset: int, length: int) -> Bytes:
        """Copies bytes out of the region."""
        return self._view[offset : offset + length].copy()

    def write(self, offset: int, content: Bytes) -> None:
        """Copies bytes into the region."""
        self._view[offset : offset + len(content)] = content


class DeviceStorage(Storage):
    """Memory that the CPU cannot touch: the provider allocates it and copies it, registered or not."""

    def _make(self, channel: Channel, access: str) -> Region:
        self._engine = channel._engine
        address = self._engine.mem_alloc(DEVICE, self.nbytes)
        weakref.finalize(self, self._engine.mem_free, address).atexit = False
        # Registered, not allocated: what a closed region left behind has to be looked at afterwards.
        return channel.register((address, self.nbytes, channel.device), name=self.name, access=access)

    @contextmanager
    def _handle(self) -> Iterator[int]:
        if not self.region.closed:
            yield self.region.handle
            return
        _, index = parse_device(self.region.device)
        handle = self._engine.mem_open(self.region.address, self.nbytes, DEVICE, index, 0)
        try:
            yield handle
        finally:
            self._engine.mem_close(handle, 1.0)

    def read(self, offset: int, length: int) -> Bytes:
        """Copies bytes out of the region."""
        out = np.empty(length, dtype=np.uint8)
        if length:
            with self._handle() as handle:
                self._engine.mem_copy(handle, offset, out, to_region=False)
        return out

    def write(self, offset: int, content: Bytes) -> None:
        """Copies bytes into the region."""
        if len(content):
            with self._handle() as handle:
                self._engine.mem_copy(handle, offset, np.ascontiguousarray(content), to_region=True)


def make_storage(channel: Channel, name: str, nbytes: int, *, kind: str, access: str, alignment: int) -> Storage:
    """Makes a region and the access to its memory.

    Args:
        channel: Where to register.
        name: Of the region.
        nbytes: Its bytes.
        kind: "plain", "allocated" or "device".
        access: What peers may do.
        alignment: Of the address of plain memory; whole pages where a device's driver maps it.
    """
    if kind == "plain":
        if channel.device != "cpu":
            alignment = max(alignment, _PAGE)
        return PlainStorage(channel, name, nbytes, access, alignment)
    return (AllocatedStorage if kind == "allocated" else DeviceStorage)(channel, name, nbytes, access)


def open_some_memory(channel: EngineChannel, device: str) -> object:
    """Registers a little memory with a bare engine, so that a link of it has something to connect.

    Args:
        channel: The engine.
        device: The one it was opened on.

    Returns:
        What keeps the memory alive.
    """
    _, index = parse_device(device)
    if Capability.ALLOCATE in channel.attributes.capabilities:
        kind = DEVICE if index >= 0 else HOST
        channel.mem_open(channel.mem_alloc(kind, _PAGE), _PAGE, kind, index, READ | WRITE)
        return None
    unit = max(_PAGE, channel.attributes.memory_alignment)
    memory = np.zeros(2 * unit, dtype=np.uint8)
    channel.mem_open(memory.ctypes.data + -memory.ctypes.data % unit, unit, HOST, -1, READ | WRITE)
    return memory
