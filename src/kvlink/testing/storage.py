"""Memory under test: one small interface, whether the CPU can touch it or only the provider can copy it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .patterns import Bytes, expected, first_difference, pattern
from .suite import check

if TYPE_CHECKING:
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
    """Memory that the CPU cannot touch: the provider allocates it and copies it."""

    def _make(self, channel: Channel, access: str) -> Region:
        self._engine = channel._engine
        return super()._make(channel, access)

    def read(self, offset: int, length: int) -> Bytes:
        """Copies bytes out of the region."""
        out = np.empty(length, dtype=np.uint8)
        if length:
            self._engine.mem_copy(self.region.handle, offset, out, to_region=False)
        return out

    def write(self, offset: int, content: Bytes) -> None:
        """Copies bytes into the region."""
        if len(content):
            self._engine.mem_copy(self.region.handle, offset, np.ascontiguousarray(content), to_region=True)


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
