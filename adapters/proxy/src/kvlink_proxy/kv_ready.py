"""Hears from prefillers when a request's KV is at its decoder: LMCache's messages, and kvlink's for a failure.

The messages are LMCache's own wire form (msgpack, the type's name in "type"), sent to a ZeroMQ PULL socket. Whoever can
reach the socket can send one, so a message counts only for a request id that is waited for, and those are unguessable.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
import zmq
import zmq.asyncio

from kvlink_proxy.metrics import Metrics

logger = logging.getLogger(__name__)

_MAX_MESSAGE_BYTES = 64 << 10
_SHOWN_REASON = 500
_COMPLAIN_EVERY = 5.0  # seconds
_PAUSE_AFTER_ERROR = 0.5  # seconds, before a socket that could not be read is read again


class ProxyNotif(msgspec.Struct, tag=True):
    """One rank's part of a request's KV is at the decoder. LMCache sends only the id."""

    req_id: str
    rank: int | None = None
    world_size: int | None = None


class KVLinkFailureNotif(msgspec.Struct, tag=True):
    """One rank's part will not arrive; ``never``: it can never fit."""

    req_id: str
    rank: int
    world_size: int
    reason: str
    never: bool = False


_decoder = msgspec.msgpack.Decoder(ProxyNotif | KVLinkFailureNotif)


class HandoffFailed(Exception):
    """A request's KV did not get to its decoder.

    Attributes:
        outcome: "failed", "never" (it cannot fit) or "timeout".
    """

    def __init__(self, outcome: str, reason: str) -> None:
        super().__init__(reason)
        self.outcome = outcome


@dataclass
class Waiter:
    """One request whose KV is under way.

    Attributes:
        ranks: Messages that make it complete.
        seen: Ranks that have reported, or how many did where they do not say which they are.
    """

    ranks: int
    seen: set[int] = field(default_factory=set)
    _ended: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def arrived(self, message: ProxyNotif) -> None:
        """Counts a rank."""
        if message.world_size is not None and message.world_size != self.ranks:
            text = (
                f"the prefiller has {message.world_size} tensor-parallel ranks, but --decoder-init-port names "
                f"{self.ranks} ports; give one port for each rank"
            )
            self.fail(HandoffFailed("failed", text))
            return
        self.seen.add(len(self.seen) if message.rank is None else message.rank)
        if len(self.seen) >= self.ranks and not self._ended.done():
            self._ended.set_result(None)

    def fail(self, error: HandoffFailed) -> None:
        """Ends it; only the first end counts."""
        if not self._ended.done():
            self._ended.set_exception(error)

    async def wait(self, timeout: float) -> None:
        """Wait until every rank's part is at the decoder.

        Args:
            timeout: Seconds.

        Raises:
            HandoffFailed: A rank failed, or the time passed.
        """
        done, _ = await asyncio.wait([self._ended], timeout=timeout)
        if not done:
            text = f"{len(self.seen)} of {self.ranks} ranks reported their KV at the decoder within {timeout:g} s"
            raise HandoffFailed("timeout", text)
        self._ended.result()

    def drop(self) -> None:
        """Forget it, whether it ended or not."""
        if self._ended.done() and not self._ended.cancelled():
            self._ended.exception()  # looked at, so that nobody complains
        self._ended.cancel()


class _Complaints:
    """Logs what is wrong with messages, at most once in a while: whoever reaches the port can send any number."""

    def __init__(self) -> None:
        self._next = 0.0
        self._unsaid = 0

    def say(self, text: str, *args: object, exc_info: bool = False) -> None:
        """Log a warning, or count it.

        Args:
            text: Format of the line.
            args: Its values.
            exc_info: Whether the current exception's stack belongs to it.
        """
        now = time.monotonic()
        if now < self._next:
            self._unsaid += 1
            return
        more = f" ({self._unsaid} more such lines were not logged)" if self._unsaid else ""
        self._next, self._unsaid = now + _COMPLAIN_EVERY, 0
        logger.warning(f"{text}%s", *args, more, exc_info=exc_info)


class KVReady:
    """The socket, and who waits for what.

    Attributes:
        port: The port it listens on.

    Raises:
        OSError: The address cannot be had; the message names it.
    """

    def __init__(self, host: str, port: int, metrics: Metrics) -> None:
        self._metrics = metrics
        self._complaints = _Complaints()
        self._waiting: dict[str, Waiter] = {}
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, _MAX_MESSAGE_BYTES)
        self.port = port
        for number, place in enumerate(_addresses(host)):
            address = f"tcp://{_bracket(place)}:{self.port or '*'}"
            try:
                self._socket.setsockopt(zmq.IPV6, int(":" in place))
                self._socket.bind(address)
            except zmq.ZMQError as error:
                if number and error.errno != errno.EADDRINUSE:
                    continue  # such as ::1 where the kernel has no IPv6
                self.close()
                text = f"cannot listen on {address} for prefillers' messages (--proxy-host, --proxy-port): {error}"
                raise OSError(error.errno, text) from None
            self.port = int(self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rsplit(":", 1)[1])

    @contextlib.contextmanager
    def expect(self, request_id: str, ranks: int) -> Iterator[Waiter]:
        """Take messages for a request, from before it is sent to the prefiller.

        Args:
            request_id: The id that the prefiller is given.
            ranks: How many ranks will report.

        Yields:
            What to wait on.
        """
        waiter = self._waiting[request_id] = Waiter(ranks)
        try:
            yield waiter
        finally:
            del self._waiting[request_id]
            waiter.drop()

    async def arrival(self, waiter: Waiter, timeout: float) -> None:
        """Wait for a request's KV and count how it ended.

        Args:
            waiter: What :meth:`expect` gave.
            timeout: Seconds.

        Raises:
            HandoffFailed: It will not come.
        """
        began = time.monotonic()
        try:
            await waiter.wait(timeout)
        except HandoffFailed as error:
            self._metrics.handoffs.labels(error.outcome).inc()
            raise
        self._metrics.handoffs.labels("ready").inc()
        self._metrics.kv_ready.observe(time.monotonic() - began)

    async def listen(self) -> None:
        """Take messages until it is closed; nothing that comes, and no error, ends it."""
        while not self._socket.closed:
            try:
                message = await self._receive()
            except Exception:
                self._complaints.say("a message on port %d could not be read", self.port, exc_info=True)
                await asyncio.sleep(_PAUSE_AFTER_ERROR)
                continue
            try:
                self._take(message)
            except Exception as error:  # not msgspec's alone: bad UTF-8 and deep nesting raise other types
                self._complaints.say("a message that is not a prefiller's came on port %d: %s", self.port, error)
            # What has arrived already is read without a turn of the event loop; a flood must leave it to others.
            await asyncio.sleep(0)

    async def _receive(self) -> bytes | None:
        """Returns the next message, or None for one of several frames, of which no more than one is kept."""
        frame = await self._socket.recv(copy=False)
        if not frame.more:
            return bytes(frame.buffer)
        while frame.more:
            frame = await self._socket.recv(copy=False)
            await asyncio.sleep(0)
        return None

    def _take(self, data: bytes | None) -> None:
        if data is None:
            raise msgspec.DecodeError("it has several frames")
        message = _decoder.decode(data)
        waiter = self._waiting.get(message.req_id)
        if waiter is None:
            logger.debug("request %s: nobody waits for its KV any more", message.req_id[:80])
        elif isinstance(message, ProxyNotif):
            waiter.arrived(message)
        else:
            text = f"rank {message.rank}: {message.reason[:_SHOWN_REASON]}"
            waiter.fail(HandoffFailed("never" if message.never else "failed", text))

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()
        self._context.term()


def _addresses(host: str) -> list[str]:
    """Returns all addresses of a host, IPv4 first: "localhost" is often two, of which LMCache reaches IPv4 only."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return [host]  # ZeroMQ knows more, such as the names of interfaces, and says what is wrong
    return sorted({str(item[4][0]) for item in found}, key=lambda text: (":" in text, text))


def _bracket(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
