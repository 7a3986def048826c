"""What a channel counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ChannelStatistics:
    """Counters of a channel since it was opened; ``peers``, ``regions`` and ``in_flight`` are of this moment.

    Attributes:
        peers: Connected peers.
        regions: Registered regions.
        in_flight: Transfers under way.
        submitted: Transfers started.
        succeeded: Transfers that succeeded.
        failed: Transfers that failed otherwise than by cancel or deadline.
        cancelled: Transfers stopped on request.
        timed_out: Transfers whose deadline passed.
        put_bytes: Bytes of puts that succeeded.
        get_bytes: Bytes of gets that succeeded.
        ranges_in: Ranges given.
        ranges_out: Ranges after neighbours were joined.
        refused: Connections from outside that ended with an error before a link was open.
        last_refusal: Why the latest of them did, or "".
        dropped_notifications: Notifications that came while no ``on_notify`` was set.
        held_bytes: Bytes of closed regions kept because a stopped peer may still write into them.
        provider: The provider's own counters.
    """

    peers: int
    regions: int
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
    refused: int
    last_refusal: str
    dropped_notifications: int
    held_bytes: int
    provider: Mapping[str, int]
