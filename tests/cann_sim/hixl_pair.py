"""Two HIXL engines in processes of their own."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .hccl_agent import Agent
from .hccl_client import DEVICE, MIB

NO_POOL = {"BufferPool": "0:0"}


def free_name(ip: str = "127.0.0.1") -> str:
    """An engine name with a port nobody listens on."""
    with socket.socket() as probe:
        probe.bind((ip, 0))
        return f"{ip}:{probe.getsockname()[1]}"


def hixl_agent(host: Mapping[str, str], libs: Path, **env: str) -> Any:
    """A process with a HIXL object that is not initialized."""
    return Agent({**host, "CANN_SIM_HIXL_CLIENT": str(libs / "libhixl_client.so"), **env}, "hixl_client:HixlClient")


class HixlPair:
    """Engines a (device 0) and b (device 1), initialized with the same options; both listen."""

    def __init__(
        self, host: Mapping[str, str], libs: Path, options: Mapping[str, str] | None = None, **env: str
    ) -> None:
        self.env = {"CANN_SIM_NET": uuid.uuid4().hex, **env}
        self.a = hixl_agent(host, libs, **self.env)
        self.b = hixl_agent(host, libs, **self.env)
        self.name_a, self.name_b = free_name(), free_name()
        for device, (agent, name) in enumerate(((self.a, self.name_a), (self.b, self.name_b))):
            assert agent.start(device) == 0
            assert agent.hx_initialize(name, dict(NO_POOL if options is None else options)) == 0, agent.error_text()

    def __enter__(self) -> HixlPair:
        return self

    def __exit__(self, *exc: object) -> None:
        self.a.close()
        self.b.close()

    @staticmethod
    def memory(agent: Any, size: int = 2 * MIB, kind: int = DEVICE) -> tuple[int, int]:
        """Allocates and registers; returns address and handle."""
        address = agent.malloc(size) if kind == DEVICE else agent.malloc_host(size)
        code, handle = agent.hx_register(address, size, kind)
        assert code == 0, agent.error_text()
        return address, handle

    def link(self, size: int = 2 * MIB) -> tuple[int, int, int, int]:
        """Registers memory on both sides and connects a to b; returns both addresses, then both handles."""
        address_a, handle_a = self.memory(self.a, size)
        address_b, handle_b = self.memory(self.b, size)
        assert self.a.hx_connect(self.name_b) == 0, self.a.error_text()
        return address_a, address_b, handle_a, handle_b
