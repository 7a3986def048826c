"""Two processes with a channel each on a simulated host, for tests that are no cases of the conformance kit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvlink.testing.endpoint import RemoteEndpoint
from kvlink.testing.wire import ChildProcess

from .simulated import Cell, host_environment, on_host

CELL = Cell("hcomm_onesided", "8.5.0")
SIZE = 1 << 20


class End(RemoteEndpoint):
    """An endpoint with the simulator's commands."""

    def faults(self, spec: str) -> None:
        """Replaces the faults of its process."""
        self.call("faults", spec=spec)

    def live(self) -> dict[str, int]:
        """Returns the numbers of its process's live vendor objects."""
        return dict(self.call("live"))

    def counter(self, name: str) -> int:
        """Returns one of the provider's counters."""
        return int(self.call("provider_statistics")[name])


@dataclass
class Ends:
    """Both ends: ``a`` on npu:0, ``b`` on npu:1.

    Attributes:
        a: The one that connects.
        b: The one that is connected to.
        address: Of b.
        peer: b's id at a, once connected.
    """

    a: End
    b: End
    address: str = ""
    peer: str = ""
    kinds: tuple[str, str] = ("device", "device")
    options: Mapping[str, object] = field(default_factory=dict)

    def open(self) -> None:
        """Opens both channels and gives each a region: "a" of seed 1 and "b" of seed 2."""
        self.a.open(options=self.options)
        self.address = self.b.open(options=self.options)
        self.a.memory("a", SIZE, 1, kind=self.kinds[0], alignment=4096)
        self.b.memory("b", SIZE, 2, kind=self.kinds[1], alignment=4096)

    def connect(self, timeout: float = 10.0) -> None:
        """Connects a to b."""
        self.peer = self.a.connect(self.address, timeout=timeout)
        self.a.wait_region(self.peer, "b")

    def put(self, **more: Any) -> dict[str, Any]:
        """Puts the first 4,096 bytes of a to the start of b."""
        return self.a.transfer("put", self.peer, "a", "b", [(0, 0, 4096)], **more)

    def round_trip(self) -> None:
        """Moves bytes both ways and compares both regions."""
        self.a.fill("a", 1)
        self.b.fill("b", 2)
        self.a.transfer("put", self.peer, "a", "b", [(0, 8192, 4096), (4096, 65_536, 100)])
        self.b.verify("b", 2, [(8192, 1, 0, 4096), (65_536, 1, 4096, 100)])
        self.a.transfer("get", self.peer, "a", "b", [(100_000, 0, 5000)])
        self.a.verify("a", 1, [(100_000, 2, 0, 5000)])


@contextmanager
def end(cell: Cell, name: str, device: str, **environ: str) -> Iterator[End]:
    """A process on the current simulated host; ended with the block."""
    child = ChildProcess("tests.ascend.hccl.agent", environ=environ)
    try:
        yield End(name, {"provider": cell.provider, "options": {}, "device": device}, child)
    finally:
        child.kill()


@contextmanager
def two_ends(
    folder: Path,
    cell: Cell = CELL,
    *,
    a: Mapping[str, str] | None = None,
    b: Mapping[str, str] | None = None,
    b_cell: Cell | None = None,
    options: Mapping[str, object] | None = None,
    **both: str,
) -> Iterator[Ends]:
    """Both ends on a simulated host.

    Args:
        folder: For the host.
        cell: Provider, flavour, SoC, link, memory.
        a: Further variables of a's process.
        b: Further variables of b's process.
        b_cell: Another host for b, with the same network.
        options: Of both channels.
        **both: Further variables of both processes.
    """
    with on_host(cell, folder, **both) as environment:
        other = {}
        if b_cell is not None:
            other = host_environment(b_cell, folder / "other")
            other["CANN_SIM_NET"] = environment["CANN_SIM_NET"]
        with (
            end(cell, "a", "npu:0", **(a or {})) as first,
            end(b_cell or cell, "b", "npu:1", **other, **(b or {})) as second,
        ):
            yield Ends(first, second, kinds=cell.pair, options=options or {})
