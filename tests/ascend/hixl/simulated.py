"""The table of cells for HIXL, and pairs of processes on simulated hosts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.ascend.hccl.simulated import (
    DEVICES,
    LINKS,
    PAIRS,
    SOCS,
    Cell,
    host_environment,
    native,
    on_host,
    provider_paths,
)

from kvlink.testing.endpoint import RemoteEndpoint
from kvlink.testing.wire import ChildProcess

FLAVOURS = ("8.5.0", "9.0", "9.1")
MIB = 1 << 20

__all__ = [
    "DEVICES",
    "FLAVOURS",
    "MIB",
    "Cell",
    "Ends",
    "cells",
    "host_environment",
    "native",
    "on_host",
    "provider_paths",
    "two_processes",
    "works",
]


def cells() -> list[Cell]:
    """The whole table."""
    return [Cell("hixl", *fields) for fields in itertools.product(FLAVOURS, SOCS, LINKS, PAIRS)]


def works(cell: Cell) -> bool:
    """Whether bytes move both ways: over HCCS a peer's host memory is out of reach."""
    return cell.link == "roce" or cell.pair == ("device", "device")


@dataclass
class Ends:
    """Two processes with a device each: ``a`` connects to ``b``.

    Attributes:
        a: On npu:0.
        b: On npu:1.
        address: Of b's channel once :meth:`open` was called.
    """

    a: RemoteEndpoint
    b: RemoteEndpoint
    address: str = ""
    peers: dict[str, str] = field(default_factory=dict)

    def open(self, a: Mapping[str, Any] | None = None, b: Mapping[str, Any] | None = None) -> None:
        """Opens a channel on each side with these settings."""
        self.a.open(**(a or {}))
        self.address = self.b.open(**(b or {}))

    def memory(self, kind: str = "device", nbytes: int = MIB) -> None:
        """Gives each side a region, "a" and "b"."""
        for end, name, seed in ((self.a, "a", 1), (self.b, "b", 2)):
            end.memory(name, nbytes, seed, kind=kind, alignment=4096)

    def connect(self, timeout: float = 10.0) -> str:
        """Connects a to b; returns b's id at a."""
        peer = self.a.connect(self.address, timeout=timeout)
        self.peers = {"a": peer, "b": self.b.wait_peers(1)[0]}
        return peer

    def put(self, size: int = 4096, **more: Any) -> dict[str, Any]:
        """Moves a little from a's region to b's."""
        return self.a.transfer("put", self.peers["a"], "a", "b", [(0, 0, size)], **more)

    def check_put(self, size: int = 4096) -> None:
        """Moves a little and compares every byte of both regions."""
        self.a.fill("a", 1)
        self.b.fill("b", 2)
        self.put(size)
        self.a.verify("a", 1)
        self.b.verify("b", 2, [(0, 1, 0, size)])


@contextmanager
def two_processes(
    cell: Cell,
    folder: Path,
    *,
    a: Mapping[str, str] | None = None,
    b: Mapping[str, str] | None = None,
    devices: tuple[str, str] = ("npu:0", "npu:1"),
    **environment: str,
) -> Iterator[Ends]:
    """Starts two agents on a simulated host.

    Args:
        cell: Flavour, SoC and link.
        folder: Where the host is laid out.
        a: Variables of the first process only.
        b: Variables of the second process only.
        devices: Of the two.
        **environment: Variables of both.
    """
    with on_host(cell, folder, **environment), ExitStack() as stack:
        ends = []
        for name, own, device in (("a", a, devices[0]), ("b", b, devices[1])):
            child = ChildProcess("tests.ascend.hixl.agent", environ=dict(own or {}))
            stack.callback(child.kill)
            ends.append(RemoteEndpoint(name, {"provider": "hixl", "options": {}, "device": device}, child))
        yield Ends(ends[0], ends[1])
