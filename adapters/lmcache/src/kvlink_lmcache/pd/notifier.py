"""Tells the proxy how hand-offs end, on the ZeroMQ socket that LMCache's proxy listens on."""

from __future__ import annotations

import msgspec
import zmq

from ..log import get_logger
from .wire import KVLinkFailureNotif, ProxyNotif

_log = get_logger()


class ProxyNotifier:
    """Pushes messages to the proxy. Used from one thread; never blocks.

    A proxy that is down gets what fits into the socket's queue when it is back; it ignores requests it does not know.
    """

    def __init__(self, address: str | None, rank: int, world_size: int, *, failures: bool) -> None:
        """Prepares; the connection is made in the background.

        Args:
            address: "host:port" of the proxy, or None to tell nobody.
            rank: This rank.
            world_size: Ranks of the engine.
            failures: Also send :class:`KVLinkFailureNotif`, which LMCache's own proxy does not know.
        """
        self._rank = rank
        self._world_size = world_size
        self._failures = failures
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._socket: zmq.Socket[bytes] | None = None
        if address is not None:
            self._context = zmq.Context()
            self._socket = self._context.socket(zmq.PUSH)
            self._socket.setsockopt(zmq.LINGER, 0)
            self._socket.setsockopt(zmq.IPV6, 1)
            self._socket.connect(f"tcp://{address}")

    def done(self, req_id: str) -> None:
        """Says that this rank's part of a request is at the decoder."""
        self._send(ProxyNotif(req_id, self._rank, self._world_size))

    def failed(self, req_id: str, reason: str, never: bool) -> None:
        """Says that this rank's part of a request will not arrive.

        Args:
            req_id: The request.
            reason: Why.
            never: It can never fit.
        """
        if self._failures:
            self._send(KVLinkFailureNotif(req_id, self._rank, self._world_size, reason, never))

    def _send(self, message: ProxyNotif | KVLinkFailureNotif) -> None:
        if self._socket is None:
            return
        try:
            self._socket.send(msgspec.msgpack.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            _log.warning(
                "the proxy takes no messages; %s for request %s is lost", type(message).__name__, message.req_id
            )

    def close(self) -> None:
        """Closes the socket; unsent messages are dropped."""
        if self._socket is not None and self._context is not None:
            self._socket.close()
            self._context.term()
            self._socket = None
