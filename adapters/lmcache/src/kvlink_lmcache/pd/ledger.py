"""The decoder's books: which chunks of which hand-off stand where, who waits for room, and what has to go when.

A hand-off is one request of one prefiller. It reserves room for all its chunks before the first one comes, so that many
requests that come in parts cannot fill the buffer with parts only. Each hand-off has pages of its own, also where two
bring the same key, so none can be hurt by the other's end.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..buffer import PDBuffer

HandOffId = tuple[str, str]
"""Peer id, and the request's id as the proxy gave it."""


@dataclass(eq=False)
class Entry:
    """One chunk.

    Attributes:
        key: LMCache's key.
        owner: Its hand-off.
        tokens: Its tokens.
        item: LMCache's memory object, None while the chunk is still at the prefiller (delayed pull).
        page: Its page at the prefiller (pull modes), else -1.
        batch: Number of its batch.
        taken_at: When the engine took it, 0.0 before.
    """

    key: Any
    owner: HandOff
    tokens: int
    item: Any = None
    page: int = -1
    batch: int = 0
    taken_at: float = 0.0


@dataclass(eq=False)
class Batch:
    """Chunks that come in one transfer.

    Attributes:
        entries: Its chunks.
        visible: Written, so lookups find them.
        until: When the last byte may be written, at the latest.
    """

    entries: list[Entry]
    visible: bool = False
    until: float = 0.0


@dataclass(eq=False)
class HandOff:
    """One request of one prefiller.

    Attributes:
        id: Whose and which.
        reserved: Pages promised and not yet taken.
        total: Chunks in all, 0 when not known.
        shown: Chunks shown to lookups so far.
        batches: By number.
        keys: Its entries by key.
        complete: All chunks are here.
        over: It was given up; what is still being written goes at its ``until``.
        touched: When something last happened.
    """

    id: HandOffId
    reserved: int
    total: int = 0
    shown: int = 0
    batches: dict[int, Batch] = field(default_factory=dict)
    keys: dict[Any, Entry] = field(default_factory=dict)
    complete: bool = False
    over: bool = False
    touched: float = field(default_factory=time.monotonic)


@dataclass
class _Waiting:
    pages: int
    total: int
    deadline: float


class NoRoom(Exception):
    """It never fits."""


class Ledger:
    """All hand-offs of one decoder rank. Thread-safe; never blocks.

    Attributes:
        buffer: The pages.
        on_go: Called with a hand-off's id when room was reserved for it after it had to wait.
    """

    def __init__(
        self,
        buffer: PDBuffer,
        *,
        alloc_timeout: float,
        idle_timeout: float,
        pending_ttl: float,
        write_timeout: float,
        extra_references: int,
        on_go: Callable[[HandOffId], object],
    ) -> None:
        """Opens empty books.

        Args:
            buffer: The pages.
            alloc_timeout: Seconds after which a hand-off that waits is forgotten.
            idle_timeout: Seconds after which one is given up that does not go on.
            pending_ttl: Seconds after which complete chunks go that nobody took.
            write_timeout: Seconds for which a batch's pages may be written.
            extra_references: References that LMCache's engine drops by itself for each chunk it took.
            on_go: See the class; called without the lock.
        """
        self.buffer = buffer
        self.on_go = on_go
        self._alloc_timeout = alloc_timeout
        self._idle_timeout = idle_timeout
        self._pending_ttl = pending_ttl
        self._write_timeout = write_timeout
        self._extra = extra_references
        self._lock = threading.RLock()
        self._handoffs: dict[HandOffId, HandOff] = {}
        self._visible: dict[Any, deque[Entry]] = {}
        self._waiting: OrderedDict[HandOffId, _Waiting] = OrderedDict()

    # ---- room ----

    def reserve(self, owner: HandOffId, total: int, pages: int) -> bool:
        """Promises room for a hand-off, once.

        Args:
            owner: Its id.
            total: Chunks of the whole hand-off, 0 when not known.
            pages: Chunks of this batch.

        Returns:
            False when it has to wait; ``on_go`` says when to ask again.

        Raises:
            NoRoom: It never fits.
        """
        need = max(total, pages)
        now = time.monotonic()
        with self._lock:
            handoff = self._handoffs.get(owner)
            if handoff is not None and not handoff.over:
                handoff.touched = now
                if total or handoff.reserved >= pages:
                    return True  # promised with its first batch
            if need > self.buffer.total:
                raise NoRoom(
                    f"{need} chunks of {self.buffer.page_bytes} bytes ({need * self.buffer.page_bytes} bytes) can "
                    f"never fit the decoder's PD buffer of {self.buffer.total} chunks "
                    f"({self.buffer.total * self.buffer.page_bytes} bytes): raise its pd_buffer_size"
                )
            self._waiting.setdefault(owner, _Waiting(need, total, now + self._alloc_timeout))
            return next(iter(self._waiting)) == owner and self._serve_first()

    def _serve_first(self) -> bool:
        """Gives room to the first who waits, if there is enough. The caller holds the lock."""
        owner, waiting = next(iter(self._waiting.items()))
        handoff = self._handoffs.get(owner)
        if (handoff is not None and handoff.over) or waiting.pages > self._available():
            return False
        del self._waiting[owner]
        if handoff is None:
            handoff = self._handoffs[owner] = HandOff(owner, 0, waiting.total)
        handoff.reserved += waiting.pages
        return True

    def _available(self) -> int:
        return self.buffer.free_pages - sum(handoff.reserved for handoff in self._handoffs.values())

    def room_came(self) -> None:
        """Gives room to those who wait, in their order."""
        going: list[HandOffId] = []
        with self._lock:
            while self._waiting:
                owner = next(iter(self._waiting))
                if not self._serve_first():
                    break
                going.append(owner)
        for owner in going:
            self.on_go(owner)

    # ---- chunks come ----

    def grant(self, owner: HandOffId, number: int, keys: Sequence[Any], tokens: Sequence[int]) -> list[int]:
        """Takes pages for a batch from what was reserved.

        Args:
            owner: The hand-off, which has room reserved.
            number: The batch.
            keys: Its keys.
            tokens: Tokens of each chunk.

        Returns:
            A page for each, -1 for one that this hand-off has brought before.

        Raises:
            NoRoom: More chunks than reserved, or the hand-off is gone.
        """
        now = time.monotonic()
        with self._lock:
            handoff = self._handoffs.get(owner)
            if handoff is None or handoff.over:
                raise NoRoom("the hand-off was given up before")
            handoff.touched = now
            if number in handoff.batches:
                raise NoRoom(f"batch {number} came twice")
            fresh = [index for index, key in enumerate(keys) if key not in handoff.keys]
            if len(fresh) > handoff.reserved:
                raise NoRoom(f"{len(fresh)} more chunks came than the {handoff.reserved} that were still reserved")
            items = self.buffer.take([tokens[index] for index in fresh])
            if items is None:
                raise NoRoom(f"{len(fresh)} reserved pages were not free")
            handoff.reserved -= len(fresh)
            pages = [-1] * len(keys)
            batch = Batch([], until=now + self._write_timeout)
            for index, item in zip(fresh, items, strict=True):
                entry = Entry(keys[index], handoff, tokens[index], item, batch=number)
                batch.entries.append(entry)
                handoff.keys[entry.key] = entry
                pages[index] = int(item.meta.address)
            handoff.batches[number] = batch
            return pages

    def entries(self, owner: HandOffId, number: int) -> list[Entry]:
        """Returns the chunks of a batch, empty when it is gone."""
        with self._lock:
            handoff = self._handoffs.get(owner)
            batch = handoff.batches.get(number) if handoff is not None and not handoff.over else None
            return list(batch.entries) if batch is not None else []

    def offered(
        self,
        owner: HandOffId,
        number: int,
        keys: Sequence[Any],
        tokens: Sequence[int],
        pages: Sequence[int],
        complete: bool,
    ) -> None:
        """Notes chunks that stay at the prefiller until the engine wants them (delayed pull).

        Args:
            owner: The hand-off.
            number: The batch.
            keys: LMCache's keys.
            tokens: Tokens of each chunk.
            pages: Page of each at the prefiller.
            complete: No further batch will follow.
        """
        with self._lock:
            handoff = self._handoffs.get(owner)
            if handoff is None or handoff.over:
                handoff = self._handoffs[owner] = HandOff(owner, 0)
            batch = Batch([])
            for key, count, page in zip(keys, tokens, pages, strict=True):
                if key not in handoff.keys:
                    entry = handoff.keys[key] = Entry(key, handoff, count, None, page, number)
                    batch.entries.append(entry)
            handoff.batches[number] = batch
        self.commit(owner, number, complete)

    def commit(self, owner: HandOffId, number: int, complete: bool) -> bool:
        """Shows a batch to lookups.

        Args:
            owner: The hand-off.
            number: The batch.
            complete: It was the last one.

        Returns:
            False when the hand-off or batch is gone.
        """
        with self._lock:
            handoff = self._handoffs.get(owner)
            batch = handoff.batches.get(number) if handoff is not None and not handoff.over else None
            if handoff is None or batch is None:
                return False
            handoff.touched = time.monotonic()
            if not batch.visible:
                batch.visible = True
                handoff.shown += len(batch.entries)
                for entry in batch.entries:
                    self._visible.setdefault(entry.key, deque()).append(entry)
            if complete or (handoff.total and handoff.shown >= handoff.total):
                handoff.complete = True
                handoff.reserved = 0
            return True

    # ---- chunks go ----

    def contains(self, key: Any) -> bool:
        """Returns whether a chunk of that key is here and nobody's."""
        with self._lock:
            return any(not entry.taken_at for entry in self._visible.get(key, ()))

    def take(self, key: Any) -> Entry | None:
        """Hands out a chunk, which the engine will remove; None when there is none."""
        with self._lock:
            for entry in self._visible.get(key, ()):
                if not entry.taken_at:
                    entry.taken_at = entry.owner.touched = time.monotonic()
                    if entry.item is not None:
                        self._count_up(entry)
                    return entry
            return None

    def fill(self, entry: Entry, item: Any) -> None:
        """Puts the memory object of a chunk that was read from the prefiller."""
        with self._lock:
            entry.item = item
            self._count_up(entry)

    def _count_up(self, entry: Entry) -> None:
        for _ in range(self._extra):
            entry.item.ref_count_up()

    def put_back(self, entry: Entry) -> None:
        """Takes back a chunk that was handed out and not used."""
        with self._lock:
            if entry.item is not None:
                for _ in range(self._extra):
                    entry.item.ref_count_down()
            entry.taken_at = 0.0

    def remove(self, key: Any) -> bool:
        """Frees the chunk that was handed out under a key, else the oldest; with a hand-off's last one all the rest.

        What is left then are leading chunks that the engine had in its own cache; nobody will ask for them.
        """
        with self._lock:
            entries = self._visible.get(key)
            if not entries:
                return False
            entry = next((entry for entry in entries if entry.taken_at), entries[0])
            handoff = entry.owner
            last = handoff.complete and next(reversed(handoff.keys), None) == key
            self._free(entry)
            if last:
                for other in [other for other in handoff.keys.values() if not other.taken_at]:
                    self._free(other)
            if handoff.complete and not handoff.keys:
                self._handoffs.pop(handoff.id, None)
            return True

    def drop(self, owner: HandOffId) -> None:
        """Gives up a hand-off: what is here goes now, what may still be written goes when that has ended."""
        with self._lock:
            self._waiting.pop(owner, None)
            handoff = self._handoffs.get(owner)
            if handoff is not None:
                self._give_up(handoff, time.monotonic())
        self.room_came()

    def drop_batch(self, owner: HandOffId, number: int) -> None:
        """Frees a batch that nothing is written to any more and that was never shown."""
        with self._lock:
            handoff = self._handoffs.get(owner)
            batch = handoff.batches.get(number) if handoff is not None else None
            if batch is not None:
                batch.until = 0.0

    def peer_lost(self, peer: str) -> None:
        """Gives up what a lost prefiller had not completed, and what still stands there."""
        now = time.monotonic()
        with self._lock:
            for owner in [owner for owner in self._waiting if owner[0] == peer]:
                del self._waiting[owner]
            for handoff in [handoff for handoff in self._handoffs.values() if handoff.id[0] == peer]:
                remote = any(entry.item is None for entry in handoff.keys.values())
                if not handoff.complete or remote:
                    self._give_up(handoff, now)
        self.room_came()

    def _give_up(self, handoff: HandOff, now: float) -> None:
        """The caller holds the lock."""
        handoff.over = True
        handoff.reserved = 0
        for batch in list(handoff.batches.values()):
            if batch.visible or batch.until <= now:
                for entry in batch.entries:
                    if not entry.taken_at and entry.key in handoff.keys:
                        self._free(entry)
        if not handoff.keys:
            self._handoffs.pop(handoff.id, None)

    def _free(self, entry: Entry) -> None:
        """The caller holds the lock."""
        entry.owner.keys.pop(entry.key, None)
        entries = self._visible.get(entry.key)
        if entries is not None:
            if entry in entries:
                entries.remove(entry)
            if not entries:
                del self._visible[entry.key]
        if entry.item is not None:
            entry.item.ref_count_down()
            entry.item = None

    # ---- time ----

    def sweep(self) -> bool:
        """Does what is due.

        Returns:
            Whether anything is left that will become due.
        """
        now = time.monotonic()
        with self._lock:
            for owner in [owner for owner, waiting in self._waiting.items() if waiting.deadline <= now]:
                del self._waiting[owner]
            for handoff in list(self._handoffs.values()):
                self._sweep_taken(handoff, now)
                limit = self._pending_ttl if handoff.complete else self._idle_timeout
                if handoff.over or handoff.touched + limit <= now:
                    self._give_up(handoff, now)
            left = bool(self._handoffs or self._waiting)
        self.room_came()
        return left

    def _sweep_taken(self, handoff: HandOff, now: float) -> None:
        """A chunk that the engine took and never removed: its step failed. The caller holds the lock."""
        for entry in [entry for entry in handoff.keys.values() if entry.taken_at]:
            if entry.taken_at + self._idle_timeout <= now:
                if entry.item is not None:
                    for _ in range(self._extra):
                        entry.item.ref_count_down()
                self._free(entry)

    def held(self) -> dict[str, int]:
        """Returns pages free, reserved and taken, hand-offs and who waits."""
        with self._lock:
            return {
                "free": self.buffer.free_pages,
                "reserved": sum(handoff.reserved for handoff in self._handoffs.values()),
                "entries": sum(len(handoff.keys) for handoff in self._handoffs.values()),
                "handoffs": len(self._handoffs),
                "waiting": len(self._waiting),
            }
