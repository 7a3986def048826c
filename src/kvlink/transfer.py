"""A submitted array of ranges: waitable from threads, awaitable from asyncio, ending exactly once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ._engine import EngineResult, EngineTransfer, Status
from .errors import ClosedError, KvlinkError, StateError

if TYPE_CHECKING:
    from .control.hub import Hub
    from .peer import Peer

_log = logging.getLogger("kvlink")


@dataclass(frozen=True)
class TransferResult:
    """How a transfer went that succeeded.

    Attributes:
        nbytes: Bytes moved.
        ranges: Ranges after neighbours were joined.
        path: The way taken, by the provider's name for it ("shm"); the slowest one when parts took several.
        duration_s: Seconds from the call to completion.
    """

    nbytes: int
    ranges: int
    path: str
    duration_s: float


class Transfer:
    """Work under way; made by ``Peer.put`` and ``Peer.get``. Thread-safe.

    It goes on when this object is dropped. Waiting uses no CPU, and the engine moves the bytes and keeps the deadline
    without needing a Python thread.
    """

    __slots__ = ("__weakref__", "_engine", "_hub", "_operation", "_peer", "reported")

    def __init__(self, engine: EngineTransfer, operation: str, peer: Peer, hub: Hub) -> None:
        self._engine = engine
        self._operation = operation
        self._peer = peer
        self._hub = hub
        self.reported = False

    @property
    def id(self) -> int:
        """A number that no other transfer of this channel has."""
        return self._engine.id

    def done(self) -> bool:
        """Return whether it has ended, well or not. Never blocks, never raises for a failed transfer.

        Raises:
            ForkedError: Called in a child process.
        """
        return self._engine.done()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for its end, with the GIL released.

        Args:
            timeout: Seconds to wait; None waits until it ends, which its own deadline bounds. Running out of it does
                not stop the transfer.

        Returns:
            True when it succeeded, False when it still runs after ``timeout``.

        Raises:
            TransferError: It failed; ``TransferTimeout``, ``TransferCancelled`` and ``RegionRevoked`` say how.
            PeerLost: The peer or the network went away.
            ClosedError: This side closed the peer or the channel.
            ForkedError: Called in a child process.
        """
        if not self._engine.wait(timeout):
            return False
        raw = self._engine.result()
        if raw.status != Status.OK:
            raise self._failure(raw)
        return True

    def result(self) -> TransferResult:
        """Return how it went.

        Raises:
            StateError: It still runs.
            KvlinkError: It failed, see ``wait``.
        """
        raw = self._engine.result()
        if raw.status != Status.OK:
            raise self._failure(raw)
        return TransferResult(raw.nbytes, raw.ranges, raw.path, raw.duration)

    def cancel(self) -> None:
        """Ask for its end. It ends once, with its true status: it may still succeed."""
        self._engine.cancel()

    def add_done_callback(self, function: Callable[[Transfer], object]) -> None:
        """Call ``function(transfer)`` once it has ended, on the channel's callback thread.

        Args:
            function: Called exactly once, soon when the transfer has ended already. What it raises is logged.
        """
        self._hub.reports.watch(self, lambda: self._hub.callback(lambda: function(self)))

    def __await__(self) -> Generator[Any, None, TransferResult]:
        """Wait without blocking the running loop; returns the result or raises the transfer's error.

        Cancelling the awaiting task does not cancel the transfer.
        """
        if not self._engine.done():
            loop = asyncio.get_running_loop()
            future: asyncio.Future[None] = loop.create_future()

            def wake() -> None:
                if not future.done():
                    future.set_result(None)

            def hook() -> None:
                try:
                    loop.call_soon_threadsafe(wake)
                except RuntimeError:
                    pass  # that loop has ended; nobody awaits any more

            self._hub.reports.watch(self, hook)
            yield from future
        return self.result()

    def __repr__(self) -> str:
        state = "ended" if self._engine.done() else "running"
        return f"<Transfer {self.id} {self._operation} {self._peer.address} {state}>"

    def request_report(self) -> None:
        """Have the engine report its end to the hub. Internal."""
        self._engine.notify()

    def notify_when_done(self, send: Callable[[], object]) -> None:
        """Call ``send`` on the control loop when it has succeeded, and only then. Internal."""

        def hook() -> None:
            if self._engine.result().status == Status.OK:
                send()

        self._hub.reports.watch(self, hook)

    def _failure(self, raw: EngineResult) -> KvlinkError:
        if raw.status == Status.AGAIN:
            return StateError("it still runs", operation=self._operation, hint="wait() or await it first")
        if raw.status in (Status.LINK_DOWN, Status.ENGINE_DOWN, Status.TIMEOUT):  # a deadline may have cost the link
            self._peer.suspect()
        ended = self._peer.error
        if raw.status in (Status.STATE, Status.CANCELLED, Status.LINK_DOWN) and isinstance(ended, ClosedError):
            return self._peer.failure(self._operation)
        error = raw.error(self._operation, self._peer.address)
        assert error is not None
        return error
