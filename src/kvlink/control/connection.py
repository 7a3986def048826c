"""One authenticated control connection: frames, their tags, and flow control.

A message travels as one or more frames of at most 16 KiB: ``length u32, kind u8, payload, tag[16]``.

The flow control is there for liveness. ``TCP_USER_TIMEOUT`` is what notices a dead host, but the kernel also applies it
to a peer whose receive window stays closed, so a living peer that does not read for a while (its thread holds the GIL)
would be dropped. Therefore a side keeps at most ``WINDOW`` unread bytes on the wire, few enough that the window never
closes, and queues the rest itself until the peer says what it has read.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque

from kvlink.control import messages
from kvlink.control.auth import TAG_BYTES, FrameAuthenticator
from kvlink.control.wire import ProtocolError

CHUNK = 16 << 10
WINDOW = 64 << 10
#: Small frames are charged at what they cost the kernel's receive buffer.
MIN_COST = 512

_MORE, _LAST, _CREDIT = 0, 1, 2
_HEADER = struct.Struct("<IB")
_CREDIT_BODY = struct.Struct("<I")


class Connection:
    """Sends and receives messages; belongs to the control loop's thread.

    Args:
        reader: Stream positioned behind the verdict.
        writer: Its other direction.
        send_key: Key of the frames we send.
        receive_key: Key of the frames we receive.

    Attributes:
        limit: Most bytes that a received message may have; raised as trust grows.
        queued: Bytes accepted by ``send`` and not yet handed to the kernel; a small message counts as ``MIN_COST``.
        adopted: Whether a session owns it, and closes it at its end.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, send_key: bytes, receive_key: bytes
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._out = FrameAuthenticator(send_key)
        self._in = FrameAuthenticator(receive_key)
        self._queue: deque[tuple[int, bytes]] = deque()
        self._credit = WINDOW
        self._consumed = 0
        self._flushed: asyncio.Future[None] | None = None
        self.limit = messages.MAX_HELLO_MESSAGE
        self.queued = 0
        self.adopted = False

    @property
    def writer(self) -> asyncio.StreamWriter:
        """The stream's writing side."""
        return self._writer

    def send(self, message: messages.Message) -> None:
        """Queue a message; it leaves at once when the peer has room. Never blocks, never raises for a dead peer."""
        data = messages.encode(message)
        view = memoryview(data)
        for start in range(0, len(data), CHUNK):
            kind = _LAST if start + CHUNK >= len(data) else _MORE
            part = data if len(data) <= CHUNK else bytes(view[start : start + CHUNK])
            self.queued += max(len(part), MIN_COST)
            self._queue.append((kind, part))
        self._pump()

    async def receive(self) -> messages.Message:
        """Wait for the next message.

        Raises:
            ProtocolError: It is too long, malformed or not authentic; the connection is of no more use.
            asyncio.IncompleteReadError: The peer closed the connection.
            OSError: The connection broke.
        """
        parts: list[bytes] = []
        size = 0
        while True:
            kind, payload = await self._frame()
            if kind == _CREDIT:
                self._take_credit(payload)
                continue
            size += len(payload)
            if size > self.limit:
                raise ProtocolError(f"a message of more than {self.limit} bytes")
            if kind == _LAST:
                return messages.decode(payload if not parts else b"".join((*parts, payload)))
            parts.append(payload)

    async def flush(self) -> None:
        """Wait until everything queued was handed to the kernel; needs somebody in ``receive`` meanwhile."""
        if self._queue and not self._writer.is_closing():
            if self._flushed is None:
                self._flushed = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._flushed)

    def end(self) -> None:
        """Tell the peer that nothing more will come; reading goes on."""
        self._queue.clear()
        try:
            if self._writer.can_write_eof() and not self._writer.is_closing():
                self._writer.write_eof()
        except OSError:
            pass  # it is broken already

    async def drained(self) -> None:
        """Read and drop everything until the peer's side of the connection has ended."""
        try:
            while await self._reader.read(1 << 16):
                pass
        except OSError:
            pass

    def close(self) -> None:
        """Close the socket after what the kernel has already taken; idempotent."""
        self._queue.clear()
        self._writer.close()

    def abort(self) -> None:
        """Close the socket at once."""
        self._queue.clear()
        self._writer.transport.abort()

    async def _frame(self) -> tuple[int, bytes]:
        header = await self._reader.readexactly(_HEADER.size)
        length, kind = _HEADER.unpack(header)
        if kind > _CREDIT or length > CHUNK or (kind == _MORE and length == 0):
            raise ProtocolError(f"a frame of kind {kind} and {length} bytes")
        body = await self._reader.readexactly(length + TAG_BYTES)
        payload, tag = body[:length], body[length:]
        if not self._in.check(tag, header, payload):
            raise ProtocolError("a frame that is not authentic: changed, repeated, or from someone else")
        if kind != _CREDIT:
            self._consumed += max(length, MIN_COST)
            if self._consumed >= WINDOW // 4:
                self._write(_CREDIT, _CREDIT_BODY.pack(self._consumed))
                self._consumed = 0
        return kind, payload

    def _take_credit(self, payload: bytes) -> None:
        if len(payload) != _CREDIT_BODY.size:
            raise ProtocolError(f"a credit of {len(payload)} bytes")
        self._credit = min(self._credit + _CREDIT_BODY.unpack(payload)[0], WINDOW)
        self._pump()

    def _pump(self) -> None:
        while self._queue and self._credit > 0:
            kind, payload = self._queue.popleft()
            cost = max(len(payload), MIN_COST)
            self.queued -= cost
            self._credit -= cost
            self._write(kind, payload)
        if not self._queue and self._flushed is not None:
            if not self._flushed.done():
                self._flushed.set_result(None)
            self._flushed = None

    def _write(self, kind: int, payload: bytes) -> None:
        if self._writer.is_closing():
            return
        header = _HEADER.pack(len(payload), kind)
        self._writer.write(b"".join((header, payload, self._out.tag(header, payload))))
