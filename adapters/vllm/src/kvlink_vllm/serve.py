"""The prefiller's worker: answers decoders' questions about hand-offs. Runs on the channel's callback threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from kvlink_vllm import wire
from kvlink_vllm.layout import CacheLayout, checksum
from kvlink_vllm.lease import Lease, LeaseTable
from kvlink_vllm.log import get_logger
from kvlink_vllm.metadata import Hold

logger = get_logger()

_MAX_WAITERS = 1024


class Server:
    """Serves one worker's hand-offs.

    Args:
        table: The leases.
        layout: This worker's caches.
        leases_region: Name of the region with the generation words.
        handoff_wait: Seconds that a decoder which came too early is remembered.
        verify: Whether checksums may be asked for.
        defer: Runs a function on a background thread.
    """

    def __init__(
        self,
        table: LeaseTable,
        layout: CacheLayout,
        leases_region: str,
        *,
        handoff_wait: float,
        verify: bool,
        defer: Callable[[Callable[[], None]], None],
    ) -> None:
        self._table = table
        self._layout = layout
        self._leases_region = leases_region
        self._handoff_wait = handoff_wait
        self._verify = verify
        self._defer = defer
        self._lock = threading.Lock()
        self._waiters: dict[str, list[tuple[float, Any]]] = {}

    def hold(self, hold: Hold) -> None:
        """Takes a new hand-off from the engine and tells decoders that asked for it too early.

        Args:
            hold: The hand-off.
        """
        self._table.add(hold.handoff, hold.request_id, hold.blocks, hold.tokens, hold.digest)
        with self._lock:  # always: a decoder may be between its look into the table and its place among the waiters
            waiters = self._waiters.pop(hold.handoff, [])
        for _, peer in waiters:
            self._defer(lambda peer=peer: _tell(peer, wire.Ready(hold.handoff)))  # type: ignore[misc]

    def on_request(self, peer: Any, message: bytes) -> bytes:
        """Answers one question.

        Args:
            peer: Who asks.
            message: A message of ``wire``.

        Returns:
            The encoded reply.
        """
        request = wire.decode_request(message)
        if isinstance(request, wire.Layout):
            reply = wire.LayoutReply(
                self._layout.wire(), self._layout.blocks, self._leases_region, self._table.lease_seconds
            )
            return wire.encode(reply)
        if isinstance(request, wire.Claim):
            return wire.encode(self._claim(peer, request))
        return wire.encode(self._checksum(request))

    def on_notify(self, peer: Any, notice: wire.Notice) -> None:
        """Takes a renewal or an end.

        Args:
            peer: Who tells.
            notice: The message.
        """
        if isinstance(notice, wire.Renew):
            self._table.renew(notice.ids, peer)
        elif isinstance(notice, wire.Done):
            self._table.done(notice.ids, peer)

    def on_peer_lost(self, peer: Any) -> None:
        """Ends a lost decoder's holds.

        Args:
            peer: Who is gone.
        """
        self._table.lost(peer)

    def _claim(self, peer: Any, claim: wire.Claim) -> wire.ClaimReply:
        # What does not fit must not extend the lease, so it is compared before the claim takes effect.
        lease = self._table.claim(claim.id, peer, lambda lease: not _mismatch(lease, claim))
        if lease is None and self._table.is_past(claim.id):
            return wire.ClaimReply(wire.UNKNOWN, "the hand-off has ended: read before, released, or its lease ran out")
        if lease is None:
            return self._wait_for(peer, claim.id)
        mismatch = _mismatch(lease, claim)
        if mismatch:
            return wire.ClaimReply(wire.MISMATCH, mismatch)
        return wire.ClaimReply(
            wire.OK,
            blocks=lease.blocks.astype("<i8").tobytes(),
            tokens=lease.tokens,
            slot=lease.slot,
            generation=lease.generation,
        )

    def _wait_for(self, peer: Any, handoff: str) -> wire.ClaimReply:
        """Remembers a decoder that came before the engine's step told this worker about the hand-off."""
        now = time.monotonic()
        with self._lock:
            for key in [key for key, waiters in self._waiters.items() if waiters[-1][0] <= now]:
                del self._waiters[key]
            waiting = sum(map(len, self._waiters.values()))
            # Looked up again under the lock: `hold` adds to the table before it takes the waiters.
            if waiting < _MAX_WAITERS and self._table.get(handoff) is None:
                self._waiters.setdefault(handoff, []).append((now + self._handoff_wait, peer))
        return wire.ClaimReply(wire.PENDING, "the prefiller does not know this hand-off")

    def _checksum(self, request: wire.Checksum) -> wire.ChecksumReply:
        lease = self._table.get(request.id)
        if not self._verify or lease is None or request.first < 0 or request.count < 0:
            return wire.ChecksumReply(wire.UNKNOWN)
        blocks = lease.blocks[request.first : request.first + request.count]
        return wire.ChecksumReply(wire.OK, checksum(self._layout, blocks))


def _mismatch(lease: Lease, claim: wire.Claim) -> str:
    """Says why a claim is not for this hand-off; empty if it is."""
    if lease.digest != claim.digest:
        return "the hand-off belongs to another prompt (or another LoRA adapter)"
    if claim.tokens > lease.tokens:
        return f"the decoder needs {claim.tokens} tokens, the hand-off has {lease.tokens}"
    return ""


def _tell(peer: Any, message: Any) -> None:
    try:
        peer.notify(wire.encode(message))
    except Exception as error:
        logger.debug("kvlink: peer %s was not told: %s", getattr(peer, "address", peer), error)
