"""One side of LMCache's traffic: a kvlink channel, one region of pages, and peers by the ids that LMCache gives them.

The channel connects and authenticates; on top of it two ends greet each other once: they tell the id under which
LMCache knows them, compare their page size, and carry LMCache's own side message. After that either side can write to
and read from the other. Further kinds of messages are served to whoever registers for their first byte.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

import kvlink
from kvlink.errors import ConfigError, ConnectError, KvlinkError, RequestError

from .log import get_logger

_log = get_logger()
REGION = "lmcache"
GREETING = b"H"
Handler = Callable[[kvlink.Peer, bytes], bytes]


class Greeting(msgspec.Struct):
    """First message of the side that connected.

    Attributes:
        local_id: The id under which LMCache knows the sender.
        page_bytes: Bytes of its pages.
        side: LMCache's side message, encoded by LMCache's own types; may be empty.
    """

    local_id: str
    page_bytes: int
    side: bytes = b""


class GreetingAnswer(msgspec.Struct):
    """The answer: page size, and LMCache's answer to the side message."""

    page_bytes: int
    side: bytes = b""


@dataclass(frozen=True)
class _Dialled:
    local_id: str
    url: str


class Endpoint:
    """A channel, its one region and its peers. Thread-safe.

    Attributes:
        channel: The kvlink channel; closed with the endpoint.
        region: The region of pages.
        page_bytes: Bytes of a page; page numbers count in it.
        answer_side: Answers a peer's side message; set by who wants any.
        on_greeting: Called with the id and the peer when one has connected; set by who wants to know.
        connect_timeout: Seconds for a connection and its greeting.
        transfer_timeout: Seconds for one batch.
    """

    def __init__(
        self,
        channel: kvlink.Channel,
        region: kvlink.Region,
        page_bytes: int,
        *,
        connect_timeout: float,
        transfer_timeout: float,
    ) -> None:
        if page_bytes <= 0 or region.nbytes < page_bytes:
            raise ConfigError(f"a buffer of {region.nbytes} bytes does not hold one chunk of {page_bytes} bytes")
        self.channel = channel
        self.region = region
        self.page_bytes = page_bytes
        self.answer_side: Callable[[bytes], bytes] | None = None
        self.on_greeting: Callable[[str, kvlink.Peer], object] | None = None
        self.connect_timeout = connect_timeout
        self.transfer_timeout = transfer_timeout
        self._handlers: dict[bytes, Handler] = {GREETING: self._greeted}
        self._peers: dict[str, kvlink.Peer] = {}
        self._dialled: dict[str, _Dialled] = {}
        self._lock = threading.Lock()
        channel.on_request = self._dispatch

    @property
    def pages(self) -> int:
        """Pages of the region."""
        return self.region.nbytes // self.page_bytes

    def serve(self, kind: bytes, handler: Handler) -> None:
        """Has requests whose first byte is ``kind`` answered by ``handler(peer, rest)``; it may not wait for long."""
        self._handlers[kind] = handler

    # ---- peers ----

    def connect(self, local_id: str, peer_id: str, url: str, side: bytes = b"") -> bytes:
        """Connects and greets, unless that was done; safe to repeat.

        Args:
            local_id: The id under which the peer shall know this side.
            peer_id: The id under which this side knows the peer.
            url: "host:port" of its channel.
            side: LMCache's side message.

        Returns:
            LMCache's answer to the side message.

        Raises:
            ConnectError: See ``Channel.connect``.
            ConfigError: The peer's pages have another size.
        """
        if not side and self.knows(peer_id):
            return b""
        peer = self.channel.connect(url, timeout=self.connect_timeout)
        answer = peer.request(self._greeting(local_id, side), timeout=self.connect_timeout)
        return self._met(peer, peer_id, _Dialled(local_id, url), answer)

    async def connect_async(self, local_id: str, peer_id: str, url: str, side: bytes = b"") -> bytes:
        """Connects as :meth:`connect` does, without blocking the running loop."""
        if not side and self.knows(peer_id):
            return b""
        peer = await self.channel.connect_async(url, timeout=self.connect_timeout)
        answer = await peer.request_async(self._greeting(local_id, side), timeout=self.connect_timeout)
        return self._met(peer, peer_id, _Dialled(local_id, url), answer)

    def knows(self, peer_id: str) -> bool:
        """Returns whether a peer of that id is connected, whichever side connected."""
        peer = self._peers.get(peer_id)
        return peer is not None and peer.error is None

    def peer(self, peer_id: str) -> kvlink.Peer:
        """Returns the peer; one that was lost and that this side had dialled is dialled again.

        Raises:
            ConnectError: There was never a connection, or it is lost and cannot be had again.
        """
        peer = self._peers.get(peer_id)
        if peer is not None and peer.error is None:
            return peer
        self._redial(peer_id)
        dialled = self._dialled[peer_id]
        self.connect(dialled.local_id, peer_id, dialled.url)
        return self._peers[peer_id]

    async def peer_async(self, peer_id: str) -> kvlink.Peer:
        """Returns the peer as :meth:`peer` does, without blocking the running loop."""
        peer = self._peers.get(peer_id)
        if peer is not None and peer.error is None:
            return peer
        self._redial(peer_id)
        dialled = self._dialled[peer_id]
        await self.connect_async(dialled.local_id, peer_id, dialled.url)
        return self._peers[peer_id]

    def _redial(self, peer_id: str) -> None:
        if peer_id not in self._dialled:
            known = ", ".join(sorted(self._peers)) or "none"
            raise ConnectError(
                f"no connection with {peer_id!r}; connected: {known}",
                operation="transfer",
                hint="lazy_init_peer_connection comes first, on either side",
            )

    def _greeting(self, local_id: str, side: bytes) -> bytes:
        return GREETING + msgspec.msgpack.encode(Greeting(local_id, self.page_bytes, side))

    def _met(self, peer: kvlink.Peer, peer_id: str, dialled: _Dialled, answer: bytes) -> bytes:
        reply = msgspec.msgpack.decode(answer, type=GreetingAnswer)
        self._check_pages(reply.page_bytes, peer)
        peer.wait_region(REGION, 0.0)
        with self._lock:
            self._peers[peer_id] = peer
            self._dialled[peer_id] = dialled
        return reply.side

    def _check_pages(self, theirs: int, peer: kvlink.Peer) -> None:
        if theirs != self.page_bytes:
            raise ConfigError(
                f"a chunk has {self.page_bytes} bytes here and {theirs} bytes at {peer.address}",
                hint="both engines need the same model, dtype, chunk_size and tensor parallel size",
            )

    # ---- messages ----

    def _dispatch(self, peer: kvlink.Peer, message: bytes) -> bytes:
        handler = self._handlers.get(message[:1])
        if handler is None:
            raise RequestError(f"message of unknown kind {message[:1]!r}; is the peer of another version or role?")
        return handler(peer, message[1:])

    def _greeted(self, peer: kvlink.Peer, body: bytes) -> bytes:
        greeting = msgspec.msgpack.decode(body, type=Greeting)
        self._check_pages(greeting.page_bytes, peer)
        answer = b""
        if greeting.side:
            if self.answer_side is None:
                raise RequestError("this side expects no side message")
            answer = self.answer_side(greeting.side)
        with self._lock:
            self._peers[greeting.local_id] = peer
        if self.on_greeting is not None:
            self.on_greeting(greeting.local_id, peer)
        return msgspec.msgpack.encode(GreetingAnswer(self.page_bytes, answer))

    # ---- bytes ----

    def blocks(
        self,
        peer: kvlink.Peer,
        local_pages: npt.ArrayLike,
        remote_pages: npt.ArrayLike,
        lengths: npt.ArrayLike,
    ) -> npt.NDArray[np.void]:
        """Builds the ranges of whole or partly filled pages, for the whole batch in one go.

        Args:
            peer: Whose pages.
            local_pages: Page numbers here, int of shape (n,).
            remote_pages: Page numbers there, shape (n,).
            lengths: Bytes of each, shape (n,) or one number.

        Returns:
            The ranges; the engine checks them against both regions.

        Raises:
            ConfigError: Different numbers of pages, or a length beyond the page.
        """
        local = np.asarray(local_pages, dtype=np.int64)
        remote = np.asarray(remote_pages, dtype=np.int64)
        if local.shape != remote.shape or local.ndim != 1:
            raise ConfigError(f"{local.size} pages here do not pair with {remote.size} pages there")
        table = np.empty((local.size, 3), dtype=np.int64)
        table[:, 0] = local * self.page_bytes
        table[:, 1] = remote * self.page_bytes
        table[:, 2] = np.asarray(lengths, dtype=np.int64)
        if local.size and int(table[:, 2].max()) > self.page_bytes:
            raise ConfigError(
                f"an object of {int(table[:, 2].max())} bytes exceeds the page of {self.page_bytes} bytes"
            )
        return kvlink.ranges(self.region, peer.regions[REGION], table)

    def trace(self, what: str, peer: kvlink.Peer, transfer: kvlink.Transfer) -> None:
        """Logs one line for a transfer that ended well."""
        if _log.isEnabledFor(10):
            result = transfer.result()
            seconds = max(result.duration_s, 1e-9)
            _log.debug(
                "%s %s: %d bytes in %d ranges by %s, %.3f ms, %.2f GB/s",
                what,
                peer.address,
                result.nbytes,
                result.ranges,
                result.path,
                seconds * 1e3,
                result.nbytes / seconds / 1e9,
            )

    def close(self) -> None:
        """Closes the channel; nothing of it touches the region afterwards. Idempotent."""
        self.channel.on_request = None
        try:
            self.channel.close()
        except KvlinkError as error:
            _log.warning("closing the channel: %s", error)


def page_table(objects: Sequence[Any], page_bytes: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Returns page numbers and bytes of LMCache's memory objects.

    Args:
        objects: ``MemoryObj`` of a paged allocator, whose ``meta.address`` is a page number.
        page_bytes: Bytes of a page.

    Raises:
        ConfigError: Something else, such as plain bytes.
    """
    count = len(objects)
    try:
        pages = np.fromiter((item.meta.address for item in objects), dtype=np.int64, count=count)
        # Not get_size(): LMCache answers with the whole page for an object of fewer tokens.
        sizes = np.fromiter((item.raw_data.nbytes for item in objects), dtype=np.int64, count=count)
    except AttributeError:
        kind = type(objects[0]).__name__
        raise ConfigError(f"objects of type {kind} are not in the registered buffer; expected MemoryObj") from None
    if count and int(sizes.max()) > page_bytes:
        raise ConfigError(f"an object of {int(sizes.max())} bytes exceeds the page of {page_bytes} bytes")
    return pages, sizes
