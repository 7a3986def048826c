"""Pages of one region, handed out as leases and taken back."""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from . import _forks
from .errors import ClosedError, ConfigError, LeaseError, PoolTimeout, PoolTooSmall


class SizedRegion(Protocol):
    """What a pool needs to know of a region."""

    @property
    def nbytes(self) -> int:
        """Its bytes."""


RegionT = TypeVar("RegionT", bound=SizedRegion)


@dataclass(frozen=True)
class PoolStatistics:
    """A pool at one moment.

    Attributes:
        page_bytes: Bytes of a page.
        pages_total: Pages that the pool has.
        pages_free: Pages that nobody holds.
        pages_leased: Pages in leases.
        waiters: Calls that wait for pages.
        high_water: The most pages that were leased at once.
        allocations: Leases given so far.
        timeouts: Calls that ended in PoolTimeout so far.
    """

    page_bytes: int
    pages_total: int
    pages_free: int
    pages_leased: int
    waiters: int
    high_water: int
    allocations: int
    timeouts: int


class Lease:
    """Pages of a pool, held until :meth:`release`. A context manager; thread-safe.

    Dropping a lease without releasing it keeps its pages out of the pool (a peer may still write to them) and warns.
    """

    __slots__ = ("_pages", "_pool", "_size")

    def __init__(self, pool: _Pages, pages: npt.NDArray[np.int64]) -> None:
        self._pool = pool
        self._pages: npt.NDArray[np.int64] | None = pages
        self._size = len(pages)

    @property
    def pages(self) -> npt.NDArray[np.int64]:
        """Page numbers, int64 of shape (n,), in no particular order; read-only.

        Raises:
            LeaseError: The lease was released.
        """
        pages = self._pages
        if pages is None:
            raise LeaseError("the lease was released before this use", requested=self._size, capacity=self._pool.total)
        return pages

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Offset of each page in the region, bytes, int64 of shape (n,).

        Raises:
            LeaseError: The lease was released.
        """
        return self.pages * self._pool.page_bytes

    @property
    def released(self) -> bool:
        """Whether the pages were given back."""
        return self._pages is None

    def release(self) -> None:
        """Gives the pages back; waiting calls get them in the order they came.

        Raises:
            LeaseError: The lease was released before.
            ForkedError: Called in a child process.
        """
        self._pool.give_back(self)

    def take(self) -> npt.NDArray[np.int64]:
        """Empties the lease; called by the pool under its lock."""
        pages = self.pages
        self._pages = None
        return pages

    def __len__(self) -> int:
        return self._size

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pages is not None:
            self.release()

    def __del__(self) -> None:
        pages = getattr(self, "_pages", None)
        if pages is not None and len(pages) and self._pool.leaks_matter():
            warnings.warn(
                f"a lease of {len(pages)} pages was dropped without release()",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )

    def __repr__(self) -> str:
        return f"<Lease of {self._size} pages{', released' if self._pages is None else ''}>"


class _Waiter:
    """One call that waits. The pool sets ``lease`` or ``error`` under its lock, once, then calls ``wake``."""

    __slots__ = ("error", "lease", "pool", "size")

    def __init__(self, pool: _Pages, size: int) -> None:
        self.pool = pool
        self.size = size
        self.lease: Lease | None = None
        self.error: ClosedError | None = None

    def wake(self) -> None:
        """Lets the waiting call go on; called without the lock."""
        raise NotImplementedError


class _ThreadWaiter(_Waiter):
    __slots__ = ("event",)

    def __init__(self, pool: _Pages, size: int) -> None:
        super().__init__(pool, size)
        self.event = threading.Event()

    def wake(self) -> None:
        self.event.set()


class _TaskWaiter(_Waiter):
    __slots__ = ("event", "loop")

    def __init__(self, pool: _Pages, size: int) -> None:
        super().__init__(pool, size)
        self.loop = asyncio.get_running_loop()
        self.event = asyncio.Event()

    def wake(self) -> None:
        try:
            self.loop.call_soon_threadsafe(self.event.set)
        except RuntimeError:  # that loop was closed while its call waited: nobody is left to use the pages
            self.pool.abandon(self)


WaiterT = TypeVar("WaiterT", bound=_Waiter)


class _Pages:
    """The book-keeping: a stack of free pages and a queue of waiters."""

    def __init__(self, total: int, page_bytes: int) -> None:
        self.total = total
        self.page_bytes = page_bytes
        self._generation = _forks.generation
        self._lock = threading.Lock()
        # A stack, so that warm pages are used again first; filled backwards, so that neighbours come out in rising
        # order and their ranges coalesce.
        self._free = np.arange(total - 1, -1, -1, dtype=np.int64)
        self._count = total
        self._waiters: deque[_Waiter] = deque()
        self._closed = False
        self._high_water = 0
        self._allocations = 0
        self._timeouts = 0

    def check(self, operation: str) -> None:
        """Refuses use in a child process."""
        if self._generation != _forks.generation:
            raise _forks.forked(operation)

    def leaks_matter(self) -> bool:
        """Whether a dropped lease is worth a warning."""
        return self._generation == _forks.generation and not self._closed

    def _grant(self, size: int) -> Lease:
        """Takes pages; the caller holds the lock and saw that they are there."""
        start = self._count - size
        pages = self._free[start : self._count][::-1].copy()
        pages.flags.writeable = False
        self._count = start
        self._allocations += 1
        self._high_water = max(self._high_water, self.total - start)
        return Lease(self, pages)

    def _put(self, lease: Lease) -> None:
        pages = lease.take()
        self._free[self._count : self._count + len(pages)] = pages[::-1]
        self._count += len(pages)

    def _serve(self) -> list[_Waiter]:
        """Serves waiters in order while the first fits; the caller wakes them after it let go of the lock."""
        served = []
        while self._waiters and self._waiters[0].size <= self._count:
            waiter = self._waiters.popleft()
            waiter.lease = self._grant(waiter.size)
            served.append(waiter)
        return served

    def _timeout_error(self, size: int, timeout: float | None) -> PoolTimeout:
        self._timeouts += 1
        waited = f"within {timeout:g} s" if timeout else "at once"
        queue = f", {len(self._waiters)} calls wait before" if self._waiters else ""
        return PoolTimeout(
            f"{size} pages were not free {waited}: {self._count} of {self.total} are{queue}",
            requested=size,
            capacity=self.total,
            hint="release leases, allow more time, or use a larger region",
        )

    def start(self, size: int, timeout: float | None, waiter_type: type[WaiterT]) -> Lease | WaiterT:
        """Gives a lease at once, or queues a waiter, or raises."""
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 0:
            raise ConfigError(f"n is {size!r}; expected a number of pages, 0 or more", operation="allocate")
        if timeout is not None and not timeout >= 0:
            raise ConfigError(f"timeout is {timeout!r}; expected seconds, 0 or more, or None", operation="allocate")
        self.check("allocate")
        size = int(size)
        with self._lock:
            if self._closed:
                raise ClosedError("the pool is closed", operation="allocate")
            if size > self.total:
                raise PoolTooSmall(
                    f"{size} pages can never fit: the pool has {self.total} pages of {self.page_bytes} bytes",
                    requested=size,
                    capacity=self.total,
                    hint="ask for less at once or make the region larger",
                )
            if not self._waiters and size <= self._count:
                return self._grant(size)
            if timeout == 0:
                raise self._timeout_error(size, timeout)
            waiter = waiter_type(self, size)
            self._waiters.append(waiter)
            return waiter

    def give_up(self, waiter: _Waiter, timeout: float | None) -> Lease:
        """Ends a wait whose deadline passed: the lease if it came after all, else PoolTimeout."""
        with self._lock:
            if waiter.lease is not None:
                return waiter.lease
            if waiter.error is not None:
                raise waiter.error
            self._waiters.remove(waiter)
            error = self._timeout_error(waiter.size, timeout)
            served = self._serve()  # those behind it may fit
        for other in served:
            other.wake()
        raise error

    def abandon(self, waiter: _Waiter) -> None:
        """Ends a wait because its caller goes away (Ctrl-C, a cancelled task)."""
        with self._lock:
            if waiter.lease is not None:
                if waiter.lease.released:
                    return
                self._put(waiter.lease)
            elif waiter.error is not None:
                return
            else:
                self._waiters.remove(waiter)
            served = self._serve()
        for other in served:
            other.wake()

    def give_back(self, lease: Lease) -> None:
        """Takes a lease back and serves who waits."""
        self.check("release")
        with self._lock:
            if lease.released:
                raise LeaseError("the lease was released before", requested=len(lease), capacity=self.total)
            self._put(lease)
            served = self._serve()
        for waiter in served:
            waiter.wake()

    def close(self) -> None:
        """Ends every wait with ClosedError."""
        if self._generation != _forks.generation:
            return
        with self._lock:
            self._closed = True
            ended = list(self._waiters)
            self._waiters.clear()
            for waiter in ended:
                waiter.error = ClosedError("the pool was closed while this call waited", operation="allocate")
        for waiter in ended:
            waiter.wake()

    def statistics(self) -> PoolStatistics:
        """Returns the counters."""
        self.check("statistics")
        with self._lock:
            return PoolStatistics(
                page_bytes=self.page_bytes,
                pages_total=self.total,
                pages_free=self._count,
                pages_leased=self.total - self._count,
                waiters=len(self._waiters),
                high_water=self._high_water,
                allocations=self._allocations,
                timeouts=self._timeouts,
            )


class BufferPool(Generic[RegionT]):
    """Hands out pages of one region. Thread-safe, and usable from asyncio; O(1) per page.

    Calls that wait are served strictly in the order they came: a large request is never starved by small ones, so a
    small one may have to wait although it would fit.

    Attributes:
        region: The region; the pool does not close it.
        page_bytes: Bytes of a page.
    """

    def __init__(self, region: RegionT, page_bytes: int) -> None:
        """Divides a region into pages.

        Args:
            region: Anything with ``nbytes``; a rest smaller than a page is not used.
            page_bytes: Bytes of a page.

        Raises:
            ConfigError: ``page_bytes`` is not positive.
            PoolTooSmall: Not one page fits.
        """
        if isinstance(page_bytes, bool) or not isinstance(page_bytes, (int, np.integer)) or page_bytes <= 0:
            raise ConfigError(f"page_bytes is {page_bytes!r}; expected a positive number of bytes", operation="pool")
        total = region.nbytes // int(page_bytes)
        if total == 0:
            raise PoolTooSmall(
                f"the region has {region.nbytes} bytes; not one page of {page_bytes} bytes fits",
                requested=1,
                capacity=0,
            )
        self.region = region
        self.page_bytes = int(page_bytes)
        self._pages = _Pages(total, self.page_bytes)

    @property
    def capacity(self) -> int:
        """Pages that the pool has."""
        return self._pages.total

    def allocate(self, n: int, *, timeout: float | None = 0.0) -> Lease:
        """Leases pages.

        Args:
            n: Pages; they need not be neighbours.
            timeout: Seconds to wait for them; 0 never waits, None waits until they come or the pool is closed.

        Returns:
            The lease; release it when nothing can read or write its pages any more.

        Raises:
            PoolTooSmall: More than the pool has; at once.
            PoolTimeout: Not free before the deadline, or others wait before.
            ClosedError: The pool is closed.
            ConfigError: ``n`` or ``timeout`` is negative or no number.
            ForkedError: Called in a child process.
        """
        started = self._pages.start(n, timeout, _ThreadWaiter)
        if isinstance(started, Lease):
            return started
        try:
            started.event.wait(None if timeout is None else min(timeout, threading.TIMEOUT_MAX))
        except BaseException:
            self._pages.abandon(started)
            raise
        return self._pages.give_up(started, timeout)

    async def allocate_async(self, n: int, *, timeout: float | None = 0.0) -> Lease:
        """Leases pages from a coroutine; as :meth:`allocate`. A cancelled call gives back what it got.

        Args:
            n: Pages.
            timeout: Seconds to wait for them; 0 never waits, None waits until they come or the pool is closed.

        Returns:
            The lease.

        Raises:
            PoolTooSmall: More than the pool has; at once.
            PoolTimeout: Not free before the deadline, or others wait before.
            ClosedError: The pool is closed.
            ConfigError: ``n`` or ``timeout`` is negative or no number.
            ForkedError: Called in a child process.
        """
        started = self._pages.start(n, timeout, _TaskWaiter)
        if isinstance(started, Lease):
            return started
        deadline = None if timeout is None else started.loop.call_later(timeout, started.event.set)
        try:
            await started.event.wait()
        except BaseException:
            self._pages.abandon(started)
            raise
        finally:
            if deadline is not None:
                deadline.cancel()
        return self._pages.give_up(started, timeout)

    def statistics(self) -> PoolStatistics:
        """Returns the pool's counters.

        Raises:
            ForkedError: Called in a child process.
        """
        return self._pages.statistics()

    def close(self) -> None:
        """Refuses further calls and ends those that wait with ClosedError. Leases can still be released. Idempotent."""
        self._pages.close()

    def __enter__(self) -> BufferPool[RegionT]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
