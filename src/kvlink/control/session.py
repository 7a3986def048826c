"""An open link's life: messages in and out, regions that come and go, and its end.

A session ends once, for one reason, and in one order: the peer object says so, the engine closes the link (which ends
every transfer), our direction of the socket is shut, and the socket is kept until the peer's direction ends as well.
Because both sides do it in this order, a peer's end of file means that its link is closed, or its process dead: nothing
of it writes into our memory any more. Revocation relies on that.
"""

from __future__ import annotations

import asyncio
import errno
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from kvlink import _engine
from kvlink.control import messages as m
from kvlink.control import sockets
from kvlink.control.handshake import Introduced
from kvlink.control.wire import ProtocolError
from kvlink.errors import BusyError, ClosedError, KvlinkError, PeerLost, RequestError
from kvlink.peer import MAX_QUEUED_BYTES, Peer, RemoteRegion

if TYPE_CHECKING:
    from kvlink.control.hub import Hub

#: Notifications waiting for ``on_notify`` before we stop reading from that peer.
MAX_UNDELIVERED_BYTES = 16 << 20
IMPORT_SECONDS = 30.0


class Session:
    """One peer's open link; lives on the control loop's thread except where said otherwise.

    Args:
        hub: The channel's control plane.
        intro: The authenticated connection.
        link: The engine's peer; closed by this object.
        role: Our role on the link.
        session_id: The link's id, the same on both sides.
        published: Regions that the peer was told of during the setup.

    Attributes:
        peer: What users hold.
        published: Handles of our regions that the peer may use.
        gone: Set when the peer's side has ended: nothing of it can write into our memory.
        link_closed: Set when our engine's link is closed.
    """

    def __init__(
        self,
        hub: Hub,
        intro: Introduced,
        link: _engine.EnginePeer,
        role: int,
        session_id: bytes,
        published: list[m.RegionInfo],
    ) -> None:
        self._hub = hub
        self._connection = intro.connection
        self._link = link
        self._replies: dict[int, Future[bytes]] = {}
        self._acks: dict[int, asyncio.Future[None]] = {}
        self._region_jobs: dict[int, asyncio.Task[None]] = {}
        self._importing = asyncio.Lock()
        self._next_request = 0
        self._undelivered = 0
        self._delivered = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None
        self.peer_id = intro.peer_id
        self.session_id = session_id
        self.role = role
        self.same_host = sockets.on_this_host(intro.hello.host_id)
        self.published = {info.handle for info in published}
        self.ended = False
        self.gone = asyncio.Event()
        self.link_closed = asyncio.Event()
        self.peer = Peer(self, hub, link, intro.hello.address, intro.hello.identity, intro.hello.name)

    def start(self) -> None:
        """Begin to serve the peer's messages."""
        self._connection.limit = m.MAX_MESSAGE
        self._reader = self._hub.spawn(self._read())

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait for the peer to read; may be called from any thread."""
        return self._connection.queued

    # ---- from users, by way of the loop ----

    def send_notify(self, body: bytes) -> None:
        """Send a notification."""
        if not self.ended:
            self._connection.send(m.Notify(body))

    def send_request(self, body: bytes, timeout: float, reply: Future[bytes]) -> None:
        """Send a request; ``reply`` is completed with its answer, or with an error."""
        if self.ended:
            reply.set_exception(self.peer.failure("request"))
            return
        number = self._next_request
        self._next_request += 1
        self._replies[number] = reply
        reply.add_done_callback(lambda _: self._forget_request(number))
        self._connection.send(m.Request(number, min(max(int(timeout * 1000), 1), 86_400_000), body))

    def _forget_request(self, number: int) -> None:
        try:
            self._hub.loop.call(self._replies.pop, number, None)
        except ClosedError:
            pass

    def check(self) -> None:
        """End the session if its data path is dead."""
        if not self.ended:
            try:
                self._link.check()
            except KvlinkError as error:
                self.close(f"its data path is dead: {error.message}")

    # ---- our regions ----

    def publish(self, info: m.RegionInfo) -> None:
        """Tell the peer about a region registered while connected."""
        if not self.ended and info.handle not in self.published:
            self.published.add(info.handle)
            self._connection.send(m.RegionAdd(info))

    async def withdraw(self, handle: int, timeout: float) -> bool:
        """Withdraw a region and wait until the peer has drained it.

        Args:
            handle: The region.
            timeout: Seconds until the link is closed instead.

        Returns:
            Whether nothing of this peer can write into it any more.
        """
        if handle not in self.published:
            return True
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        if not self.ended:
            ack = self._acks.setdefault(handle, loop.create_future())
            self._connection.send(m.RegionClose(handle, min(max(int(timeout * 1000), 1), 86_400_000)))
            gone = self._hub.spawn(self.gone.wait())
            first: set[asyncio.Future[Any]] = {ack, gone}
            await asyncio.wait(first, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            gone.cancel()
            if ack.done() and not ack.cancelled():
                self.published.discard(handle)
                return True
            self.close(f"it did not let go of a withdrawn region within {timeout:g} s")
            deadline = max(deadline, loop.time() + 0.05)
        if not self.same_host:
            await self.link_closed.wait()
            return True
        try:
            await asyncio.wait_for(self.gone.wait(), max(deadline - loop.time(), 0.001))
        except asyncio.TimeoutError:
            return False
        return True

    # ---- the peer's regions ----

    async def take_region(self, info: m.RegionInfo, timeout: float) -> None:
        """Import a region of the peer; it is visible afterwards, or the reason why it is not.

        Raises:
            PeerLost: The link is dead.
        """
        if info.name in self.peer.regions:
            raise ProtocolError(f"the peer published two regions named {info.name!r}")
        try:
            async with self._importing:  # one thread a peer: a stopped one must not hold up what others wait for
                handle = await self._hub.offload_connect(
                    self._link.rmem_open, info.blob, info.nbytes, info.access, timeout
                )
        except (PeerLost, ClosedError):
            raise
        except KvlinkError as error:
            # Not every region of a peer is of use here: memory that a forced path cannot reach, for one.
            self._hub.log.info("%s: cannot import region %r of %s: %s", self._hub.name, info.name, self.peer, error)
            self.peer.region_failed(info.name, info.handle, error)
            return
        self.peer.add_region(RemoteRegion(info.name, info.nbytes, info.access, info.device, handle), info.handle)

    async def _add_region(self, info: m.RegionInfo) -> None:
        try:
            await self.take_region(info, IMPORT_SECONDS)
        except ProtocolError as error:
            self.lose(f"the peer broke the protocol: {error.message}")
        except KvlinkError as error:
            self.lose(error.message)

    async def _close_region(self, handle: int, timeout: float) -> None:
        region = self.peer.remove_region(handle)
        if region is not None:
            try:
                await self._hub.offload(self._link.rmem_close, region.handle, timeout)
            except KvlinkError as error:
                self.close(f"a withdrawn region is still in use here: {error.message}")
                return
        self._reply(m.RegionClosed(handle))

    def _then(self, handle: int, what: m.RegionAdd | m.RegionClose) -> None:
        """Do what the peer says about one of its regions, after what it said about it before."""
        before = self._region_jobs.get(handle)

        async def job() -> None:
            if before is not None:
                await asyncio.wait({before})
            if isinstance(what, m.RegionAdd):
                await self._add_region(what.region)
            else:
                await self._close_region(handle, what.timeout_ms / 1000)

        task = self._hub.spawn(job())
        self._region_jobs[handle] = task
        task.add_done_callback(lambda done: self._region_jobs.get(handle) is done and self._region_jobs.pop(handle))

    # ---- messages ----

    async def _read(self) -> None:
        try:
            while not self.ended:
                self._dispatch(await self._connection.receive())
                while self._undelivered > MAX_UNDELIVERED_BYTES and not self.ended:
                    self._delivered.clear()
                    await self._delivered.wait()
            while True:  # what comes after our own end matters only for the credit in it
                await self._connection.receive()
        except asyncio.IncompleteReadError:
            self.gone.set()
            self.lose("the peer closed the connection; its process may have ended")
        except ProtocolError as error:
            self.lose(f"the peer broke the protocol: {error.message}")
        except OSError as error:
            self.gone.set()
            self.lose(self._network_reason(error))

    def _network_reason(self, error: OSError) -> str:
        if error.errno == errno.ETIMEDOUT:
            return f"the peer's host did not answer for {self._hub.limits.peer_timeout:g} s"
        return f"the connection to the peer broke: {error.strerror or error}"

    def _dispatch(self, message: m.Message) -> None:
        if isinstance(message, m.Notify):
            self._deliver(message.body)
        elif isinstance(message, m.Request):
            self._serve(message)
        elif isinstance(message, (m.Reply, m.RequestFailed)):
            self._answered(message)
        elif isinstance(message, m.RegionAdd):
            if self._hub.may_submit(self.role):
                self._then(message.region.handle, message)
        elif isinstance(message, m.RegionClose):
            self._then(message.handle, message)
        elif isinstance(message, m.RegionClosed):
            ack = self._acks.pop(message.handle, None)
            if ack is not None and not ack.done():
                ack.set_result(None)
        elif isinstance(message, m.Bye):
            self.lose(f"closed by the peer: {message.reason}")
        else:
            raise ProtocolError(f"{type(message).__name__} on an open link")

    def _deliver(self, body: bytes) -> None:
        handler = self._hub.handlers.on_notify
        if handler is None:
            self._hub.count_dropped_notification()
            return
        size = len(body) + 64

        def job() -> None:
            try:
                handler(self.peer, body)
            finally:
                self._hub.call(self._delivered_one, size)

        self._undelivered += size
        self._hub.callback(job)

    def _delivered_one(self, size: int) -> None:
        self._undelivered -= size
        self._delivered.set()

    def _serve(self, request: m.Request) -> None:
        handler = self._hub.handlers.on_request
        if handler is None:
            self._reply(m.RequestFailed(request.id, "the peer has no on_request handler"))
            return
        deadline = self._hub.time() + request.timeout_ms / 1000

        def job() -> None:
            if self.ended or self._hub.time() > deadline:
                return  # nobody waits for it any more
            reply: m.Message
            try:
                body = handler(self.peer, request.body)
                if not isinstance(body, (bytes, bytearray, memoryview)):
                    raise TypeError(f"on_request returned {type(body).__name__} instead of bytes")
                if len(body) > m.MAX_REQUEST_BYTES:
                    raise ValueError(f"on_request returned {len(body)} bytes; the most is {m.MAX_REQUEST_BYTES}")
                reply = m.Reply(request.id, bytes(body))
            except Exception as error:
                self._hub.log.warning("%s: on_request raised", self._hub.name, exc_info=True)
                reply = m.RequestFailed(request.id, m.clip(f"{type(error).__name__}: {error}"))
            self._hub.call(self._reply, reply)

        try:
            self._hub.serve(job)
        except BusyError as error:
            self._reply(m.RequestFailed(request.id, f"the peer is busy: {error.message}"))

    def _reply(self, reply: m.Message) -> None:
        """Answer; a peer that makes us answer without end and reads nothing is dropped."""
        if not self.ended:
            self._connection.send(reply)
            if self._connection.queued > MAX_QUEUED_BYTES:
                self.close("it asks and does not read the answers")

    def _answered(self, message: m.Reply | m.RequestFailed) -> None:
        reply = self._replies.pop(message.id, None)
        if reply is None or not reply.set_running_or_notify_cancel():
            return  # it came too late
        if isinstance(message, m.Reply):
            reply.set_result(message.body)
        else:
            reply.set_exception(RequestError(message.reason, operation="request", peer=self.peer.address))

    # ---- the end ----

    def lose(self, reason: str) -> None:
        """The peer or the network ended it."""
        error = PeerLost(reason, peer=self.peer.address, hint="connect again to go on")
        self._end(error, _engine.Status.LINK_DOWN, None)

    def close(self, reason: str = "closed", *, by_user: bool = False) -> None:
        """This side ends it; the peer is told why."""
        if by_user:
            error: KvlinkError = ClosedError("this side closed the peer", peer=self.peer.address)
            self._end(error, _engine.Status.STATE, reason)
        else:
            self._end(PeerLost(reason, peer=self.peer.address), _engine.Status.LINK_DOWN, reason)

    def _end(self, error: KvlinkError, status: int, bye: str | None) -> None:
        if self.ended:
            return
        self.ended = True
        self._delivered.set()
        self.peer.ended(error)
        self._hub.remove(self)
        for reply in list(self._replies.values()):
            if reply.set_running_or_notify_cancel():
                reply.set_exception(self.peer.failure("request"))
        self._replies.clear()
        self._hub.spawn(self._shut(error, status, bye))

    async def _shut(self, error: KvlinkError, status: int, bye: str | None) -> None:
        grace = self._hub.limits.link_grace
        try:
            closing = self._hub.spawn(self._hub.offload_close(self._link.close, status, error.message, grace))
            if bye is not None:
                self._connection.send(m.Bye(m.clip(bye)))
                try:
                    await asyncio.wait_for(self._connection.flush(), grace)
                except asyncio.TimeoutError:
                    pass  # it does not read; the end of file will tell it
            if self._reader is not None:
                self._reader.cancel()
                await asyncio.wait({self._reader})
            await closing
            self.link_closed.set()
            self._connection.end()
            if not self.gone.is_set():
                limit = None if self.same_host else self._hub.limits.peer_timeout
                try:
                    await asyncio.wait_for(self._connection.drained(), limit)
                except asyncio.TimeoutError:
                    pass
            self.gone.set()
        finally:
            self._connection.close()
            self._hub.forget(self)
