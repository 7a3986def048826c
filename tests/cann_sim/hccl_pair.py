"""Two agents, each with a device of its own, and the steps that most rules of HCCL need before they can be broken."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .hccl_agent import Agent
from .hccl_client import DEVICE, HUGE_ONLY, MIB, rank_table

_names = itertools.count()


def fresh_name() -> str:
    """A communicator name nobody used before."""
    return f"comm{next(_names)}"


@dataclass
class End:
    """What one side of a link has.

    Attributes:
        agent: The process.
        comm: Its communicator.
        address: Its registered memory.
        handle: Of that memory.
        stream: For its transfers.
        peer: Rank of the other side.
    """

    agent: Any
    comm: int
    address: int
    handle: int
    stream: int
    peer: int


class Pair:
    """Agents a (device 0, rank 0) and b (device 1, rank 1) on one host."""

    def __init__(self, host: Mapping[str, str], **env: str) -> None:
        # A network of its own: another pair of the same host may hold the ports.
        self.host = {**host, "CANN_SIM_NET": uuid.uuid4().hex, **env}
        self.a = Agent(self.host)
        self.b = Agent(self.host)
        assert self.a.start(0) == 0
        assert self.b.start(1) == 0

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *exc: object) -> None:
        self.a.close()
        self.b.close()

    @staticmethod
    def table(**fields: Any) -> str:
        """The rank table of both; fields named a_... or b_... replace or add one of a rank."""
        ranks = [
            {"server_id": "host", "device_id": "0", "device_ip": "192.168.100.100"},
            {"server_id": "host", "device_id": "1", "device_ip": "192.168.100.101"},
        ]
        rest = {}
        for key, value in fields.items():
            if key[:2] in ("a_", "b_"):
                ranks["ab".index(key[0])][key[2:]] = value
            else:
                rest[key] = value
        return rank_table(ranks, **rest)

    def comms(self, table: str | None = None, name: str | None = None) -> tuple[int, int]:
        """Initialises a communicator on both sides."""
        text, label = table or self.table(), name or fresh_name()
        code_a, comm_a = self.a.init(text, 0, label)
        code_b, comm_b = self.b.init(text, 1, label)
        assert (code_a, code_b) == (0, 0), (code_a, code_b, self.a.error_text(), self.b.error_text())
        return comm_a, comm_b

    def prepare(self, comm_a: int, comm_b: int, timeout: int = 5) -> tuple[int, int]:
        """Both sides prepare at once."""
        self.a.begin("prepare", comm_a, timeout)
        code_b = self.b.prepare(comm_b, timeout)
        return self.a.end(), code_b

    def bound(
        self, agent: Any, comm: int, size: int = 2 * MIB, kind: int = DEVICE, address: int | None = None
    ) -> tuple[int, int]:
        """Allocates where no address is given, registers and binds; returns address and handle."""
        if address is None:
            address = agent.malloc(size, HUGE_ONLY) if kind == DEVICE else agent.malloc_host(size)
        code, handle = agent.register(address, size, kind)
        assert code == 0, agent.error_text()
        assert agent.bind(comm, handle) == 0, agent.error_text()
        return address, handle

    def link(self, size: int = 2 * MIB, kinds: tuple[int, int] = (DEVICE, DEVICE), **fields: Any) -> tuple[End, End]:
        """A working link with one region on each side."""
        comm_a, comm_b = self.comms(self.table(**fields))
        address_a, handle_a = self.bound(self.a, comm_a, size, kinds[0])
        address_b, handle_b = self.bound(self.b, comm_b, size, kinds[1])
        codes = self.prepare(comm_a, comm_b)
        assert codes == (0, 0), (codes, self.a.error_text(), self.b.error_text())
        return (
            End(self.a, comm_a, address_a, handle_a, self.a.stream(), 1),
            End(self.b, comm_b, address_b, handle_b, self.b.stream(), 0),
        )

    @staticmethod
    def unlink(*ends: End) -> None:
        """Takes a link down in the right order."""
        for end in ends:
            assert end.agent.unbind(end.comm, end.handle) == 0
            assert end.agent.destroy(end.comm) == 0
            assert end.agent.deregister(end.handle) == 0
