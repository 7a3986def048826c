"""All of one channel's connections: its loop, its threads, its listener, its sessions, its published regions."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from kvlink import _engine
from kvlink.control import addresses, handshake, linkup, sockets
from kvlink.control import messages as m
from kvlink.control.addresses import Address
from kvlink.control.handshake import Introduced, Local, NotServed
from kvlink.control.listener import Listener
from kvlink.control.published import Published
from kvlink.control.reports import Hook, Reports
from kvlink.control.session import Session
from kvlink.control.threads import ControlLoop, WorkerPool
from kvlink.errors import ClosedError, ConnectError, ConnectRefused, ConnectTimeout, KvlinkError

if TYPE_CHECKING:
    from kvlink.control.linkup import LinkAttempt
    from kvlink.peer import Peer

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """Times in seconds and caps of a control plane.

    Attributes:
        peer_timeout: Silence of a peer's host after which it counts as dead.
        request_timeout: How long a request waits whose caller does not say.
        handshake_timeout: How long a stranger may take to authenticate.
        offer_timeout: How long an authenticated peer may take to offer a link.
        link_grace: How long closing a link may take.
        max_handshakes: Strangers served at once.
        max_introduced: Authenticated connections at once that have no link yet.
        max_peers: Links at once; 0 = as many as the provider takes.
        workers: Threads for blocking calls of each kind, and for request handlers.
        request_backlog: Requests that may wait for a handler's thread.
    """

    peer_timeout: float = 3.0
    request_timeout: float = 30.0
    handshake_timeout: float = 30.0
    offer_timeout: float = 120.0
    link_grace: float = 1.0
    max_handshakes: int = 64
    max_introduced: int = 256
    max_peers: int = 0
    workers: int = 8
    request_backlog: int = 256


@dataclass
class Handlers:
    """What users set on a channel; read anew for every event."""

    on_peer: Callable[[dict[str, str | int]], object] | None = None
    on_request: Callable[[Peer, bytes], bytes] | None = None
    on_notify: Callable[[Peer, bytes], object] | None = None
    on_peer_lost: Callable[[Peer, KvlinkError], object] | None = None


class Hub:
    """The control plane of one channel.

    Public methods say which thread may call them; everything else runs on the loop's thread.

    Args:
        engine: The open provider engine.
        local: What we say about ourselves.
        sock: The listening socket.
        advertise: The address that peers are told.
        secret: The secret, or empty.
        insecure: Leave loopback without a secret.
        limits: Times and caps.
    """

    def __init__(
        self,
        engine: _engine.EngineChannel,
        local: Local,
        sock: socket.socket,
        advertise: Address,
        *,
        secret: bytes,
        insecure: bool,
        limits: Limits,
    ) -> None:
        self.engine = engine
        self.local = local
        self.name = local.hello.name
        self.advertise = advertise
        self.limits = limits
        self.handlers = Handlers()
        self.log = logging.getLogger("kvlink")
        self.sessions: dict[bytes, Session] = {}
        self.lingering: set[Session] = set()
        self.offering: set[bytes] = set()
        self.accepting: dict[bytes, bytes] = {}
        self.attempts: set[LinkAttempt] = set()
        self.published = Published(self)
        self.peers: dict[str, Peer] = {}  # replaced, never changed: any thread may read it
        self.dropped_notifications = 0
        self._secret = secret
        self._insecure = insecure
        self._epoch = 0
        self._waiters: set[asyncio.Future[None]] = set()
        self._closing = False
        prefix = f"kvlink-{self.name}"
        self.loop = ControlLoop(prefix)
        self.reports = Reports(engine, self.loop)
        self._calls = WorkerPool(f"{prefix}-engine", limits.workers)
        self._connects = WorkerPool(f"{prefix}-connect", limits.workers)
        self._closes = WorkerPool(f"{prefix}-close", limits.workers)
        self._requests = WorkerPool(f"{prefix}-request", limits.workers, limits.request_backlog)
        self._callbacks = WorkerPool(f"{prefix}-callback", 1)
        self._slots = asyncio.Semaphore(engine.attributes.max_connects or 1_000_000)
        self.listener = Listener(self, sock, self._serve)
        self.loop.run(self._start)

    async def _start(self) -> None:
        self.reports.start()
        self.listener.start()

    # ---- small services for the parts ----

    def time(self) -> float:
        """Return the loop's clock, in seconds; any thread."""
        return self.loop.loop.time()

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Run a function on the loop; ignored when the channel has ended; any thread."""
        with contextlib.suppress(ClosedError):
            self.loop.call(function, *args)

    def spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task."""
        return self.loop.spawn(coroutine)

    async def offload(self, function: Callable[..., T], *args: Any) -> T:
        """Await a short blocking call."""
        return await self.loop.offload(self._calls, function, *args)

    async def offload_connect(self, function: Callable[..., T], *args: Any) -> T:
        """Await a call that waits for a peer; never delays the others."""
        return await self.loop.offload(self._connects, function, *args)

    async def offload_close(self, function: Callable[..., T], *args: Any) -> T:
        """Await the closing of a link; never delayed by connects."""
        return await self.loop.offload(self._closes, function, *args)

    def callback(self, job: Hook) -> None:
        """Run a user's function on the callback thread, in order; here when the channel has ended; any thread."""
        try:
            self._callbacks.submit(job)
        except ClosedError:
            try:
                job()
            except Exception:
                self.log.exception("%s: a callback raised", self.name)

    def serve(self, job: Hook) -> None:
        """Run a request handler.

        Raises:
            BusyError: Too many wait already.
        """
        with contextlib.suppress(ClosedError):
            self._requests.submit(job)

    def count_dropped_notification(self) -> None:
        """A notification came and nobody has set ``on_notify``."""
        self.dropped_notifications += 1

    def next_epoch(self) -> int:
        """Return the next link's number."""
        self._epoch += 1
        return self._epoch

    def may_submit(self, role: int) -> bool:
        """Whether that side of a link can put and get."""
        return role == _engine.INITIATOR or _engine.Capability.ACCEPTOR_SUBMIT in self.engine.attributes.capabilities

    def max_links(self) -> int:
        """Return how many peers may be linked at once; 0 = any number."""
        limits = [limit for limit in (self.engine.attributes.max_links, self.limits.max_peers) if limit]
        return min(limits, default=0)

    # ---- finding each other ----

    @contextlib.asynccontextmanager
    async def connect_slot(self, needed: bool = True) -> AsyncIterator[None]:
        """Hold one of the provider's ``max_connects``."""
        if not needed:
            yield
            return
        async with self._slots:
            yield

    @property
    def connect_slots_full(self) -> bool:
        """Whether a connect would have to wait for another."""
        return self._slots.locked()

    def announce_change(self) -> None:
        """Wake those that wait for sessions or attempts to change."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def changed(self, timeout: float) -> None:
        """Wait until sessions or attempts change, or ``timeout`` seconds passed."""
        waiter: asyncio.Future[None] = self.loop.loop.create_future()
        self._waiters.add(waiter)
        try:
            await asyncio.wait({waiter}, timeout=timeout)
        finally:
            self._waiters.discard(waiter)

    async def ask_on_peer(self, hello: m.Hello) -> str | None:
        """Ask the user whether to take a peer; returns the reason of a refusal."""
        handler = self.handlers.on_peer
        if handler is None:
            return None
        try:
            answer = await self.loop.offload(self._requests, handler, dict(hello.identity))
        except Exception as error:
            return f"on_peer: {type(error).__name__}: {error}"
        return "on_peer returned False" if answer is False else None

    async def connect(self, target: Address, timeout: float) -> Peer:
        """Connect to the channel that listens at an address, or return its peer when it is connected already.

        Raises:
            ConnectError: It failed; the subclass says how.
        """
        where = str(target)
        for peer in self.peers.values():
            if peer.address == where:
                return peer
        deadline = self.time() + timeout
        try:
            return await asyncio.wait_for(self._connect(target, deadline), timeout)
        except asyncio.TimeoutError as error:
            if isinstance(error, ConnectError):
                raise
            raise ConnectTimeout(
                f"no connection within {timeout:g} s",
                operation="connect",
                peer=where,
                hint="check the address, and that the peer's process is not stopped",
            ) from None

    async def _connect(self, target: Address, deadline: float) -> Peer:
        if self._closing:
            raise ClosedError("the channel is closed", operation="connect")
        pause = linkup.FIRST_RETRY
        while True:
            writer: asyncio.StreamWriter | None = None
            intro: Introduced | None = None
            try:
                reader, writer = await self._dial(target)
                intro = await handshake.introduce(reader, writer, self.local, str(target), initiator=True)
                refusal = await self.ask_on_peer(intro.hello)
                if refusal is not None:
                    raise ConnectRefused(f"this side refused: {refusal}", operation="connect", peer=str(target))
                session = await linkup.initiate(self, intro, deadline)
            except NotServed:
                await asyncio.sleep(pause * random.uniform(0.5, 1.5))
                pause = min(pause * 2, linkup.LAST_RETRY)
                continue
            finally:
                if writer is not None and not (intro is not None and intro.connection.adopted):
                    writer.close()
            session.peer.dialled = str(target)
            return session.peer

    async def _dial(self, target: Address) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        candidates = await self.offload(lambda: addresses.resolve(target, operation="connect"))
        failure: OSError | None = None
        for family, sockaddr in candidates:
            sockets.require_protection(target, sockaddr[0], self._secret, self._insecure, "connect")
            sock = sockets.make(family)
            try:
                await self.loop.loop.sock_connect(sock, sockaddr)
                sockets.tune(sock, self.limits.peer_timeout)
                sockets.refuse_loopback_advertisement(sock, self.advertise)
                return await self.loop.open_stream(sock)
            except ConnectError:
                sock.close()
                raise
            except OSError as error:
                sock.close()
                failure = error
            except BaseException:
                sock.close()
                raise
        assert failure is not None
        raise ConnectError(
            os.strerror(failure.errno) if failure.errno else str(failure),
            operation="connect",
            peer=str(target),
            site="connect",
            vendor_code=failure.errno or 0,
            hint="is the peer's channel open and listening there?",
        ) from failure

    async def _serve(self, intro: Introduced) -> Session | None:
        if self._closing:
            return None
        return await linkup.accept(self, intro)

    # ---- sessions ----

    def add(self, session: Session) -> None:
        """Take an open session up."""
        if self._closing:
            session.start()
            session.close("the channel is closing")
            return
        older = self.sessions.get(session.peer_id)
        if older is not None:
            older.close("a newer connection took its place")
        self.sessions[session.peer_id] = session
        self.peers = {**self.peers, session.peer.id: session.peer}
        session.start()
        self.published.greet(session)
        self.announce_change()

    def remove(self, session: Session) -> None:
        """A session has ended; its peer may still hold our memory until ``forget``."""
        self.lingering.add(session)
        if self.sessions.get(session.peer_id) is session:
            del self.sessions[session.peer_id]
            self.peers = {key: peer for key, peer in self.peers.items() if peer is not session.peer}
            handler, error = self.handlers.on_peer_lost, session.peer.error
            if handler is not None and error is not None and not isinstance(error, ClosedError):
                self.callback(lambda: handler(session.peer, error))
        self.announce_change()

    def forget(self, session: Session) -> None:
        """Both sides of a session have ended."""
        self.lingering.discard(session)
        self.announce_change()

    # ---- the end ----

    async def close_all_links(self) -> None:
        """Close every link, for memory that the provider binds to links."""
        for session in list(self.sessions.values()):
            session.close("a region is being closed that this provider binds to its links")
        for session in list(self.lingering):
            await session.link_closed.wait()

    def close(self, grace: float) -> list[str]:
        """Tell the peers, close every link and the engine, end every wait, stop the threads. Blocks; not on the loop.

        Args:
            grace: Seconds.

        Returns:
            Addresses of same-host peers that have not confirmed: they may still write into memory once published.
        """
        waiting: list[str] = []
        try:
            waiting = self.loop.run(lambda: self._close(grace), grace + 2.0)
        except (TimeoutError, ClosedError) as error:
            self.log.warning("%s: the control plane did not end in time: %r", self.name, error)
            waiting = [peer.address for peer in self.peers.values()] or ["a peer"]
        try:
            self.engine.close(grace)
        finally:
            with contextlib.suppress(TimeoutError, ClosedError):
                self.loop.run(self._report_rest, 2.0)
            self.loop.stop(1.0)
            for pool in (self._calls, self._connects, self._closes, self._requests, self._callbacks):
                pool.close()
            self._callbacks.join(grace)
        return waiting

    async def _close(self, grace: float) -> list[str]:
        self._closing = True
        await self.listener.close()
        for session in list(self.sessions.values()):
            session.close("its channel was closed", by_user=True)
        deadline = self.time() + grace
        while (self.lingering or self._undecided()) and (left := deadline - self.time()) > 0:
            await self.changed(left)
        self.reports.stop()
        silent = [session.peer.address for session in self.lingering if session.same_host and not session.gone.is_set()]
        return silent + [attempt.address for attempt in self._undecided()]

    def _undecided(self) -> list[LinkAttempt]:
        """Attempts whose peer, on this host, may use the link already, though it has not said so."""
        return [attempt for attempt in self.attempts if attempt.told and attempt.same_host]

    async def _report_rest(self) -> None:
        self.reports.drain()
        self.reports.end()
