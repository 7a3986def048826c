"""The control listener: takes connections, introduces them, and is unharmed by whatever they send."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from kvlink.control import handshake, sockets
from kvlink.control.addresses import Address
from kvlink.control.handshake import Introduced
from kvlink.errors import AuthenticationError, ConnectError, ConnectTimeout, KvlinkError

if TYPE_CHECKING:
    from kvlink.control.hub import Hub

#: How long to leave the backlog alone when the process is out of descriptors.
SHORTAGE_PAUSE = 0.5
WARNING_INTERVAL = 5.0
#: How long a stranger may hold its place, in seconds, while others wait for one.
PATIENCE = 3.0


class Listener:
    """Accepts on one socket until it is closed.

    Args:
        hub: The channel's control plane.
        sock: A listening socket; owned from now on.
        serve: What to do with an introduced connection.

    Attributes:
        refused: How many connections ended before a link was open, with an error.
        refusals: The latest of these errors.
    """

    def __init__(self, hub: Hub, sock: socket.socket, serve: Callable[[Introduced], Awaitable[object]]) -> None:
        self._hub = hub
        self._sock = sock
        self._serve = serve
        self._greeting = 0
        self._strangers: dict[asyncio.Task[None], float] = {}  # oldest first; when each came
        self._introduced = 0
        self._task: asyncio.Task[None] | None = None
        self._quiet_until = 0.0
        self.refused = 0
        self.refusals: deque[KvlinkError] = deque(maxlen=16)

    def start(self) -> None:
        """Begin to accept; on the loop's thread."""
        self._task = self._hub.spawn(self._accept())

    async def close(self) -> None:
        """Stop accepting and close the socket."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        self._sock.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(self._sock)
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._hub.log.warning("%s: cannot accept a connection: %s", self._hub.name, error)
                    await asyncio.sleep(SHORTAGE_PAUSE)
                elif error.errno == errno.EBADF:
                    return
                continue  # else that one connection broke before it was taken
            if self._greeting >= self._hub.limits.max_handshakes and not self._make_room():
                sock.close()  # the initiator tries again
                continue
            self._greeting += 1
            self._strangers[self._hub.spawn(self._take(sock))] = self._hub.time()

    def _make_room(self) -> bool:
        """Drop the stranger that has held its place longest, if that is long: idle ones must not keep others out."""
        oldest = next(iter(self._strangers), None)
        if oldest is None or self._hub.time() - self._strangers[oldest] < PATIENCE:
            return False
        del self._strangers[oldest]
        oldest.cancel()
        return True

    def _met(self) -> None:
        """The current task's connection is no stranger any more."""
        self._greeting -= 1
        task = asyncio.current_task()
        if task is not None:
            self._strangers.pop(task, None)

    async def _take(self, sock: socket.socket) -> None:
        peer = "unknown"
        writer: asyncio.StreamWriter | None = None
        intro: Introduced | None = None
        try:
            peer = str(Address(*sock.getpeername()[:2]))
            sockets.adopt(sock)
            sockets.tune(sock, self._hub.limits.peer_timeout)
            sockets.refuse_loopback_advertisement(sock, self._hub.advertise)
            reader, writer = await self._hub.loop.open_stream(sock)
            intro = await asyncio.wait_for(
                handshake.introduce(reader, writer, self._hub.local, peer, initiator=False),
                self._hub.limits.handshake_timeout,
            )
            self._met()
            self._introduced += 1
            if self._introduced > self._hub.limits.max_introduced:
                raise ConnectError("too many connections are being set up", operation="accept", peer=peer)
            await self._serve(intro)
        except (KvlinkError, OSError, asyncio.TimeoutError) as error:
            self._refuse(error, peer)
        finally:
            if intro is None:
                self._met()
            else:
                self._introduced -= 1
            if writer is None:
                sock.close()
            elif intro is None or not intro.connection.adopted:
                writer.close()

    def _refuse(self, error: Exception, peer: str) -> None:
        if isinstance(error, asyncio.TimeoutError) and not isinstance(error, KvlinkError):
            error = ConnectTimeout("it did not finish the handshake in time", operation="accept", peer=peer)
        elif not isinstance(error, KvlinkError):
            error = ConnectError(f"the connection broke: {error}", operation="accept", peer=peer)
        assert isinstance(error, KvlinkError)
        self.refused += 1
        self.refusals.append(error)
        now = self._hub.time()
        worth_a_line = isinstance(error, AuthenticationError) or not isinstance(error, ConnectTimeout)
        if worth_a_line and now >= self._quiet_until:  # a stranger must not be able to flood the log
            self._quiet_until = now + WARNING_INTERVAL
            self._hub.log.warning("%s: refused a connection from %s: %s", self._hub.name, peer, error)
