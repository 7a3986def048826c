"""From two introduced channels to an open link: OFFER, ANSWER, READY, GO, DONE, for both connect modes.

The loop's thread runs the conversation; everything of the provider that may block runs on a pool. A link that fails
anywhere is closed on both sides, and nobody waits while holding what another may need: an initiator takes its connect
slot before it offers, and an acceptor without a free one says BUSY instead of waiting.

Two sides that connect to each other end with one link: a side never offers while it answers the other's offer, and when
both have offered, the one with the lower channel id says BUSY and the other answers.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from kvlink import _engine
from kvlink.control import messages as m
from kvlink.control import sockets
from kvlink.control.handshake import Introduced, unless_closed
from kvlink.control.session import Session
from kvlink.control.wire import ProtocolError
from kvlink.errors import ConnectError, ConnectRefused, KvlinkError

if TYPE_CHECKING:
    from kvlink.control.hub import Hub

T = TypeVar("T", bound=m.Message)

FIRST_RETRY = 0.02
LAST_RETRY = 0.5
MAX_SETUP_SECONDS = 600.0
OWN_WORD = 0.2


class LinkAttempt:
    """One try to open a link over an introduced connection.

    Attributes:
        published: Regions that the peer was told of.
        told: Whether the peer was told that this side is up, so that it may use the link.
        settled: Whether it has ended.
        result: The session that it led to; the peer may have used our regions through it, even if it failed.

    Args:
        hub: The channel's control plane.
        intro: The connection.
        role: ``_engine.INITIATOR`` or ``_engine.ACCEPTOR``.
        session: 16 bytes, fresh for this try.
        deadline: Loop time by which it must stand.
    """

    def __init__(self, hub: Hub, intro: Introduced, role: int, session: bytes, deadline: float) -> None:
        self._hub = hub
        self._intro = intro
        self._role = role
        self._session = session
        self._deadline = deadline
        self._peer = intro.hello.address
        self._connecting: asyncio.Task[None] | None = None
        self._link: _engine.EnginePeer | None = None
        self.published: list[m.RegionInfo] = []
        self.told = False
        self.settled = False
        self.result: Session | None = None
        hub.attempts.add(self)

    @property
    def address(self) -> str:
        """The peer's address."""
        return self._peer

    @property
    def same_host(self) -> bool:
        """Whether the peer runs on this kernel."""
        return sockets.on_this_host(self._intro.hello.host_id)

    def publishes(self, handle: int) -> bool:
        """Whether the peer was told of that region."""
        return any(info.handle == handle for info in self.published)

    @property
    def remaining(self) -> float:
        """Seconds left, never less than a millisecond."""
        return max(self._deadline - self._hub.time(), 0.001)

    async def prepare(self) -> bytes:
        """Open and describe the link, and choose the regions to publish."""
        hub = self._hub
        self._link = await hub.offload(
            hub.engine.peer_open,
            self._role,
            hub.next_epoch(),
            self._session,
            self._intro.keys.link_key(self._session),
            hub.local.channel_id.hex(),
            self._intro.peer_id.hex(),
        )
        blob: bytes = await hub.offload(self._link.describe)
        self.published = list(hub.published.regions.values())
        return blob

    async def open(self, peer_blob: bytes, regions: list[m.RegionInfo], *, connects: bool) -> Session:
        """Connect where it is our turn, import the peer's regions, agree on DONE."""
        hub, connection = self._hub, self._intro.connection
        assert self._link is not None
        answer = asyncio.ensure_future(unless_closed(connection.receive(), self._peer))
        answer.add_done_callback(lambda future: future.cancelled() or future.exception())
        try:
            waits_for_initiator = not connects
            if waits_for_initiator:
                self._expect_done(await answer)
            else:
                await self._connect(peer_blob, answer)
            session = Session(hub, self._intro, self._link, self._role, self._session, self.published)
            if hub.may_submit(self._role):
                for region in regions:
                    await session.take_region(region, self.remaining)
            connection.send(m.Done())
            self.told = True  # from now on the peer may use the link
            if not waits_for_initiator:
                self._expect_done(await answer)
        except BaseException as error:
            if self.told:
                answer.cancel()
                self._take_over(session)
                session.lose(f"the connect failed: {error}")
            elif isinstance(error, KvlinkError):
                connection.send(m.Fail(m.clip(str(error))))
            raise
        finally:
            answer.cancel()
        self._take_over(session)
        hub.add(session)
        return session

    def _take_over(self, session: Session) -> None:
        """The link and the connection are the session's now, to the end of both."""
        self._link = None
        self.result = session
        self._intro.connection.adopted = True

    async def _connect(self, peer_blob: bytes, answer: asyncio.Future[m.Message]) -> None:
        """Run the provider's connect; the peer's FAIL or a broken connection interrupts it."""
        assert self._link is not None
        link = self._link
        self._connecting = self._hub.spawn(self._hub.offload_connect(link.connect, peer_blob, self.remaining))
        first: set[asyncio.Future[Any]] = {self._connecting, answer}
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        if not self._connecting.done():
            early = None if answer.exception() else answer.result()
            if early is None or not isinstance(early, m.Done):
                # It may have failed because this side did: then our own error, a moment later, says more.
                await asyncio.wait({self._connecting}, timeout=OWN_WORD)
                if self._connecting.done():
                    await self._connecting
                link.interrupt()
                if early is None:
                    await answer
                self._expect_done(answer.result())
            await asyncio.wait({self._connecting})
        await self._connecting

    def _expect_done(self, message: m.Message) -> None:
        if isinstance(message, m.Fail):
            raise ConnectError(
                f"the peer could not bring its side up: {message.reason}", operation="connect", peer=self._peer
            )
        self.expect(message, m.Done)

    def expect(self, message: m.Message, kind: type[T]) -> T:
        """Return the message if it is of that kind.

        Raises:
            ProtocolError: It is another one.
            ConnectError: The peer said FAIL or BYE.
        """
        if isinstance(message, kind):
            return message
        if isinstance(message, (m.Fail, m.Bye, m.Reject)):
            raise ConnectError(f"the peer gave up: {message.reason}", operation="connect", peer=self._peer)
        raise ProtocolError(
            f"{type(message).__name__} where {kind.__name__} was due", operation="connect", peer=self._peer
        )

    def dispose(self) -> None:
        """Close a link that did not come up; in the background, for its connect may still be running."""
        self.settled = True
        self._hub.attempts.discard(self)
        self._hub.announce_change()
        link, self._link = self._link, None
        if link is not None:
            self._hub.spawn(self._dispose(link))

    async def _dispose(self, link: _engine.EnginePeer) -> None:
        if self._connecting is not None and not self._connecting.done():
            link.interrupt()
            await asyncio.wait({self._connecting})
        if self._connecting is not None and not self._connecting.cancelled():
            self._connecting.exception()
        await self._hub.offload(link.close, _engine.Status.CANCELLED, "the connect failed", 1.0)


async def initiate(hub: Hub, intro: Introduced, deadline: float) -> Session:
    """Open a link as initiator; returns the existing session when there is one with that channel.

    Raises:
        ConnectRefused: The peer said no.
        ConnectError: Any other failure. The caller bounds the time.
    """
    dead: list[bytes] = []
    delay = FIRST_RETRY
    while True:
        session = hub.sessions.get(intro.peer_id)
        if session is not None:
            intro.connection.close()
            return session
        if intro.peer_id in hub.accepting or intro.peer_id in hub.offering:
            await hub.changed(LAST_RETRY)
            continue
        outcome = await _offer(hub, intro, deadline, dead)
        if isinstance(outcome, Session):
            return outcome
        if isinstance(outcome, m.Exists):
            if outcome.session == hub.accepting.get(intro.peer_id):
                await hub.changed(LAST_RETRY)
            else:
                known = hub.sessions.get(intro.peer_id)
                if known is None or known.session_id != outcome.session:
                    dead = [outcome.session]  # it ended here and the peer has not noticed yet
            continue
        await hub.changed(min(max(outcome.retry_ms / 1000, delay), LAST_RETRY) * random.uniform(0.5, 1.5))
        delay = min(delay * 2, LAST_RETRY)


async def _offer(hub: Hub, intro: Introduced, deadline: float, dead: list[bytes]) -> Session | m.Busy | m.Exists:
    connection = intro.connection
    session_id = os.urandom(16)
    peer = intro.hello.address
    async with hub.connect_slot():
        if intro.peer_id in hub.accepting or intro.peer_id in hub.offering or intro.peer_id in hub.sessions:
            return m.Busy(0, "another connection to the same channel was quicker")
        hub.offering.add(intro.peer_id)
        attempt = LinkAttempt(hub, intro, _engine.INITIATOR, session_id, deadline)
        try:
            blob = await attempt.prepare()
            connection.send(m.Offer(session_id, _ms(attempt.remaining), blob, attempt.published, dead))
            reply = await unless_closed(connection.receive(), peer)
            if isinstance(reply, (m.Busy, m.Exists)):
                return reply
            if isinstance(reply, m.Reject):
                raise ConnectRefused(f"the peer refused: {reply.reason}", operation="connect", peer=peer)
            answer = attempt.expect(reply, m.Answer)
            connection.send(m.Ready())
            attempt.expect(await unless_closed(connection.receive(), peer), m.Ready)
            connection.send(m.Go(_ms(attempt.remaining)))
            return await attempt.open(answer.link, answer.regions, connects=True)
        finally:
            hub.offering.discard(intro.peer_id)
            attempt.dispose()


async def accept(hub: Hub, intro: Introduced) -> Session | None:
    """Serve an introduced connection until its initiator has a link, or ends it (None).

    Raises:
        ConnectError: The attempt failed; the caller closes the connection.
    """
    connection = intro.connection
    while True:
        try:
            message = await asyncio.wait_for(connection.receive(), hub.limits.offer_timeout)
        except (asyncio.IncompleteReadError, OSError, asyncio.TimeoutError):
            return None  # it found another way, or gave up
        if isinstance(message, m.Bye):
            return None
        if not isinstance(message, m.Offer):
            raise ProtocolError(f"{type(message).__name__} where OFFER was due", peer=intro.hello.address)
        obstacle = _obstacle(hub, intro, message)
        seconds = min(message.timeout_ms / 1000, MAX_SETUP_SECONDS)
        if obstacle is None:
            refusal = await asyncio.wait_for(hub.ask_on_peer(intro.hello), seconds)
            # Things may have changed while on_peer was asked.
            obstacle = _obstacle(hub, intro, message) if refusal is None else m.Reject(m.clip(refusal))
        if obstacle is None:
            hub.accepting[intro.peer_id] = message.session
            try:
                return await asyncio.wait_for(_answer(hub, intro, message), seconds)
            finally:
                del hub.accepting[intro.peer_id]
                hub.announce_change()
        connection.send(obstacle)
        if isinstance(obstacle, m.Reject):
            raise ConnectRefused(obstacle.reason, operation="accept", peer=intro.hello.address)


def _obstacle(hub: Hub, intro: Introduced, offer: m.Offer) -> m.Busy | m.Exists | m.Reject | None:
    """Return why an offer cannot be taken up now, or None."""
    peer_id = intro.peer_id
    session = hub.sessions.get(peer_id)
    if session is not None and session.session_id in offer.dead:
        session.lose("the peer lost this link and connected again")
        session = hub.sessions.get(peer_id)
    if session is not None:
        return m.Exists(session.session_id)
    if peer_id in hub.offering and hub.local.channel_id < peer_id:
        return m.Busy(50, "this side is connecting to you already")
    if peer_id in hub.accepting:
        return m.Busy(50, "another connection of yours is being set up")
    max_links = hub.max_links()
    if max_links and len(hub.sessions) + len(hub.accepting) >= max_links:
        return m.Reject(f"it is full: {max_links} links")
    if hub.engine.attributes.connect_both and hub.connect_slots_full:
        return m.Busy(100, "it is connecting to others")
    return None


async def _answer(hub: Hub, intro: Introduced, offer: m.Offer) -> Session:
    connection, peer = intro.connection, intro.hello.address
    both = hub.engine.attributes.connect_both
    attempt = LinkAttempt(hub, intro, _engine.ACCEPTOR, offer.session, hub.time() + offer.timeout_ms / 1000)
    try:
        async with hub.connect_slot(needed=both):
            blob = await _or_fail(attempt.prepare(), connection)
            connection.send(m.Answer(blob, attempt.published))
            attempt.expect(await unless_closed(connection.receive(), peer), m.Ready)
            connection.send(m.Ready())
            attempt.expect(await unless_closed(connection.receive(), peer), m.Go)
            return await attempt.open(offer.link, offer.regions, connects=both)
    finally:
        attempt.dispose()


async def _or_fail(step: Coroutine[Any, Any, bytes], connection: Any) -> bytes:
    try:
        return await step
    except KvlinkError as error:
        connection.send(m.Fail(m.clip(str(error))))
        raise


def _ms(seconds: float) -> int:
    return max(1, min(int(seconds * 1000), 86_400_000))
