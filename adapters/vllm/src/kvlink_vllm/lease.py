"""The prefiller's leases: which finished requests' blocks are held, for whom, until when.

Every lease has a generation word in memory that peers can read. The word moves on *before* the blocks may be freed, so
a reader that finds the old value after its read knows that it read the blocks while they were still held.

The table is used by the engine's thread (``add``, ``collect``) and by the channel's callback threads (the rest).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

_REMEMBERED = 4096
"""Ended hand-offs of which a late decoder is told at once that they are over."""


@dataclass
class Lease:
    """One held hand-off.

    Attributes:
        id: The hand-off's id.
        request_id: The prefiller's own request.
        blocks: Block ids, int64.
        tokens: Tokens that are valid in the blocks.
        digest: Digest of the prompt.
        slot: Index of the generation word.
        generation: Value of the word while the lease stands.
        deadline: Monotonic time at which it ends.
        readers: Peers that claimed or renewed it and have not said done.
        refused: Peers that claimed it for another prompt: their renewals are those of a request that is refused.
    """

    id: str
    request_id: str
    blocks: npt.NDArray[np.int64]
    tokens: int
    digest: bytes
    slot: int
    generation: int
    deadline: float
    readers: set[Hashable] = field(default_factory=set)
    refused: set[Hashable] = field(default_factory=set)


@dataclass(frozen=True)
class Ended:
    """A lease that ended since the last ``collect``.

    Attributes:
        request_id: The request whose blocks may be freed now.
        expired: Whether time ended it rather than a reader.
    """

    request_id: str
    expired: bool


class LeaseTable:
    """Leases by hand-off id.

    Args:
        words: The generation words, uint64, one a slot; published for reading.
        lease: Seconds that a claim or a renewal gives.
        contact: Seconds until the first contact, and again after the last reader was lost.
        clock: Monotonic seconds; tests pass their own.
        on_end: Called once an ended lease can be collected.
    """

    def __init__(
        self,
        words: npt.NDArray[np.uint64],
        *,
        lease: float,
        contact: float,
        clock: Callable[[], float] = time.monotonic,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._words = words
        self._words[:] = 1
        self._free = list(range(len(words) - 1, -1, -1))
        self._lease = lease
        self._contact = min(contact, lease)
        self._clock = clock
        self._on_end = on_end
        self._lock = threading.Lock()
        self._leases: dict[str, Lease] = {}
        self._ended: list[Ended] = []
        self._past: dict[str, None] = {}
        self._closed = False

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def lease_seconds(self) -> float:
        """Seconds that a claim or a renewal gives."""
        return self._lease

    def add(self, handoff: str, request_id: str, blocks: Iterable[int], tokens: int, digest: bytes) -> bool:
        """Holds a finished request's blocks.

        Args:
            handoff: The hand-off's id.
            request_id: The request that must be reported when the lease ends.
            blocks: Its block ids.
            tokens: Tokens that are valid in them.
            digest: Digest of the prompt.

        Returns:
            False if no slot was free: then the request is reported as ended at the next ``collect``.
        """
        with self._lock:
            if self._closed or not self._free or handoff in self._leases:
                self._ended.append(Ended(request_id, expired=True))
                return False
            slot = self._free.pop()
            self._leases[handoff] = Lease(
                id=handoff,
                request_id=request_id,
                blocks=np.asarray(list(blocks), dtype=np.int64),
                tokens=tokens,
                digest=digest,
                slot=slot,
                generation=int(self._words[slot]),
                deadline=self._clock() + self._contact,
            )
            return True

    def claim(self, handoff: str, reader: Hashable, fits: Callable[[Lease], bool] = lambda lease: True) -> Lease | None:
        """Gives a reader a hold on a lease and the full lease time.

        Args:
            handoff: The hand-off's id.
            reader: Who claims it.
            fits: Whether it is what the reader needs. If not, the lease is not extended and the reader has no hold on
                it, not even one that a renewal gave it before it was known what it needs.

        Returns:
            The lease, whether it fits or not, or None if there is none (any more).
        """
        with self._lock:
            lease = self._standing(handoff)
            if lease is None:
                return None
            if fits(lease):
                lease.refused.discard(reader)
                self._hold(lease, reader)
            else:
                lease.refused.add(reader)
                self._let_go(lease, reader)
            return lease

    def get(self, handoff: str) -> Lease | None:
        """Returns the lease without touching it, or None."""
        with self._lock:
            return self._leases.get(handoff)

    def is_past(self, handoff: str) -> bool:
        """Tells whether a hand-off was here and has ended, as far as that is remembered."""
        return handoff in self._past

    def renew(self, handoffs: Iterable[str], reader: Hashable) -> None:
        """Extends leases; unknown ids are ignored, for they ended meanwhile.

        Args:
            handoffs: Ids.
            reader: Who asks; it holds the lease from now on.
        """
        with self._lock:
            for handoff in handoffs:
                lease = self._standing(handoff)
                if lease is not None and reader not in lease.refused:
                    self._hold(lease, reader)

    def done(self, handoffs: Iterable[str], reader: Hashable) -> None:
        """Ends a reader's hold; the last reader's word ends the lease, the word of a peer without a hold nothing.

        Args:
            handoffs: Ids.
            reader: Who is done.
        """
        with self._lock:
            for handoff in handoffs:
                lease = self._leases.get(handoff)
                if lease is None or reader not in lease.readers:
                    continue
                lease.readers.discard(reader)
                if not lease.readers:
                    self._end(lease, expired=False)

    def lost(self, reader: Hashable) -> None:
        """Ends a lost peer's holds; its leases fall back to the contact time, for another decoder may be sent.

        Args:
            reader: The peer that is gone.
        """
        with self._lock:
            for lease in self._leases.values():
                self._let_go(lease, reader)

    def collect(self) -> list[Ended]:
        """Ends what has run out and returns all that ended since the last call, each once."""
        if not self._leases and not self._ended:
            return []
        with self._lock:
            now = self._clock()
            for lease in [lease for lease in self._leases.values() if lease.deadline <= now]:
                self._end(lease, expired=True)
            ended, self._ended = self._ended, []
            return ended

    def close(self) -> None:
        """Ends every lease: a reader that comes later finds a new generation."""
        with self._lock:
            self._closed = True
            for lease in list(self._leases.values()):
                self._end(lease, expired=True)

    def snapshot(self) -> dict[str, Any]:
        """Returns counts for statistics: leases held and blocks held."""
        with self._lock:
            return {"leases": len(self._leases), "blocks": sum(len(lease.blocks) for lease in self._leases.values())}

    # With the lock held

    def _standing(self, handoff: str) -> Lease | None:
        """Returns the lease; one that ran out is ended first."""
        lease = self._leases.get(handoff)
        if lease is not None and lease.deadline <= self._clock():
            self._end(lease, expired=True)
            return None
        return lease

    def _hold(self, lease: Lease, reader: Hashable) -> None:
        lease.readers.add(reader)
        lease.deadline = self._clock() + self._lease

    def _let_go(self, lease: Lease, reader: Hashable) -> None:
        """Ends a hold without ending the lease: another decoder may be sent, for which the contact time is left."""
        if reader in lease.readers:
            lease.readers.discard(reader)
            if not lease.readers:
                lease.deadline = min(lease.deadline, self._clock() + self._contact)

    def _end(self, lease: Lease, *, expired: bool) -> None:
        # The word moves first: whoever sees the request among the ended may free its blocks at once.
        self._words[lease.slot] += np.uint64(1)
        del self._leases[lease.id]
        self._past[lease.id] = None
        if len(self._past) > _REMEMBERED:
            del self._past[next(iter(self._past))]
        self._free.append(lease.slot)
        self._ended.append(Ended(lease.request_id, expired))
        self._on_end()
