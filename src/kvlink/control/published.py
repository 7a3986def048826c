"""The regions that a channel publishes, and their revocation."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvlink.control import messages as m

if TYPE_CHECKING:
    from kvlink.control.hub import Hub
    from kvlink.control.linkup import LinkAttempt
    from kvlink.control.session import Session


@dataclass(frozen=True)
class Holder:
    """A peer that may still write into withdrawn memory.

    Attributes:
        address: The peer.
        freed: Returns once it no longer can.
    """

    address: str
    freed: Callable[[], Awaitable[object]]


class Published:
    """Lives on the control loop's thread, ``hold`` excepted.

    Attributes:
        regions: What is published now, by handle.
        held_bytes: Bytes of closed regions that are kept for a holder.
    """

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self.regions: dict[int, m.RegionInfo] = {}
        self.held_bytes = 0
        self._lock = threading.Lock()

    def add(self, info: m.RegionInfo) -> None:
        """Publish a region to all peers, now and later."""
        self.regions[info.handle] = info
        for session in self._hub.sessions.values():
            session.publish(info)

    def greet(self, session: Session) -> None:
        """A link has opened: tell what has changed since its setup named the regions."""
        for info in self.regions.values():
            session.publish(info)
        for handle in session.published - self.regions.keys():
            self._hub.spawn(session.withdraw(handle, self._hub.limits.link_grace))

    async def withdraw(self, handle: int, timeout: float) -> list[Holder]:
        """Withdraw a region from every peer, those that are being connected included.

        Returns:
            Peers that may still write into it: processes of this host that neither answer nor are dead.
        """
        self.regions.pop(handle, None)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        pending = [attempt for attempt in self._hub.attempts if attempt.publishes(handle)]
        while any(not attempt.settled for attempt in pending) and (left := deadline - loop.time()) > 0:
            await self._hub.changed(left)
        holders = [self._attempt_holder(attempt, handle) for attempt in pending if not attempt.settled]
        sessions = [*self._hub.sessions.values(), *self._hub.lingering]
        left = max(deadline - loop.time(), 0.05)
        released = await asyncio.gather(*(session.withdraw(handle, left) for session in sessions))
        for session, free in zip(sessions, released, strict=True):
            if not free:
                holders.append(Holder(session.peer.address, session.gone.wait))
        return holders

    def _attempt_holder(self, attempt: LinkAttempt, handle: int) -> Holder:
        async def freed() -> None:
            while not attempt.settled:
                await self._hub.changed(60.0)
            session = attempt.result
            if session is not None and not await session.withdraw(handle, self._hub.limits.link_grace):
                await session.gone.wait()

        return Holder(attempt.address, freed)

    def hold(self, nbytes: int, holders: list[Holder], release: Callable[[], None]) -> None:
        """Keep closed memory until no holder can write into it, then call ``release``; any thread."""

        async def watch() -> None:
            for holder in holders:
                await holder.freed()
            release()
            self._count_held(-nbytes)

        self._count_held(nbytes)
        self._hub.call(lambda: self._hub.spawn(watch()))

    def _count_held(self, change: int) -> None:
        with self._lock:
            self.held_bytes += change
