"""The buffers of a measurement: of the kind that the path moves, touched before use."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..channel import Channel
from ..region import Region
from ._limits import Memory

# The name of the target's region.
REGION = "bench"


@dataclass
class Buffer:
    """A registered buffer.

    Attributes:
        region: Its region.
        memory: Where it lies.
    """

    region: Region
    memory: Memory


def make_buffer(channel: Channel, path: str, nbytes: int, name: str) -> Buffer:
    """Makes and registers a zeroed buffer whose every page was touched.

    Args:
        channel: Where to register it.
        path: "shm" takes the channel's own shared memory, the others plain memory of this process.
        nbytes: Its size.
        name: Of the region.

    Returns:
        The buffer.

    Raises:
        KvlinkError: The channel refused it.
    """
    if path == "shm":
        region = channel.allocate(nbytes, name=name)
    else:
        region = channel.register(np.empty(nbytes, dtype=np.uint8), name=name)
    np.frombuffer(region.buffer(), dtype=np.uint8)[:] = 0
    return Buffer(region, Memory(region.address, nbytes))
