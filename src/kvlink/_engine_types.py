"""What the engine reports, as plain frozen values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag

import msgspec

from ._status import Status, status_error
from .errors import KvlinkError


class Capability(IntFlag):
    """``enum kvl_capability`` of provider.h."""

    PUT = 1
    GET = 2
    ACCEPTOR_SUBMIT = 4
    LATE_MEMORY = 8
    ALLOCATE = 16
    COPY = 32
    CANCEL = 64
    INTERRUPT = 128
    LINK_CHECK = 256
    STREAM = 512
    STATISTICS = 1024
    BUSY_POLL = 2048


@dataclass(frozen=True)
class Attributes:
    """What an open provider engine says about itself (``kvl_attr``). A limit of 0 means none; sizes are bytes.

    Attributes:
        connect_both: Both sides call connect (``KVL_CONNECT_BOTH``); otherwise only the initiator does.
        max_connects: Connects at once.
        max_links: Peers at once.
        capabilities: What it can do.
        memory_kinds: Bits ``1 << HOST`` and ``1 << DEVICE``.
        alignment: Offsets and lengths of ranges are multiples of this.
        memory_alignment: Address and length of registered memory are multiples of this.
        max_ranges: Ranges in one submit (the engine splits longer ones).
        max_range_bytes: Bytes in one range (the engine splits longer ones).
        max_describe: No endpoint blob is longer.
        max_export: No region blob is longer.
        exclusion_group: Empty, or the group of which one provider can be open in a process.
    """

    connect_both: bool
    max_connects: int
    max_links: int
    capabilities: Capability
    memory_kinds: int
    alignment: int
    memory_alignment: int
    max_ranges: int
    max_range_bytes: int
    max_describe: int
    max_export: int
    exclusion_group: str


@dataclass(frozen=True)
class EngineStatistics:
    """Counters of a channel since it was opened; ``peers`` and ``in_flight`` are of this moment."""

    peers: int
    in_flight: int
    submitted: int
    succeeded: int
    failed: int
    cancelled: int
    timed_out: int
    put_bytes: int
    get_bytes: int
    ranges_in: int
    ranges_out: int


class EngineResult(msgspec.Struct, frozen=True, gc=False):
    """How a transfer ended. A Struct: one is made for every transfer, and a dataclass costs five times as much.

    Attributes:
        status: A :class:`Status`; ``AGAIN`` while it is unfinished.
        path: Name of the slowest way that a part of it took.
        vendor_code: Raw code of the failed system or vendor call, or 0.
        nbytes: Bytes moved.
        ranges: Ranges after coalescing.
        duration: Seconds from submit to completion.
        site: The failed system or vendor call, or "".
        message: Why it failed, or "".
    """

    status: int
    path: str
    vendor_code: int
    nbytes: int
    ranges: int
    duration: float
    site: str
    message: str

    def error(self, operation: str, peer: str | None = None) -> KvlinkError | None:
        """Returns the exception of a failed transfer, or None when it succeeded."""
        if self.status == Status.OK:
            return None
        return status_error(
            self.status, self.message, operation, peer=peer, site=self.site, vendor_code=self.vendor_code
        )
