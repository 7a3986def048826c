"""The conformance kit's agent, with the simulator of its process at hand."""

from __future__ import annotations

import ctypes
import json
from typing import Any

import numpy as np

import kvlink
from kvlink.errors import ConfigError
from kvlink.testing.agent import Agent
from kvlink.testing.wire import serve


class SimulatedAgent(Agent):
    """Adds commands for faults, live objects and memory of the simulated CANN."""

    def __init__(self) -> None:
        super().__init__()
        self._simulator = ctypes.CDLL("libcann_sim.so")
        self._simulator.cann_sim_live_json.restype = ctypes.c_char_p
        self._simulator.cann_sim_violations.restype = ctypes.c_int64

    def do_faults(self, *, spec: str) -> None:
        """Replaces the faults; counting starts again."""
        self._simulator.cann_sim_set_faults(spec.encode())

    def do_release(self) -> None:
        """Ends what hangs."""
        self._simulator.cann_sim_release()

    def do_live(self) -> dict[str, int]:
        """Returns the numbers of live vendor objects."""
        live: dict[str, int] = json.loads(self._simulator.cann_sim_live_json())
        return live

    def do_violations(self) -> int:
        """Returns how often a rule was broken that real hardware leaves undefined."""
        return int(self._simulator.cann_sim_violations())

    def do_cycles(self, *, address: str, count: int, local: str, remote: str, channel: str = "main") -> None:
        """Connects, moves bytes both ways and disconnects, again and again, and keeps nothing of it."""
        opened, own = self._channels[channel], self._storage[local].region
        blocks = np.array([[0, 0, 4096], [8192, 65_536, 100]], dtype=np.int64)
        for _ in range(count):
            peer = opened.connect(address, timeout=10.0)
            ranges = kvlink.ranges(own, peer.wait_region(remote, timeout=5.0), blocks)
            for transfer in (peer.put(ranges), peer.get(ranges)):
                if not transfer.wait(10.0):
                    raise ConfigError("a transfer did not end within 10 s")
            peer.close()

    def do_call_acl(self, *, function: str, argument: int) -> int:
        """Calls an ACL function of one integer in a thread of this process, as a framework would."""
        return int(getattr(ctypes.CDLL("libascendcl.so"), function)(ctypes.c_int32(argument)))

    def do_register_address(self, *, name: str, address: int, nbytes: int, device: str, channel: str = "main") -> int:
        """Registers memory by its address; returns the handle."""
        region: Any = self._channels[channel].register((address, nbytes, device), name=name)
        return int(region.handle)

    def do_address_of(self, *, name: str) -> int:
        """Returns where a region starts."""
        return int(self._storage[name].region.address)


if __name__ == "__main__":
    raise SystemExit(serve(SimulatedAgent()))
