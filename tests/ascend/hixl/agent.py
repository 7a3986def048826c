"""The kit's agent with what only tests of HIXL need: memory made through ACL, and a look into the simulator."""

from __future__ import annotations

import ctypes
import gc
import json
from typing import Any

import kvlink
from kvlink import Channel, Region
from kvlink.testing import resources
from kvlink.testing.agent import Agent
from kvlink.testing.storage import DeviceStorage
from kvlink.testing.trials import MAIN
from kvlink.testing.wire import serve


class RegisteredDevice(DeviceStorage):
    """Device memory that somebody else allocated."""

    def __init__(self, channel: Channel, name: str, address: int, nbytes: int, device: str) -> None:
        self._memory = (address, nbytes, device)
        super().__init__(channel, name, nbytes, "rw")

    def _make(self, channel: Channel, access: str) -> Region:
        self._engine = channel._engine
        return channel.register(self._memory, name=self.name, access=access)


class HixlAgent(Agent):
    """Serves the further commands."""

    def do_register_device(self, *, name: str, nbytes: int, offset: int, device: str, channel: str = MAIN) -> int:
        """Registers device memory that a framework would have: it begins ``offset`` bytes behind a huge page's start.

        Returns:
            Its address.
        """
        acl = ctypes.CDLL("libascendcl.so")
        assert acl.aclrtSetDevice(ctypes.c_int32(int(device.partition(":")[2]))) == 0
        memory = ctypes.c_void_p()
        assert acl.aclrtMalloc(ctypes.byref(memory), ctypes.c_size_t(nbytes + offset), ctypes.c_int(1)) == 0
        assert memory.value is not None
        address = memory.value + offset
        self.do_register_address(name=name, address=address, nbytes=nbytes, device=device, channel=channel)
        return address

    def do_register_address(self, *, name: str, address: int, nbytes: int, device: str, channel: str = MAIN) -> None:
        """Registers memory by its address."""
        self._storage[name] = RegisteredDevice(self._channels[channel], name, address, nbytes, device)

    def do_live(self) -> dict[str, Any]:
        """Returns the simulator's live objects by name, and how many rules were broken."""
        gc.collect()
        simulator = ctypes.CDLL("libcann_sim.so")
        simulator.cann_sim_live_json.restype = ctypes.c_char_p
        simulator.cann_sim_violations.restype = ctypes.c_int64
        live = json.loads(simulator.cann_sim_live_json())
        return {
            "live": {name: count for name, count in live.items() if count},
            "violations": simulator.cann_sim_violations(),
        }

    def do_cycle(self, *, address: str, count: int) -> dict[str, int]:
        """Connects, moves a little both ways and disconnects, ``count`` times.

        Returns:
            What this process holds afterwards.
        """
        channel, region = self._channels[MAIN], self._storage["a"].region
        for _ in range(count):
            peer = channel.connect(address, timeout=10.0)
            ranges = kvlink.ranges(region, peer.regions["b"], [[0, 0, 4096]])
            peer.put(ranges).wait(timeout=10.0)
            peer.get(ranges).wait(timeout=10.0)
            peer.close()
        gc.collect()
        return resources.usage()


if __name__ == "__main__":
    raise SystemExit(serve(HixlAgent()))
