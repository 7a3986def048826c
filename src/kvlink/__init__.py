"""kvlink moves LLM KV-cache blocks between processes, hosts and accelerators.

::

    import kvlink

    with kvlink.open("host", secret=secret) as channel:
        region = channel.register(tensor, name="kv")
        peer = channel.connect("tcp://10.0.0.7:5000")
        blocks = [(0, 4096, 65536)]  # local offset, remote offset, length
        peer.get(kvlink.ranges(region, peer.regions["kv"], blocks)).wait()
"""

from __future__ import annotations

from ._engine import Attributes, Capability
from ._native import get_include
from ._pool import BufferPool, Lease, PoolStatistics
from ._ranges import RANGE, ranges
from .channel import Channel, open, open_from_config
from .config import ChannelConfig
from .errors import (
    AuthenticationError,
    BusyError,
    ChannelNotFoundError,
    ChannelUnavailableError,
    ClosedError,
    ConfigError,
    ConnectError,
    ConnectRefused,
    ConnectTimeout,
    DuplicateChannelError,
    EngineError,
    ForkedError,
    IdentityMismatch,
    KvlinkError,
    LeaseError,
    LinkError,
    PeerLost,
    PoolError,
    PoolTimeout,
    PoolTooSmall,
    RangeError,
    RegionRevoked,
    RequestError,
    RequestTimeout,
    StateError,
    TransferCancelled,
    TransferError,
    TransferTimeout,
    UnsupportedError,
    VersionMismatch,
)
from .peer import Peer, RemoteRegion
from .region import Region
from .registry import ChannelInfo, Option, ProbeResult, ProviderSpec, channels, probe
from .registry import kvlink_version as _kvlink_version
from .statistics import ChannelStatistics
from .transfer import Transfer, TransferResult

__version__ = _kvlink_version()

__all__ = [
    "RANGE",
    "Attributes",
    "AuthenticationError",
    "BufferPool",
    "BusyError",
    "Capability",
    "Channel",
    "ChannelConfig",
    "ChannelInfo",
    "ChannelNotFoundError",
    "ChannelStatistics",
    "ChannelUnavailableError",
    "ClosedError",
    "ConfigError",
    "ConnectError",
    "ConnectRefused",
    "ConnectTimeout",
    "DuplicateChannelError",
    "EngineError",
    "ForkedError",
    "IdentityMismatch",
    "KvlinkError",
    "Lease",
    "LeaseError",
    "LinkError",
    "Option",
    "Peer",
    "PeerLost",
    "PoolError",
    "PoolStatistics",
    "PoolTimeout",
    "PoolTooSmall",
    "ProbeResult",
    "ProviderSpec",
    "RangeError",
    "Region",
    "RegionRevoked",
    "RemoteRegion",
    "RequestError",
    "RequestTimeout",
    "StateError",
    "Transfer",
    "TransferCancelled",
    "TransferError",
    "TransferResult",
    "TransferTimeout",
    "UnsupportedError",
    "VersionMismatch",
    "channels",
    "get_include",
    "open",
    "open_from_config",
    "probe",
    "ranges",
]
