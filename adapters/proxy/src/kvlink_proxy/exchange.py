"""One client's request and answer, on ASGI's own terms.

Plain ASGI and not a response object: the proxy must see a client go away at any time, must know whether the answer has
begun (until then another engine may be tried), and has nothing to do for a token but pass bytes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import anyio
from starlette.types import Receive, Scope, Send

from kvlink_proxy.errors import PassThrough, ProxyError, error_body


class ClientGone(Exception):
    """The client closed its connection."""


class Exchange:
    """The answer to one request.

    Attributes:
        id: The proxy's own id of the request, in every answer as X-Request-Id.
        started: True once the status line is out.
        notes: Headers that say how the request was served; sent with the status line.
    """

    def __init__(self, request_id: str, send: Send) -> None:
        self.id = request_id
        self.started = False
        self.notes: dict[str, str] = {}
        self._send = send

    async def start(self, status: int, headers: Iterable[tuple[str, str]]) -> None:
        """Send the status line and headers.

        Args:
            status: HTTP status.
            headers: Headers beside the proxy's own.
        """
        self.started = True
        own = {"x-request-id": self.id, **self.notes}
        pairs = [*headers, *own.items()]
        raw = [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in pairs]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def write(self, data: bytes) -> None:
        """Send a piece of the body; returns once the connection has room for more.

        Args:
            data: The bytes.
        """
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def finish(self, data: bytes = b"") -> None:
        """Send the last piece of the body.

        Args:
            data: The bytes, maybe none.
        """
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def whole(self, status: int, headers: Sequence[tuple[str, str]], body: bytes) -> None:
        """Send an answer that is complete.

        Args:
            status: HTTP status.
            headers: Headers beside the proxy's own and the length.
            body: The body.
        """
        await self.start(status, [*headers, ("content-length", str(len(body)))])
        await self.finish(body)

    async def fail(self, error: ProxyError | PassThrough) -> None:
        """Send an error: as the answer, or as the last event of a stream that has begun.

        Args:
            error: What to say.
        """
        if self.started:
            status = error.status
            body = error.body if isinstance(error, PassThrough) else error_body(status, str(error))
            await self.finish(b"data: " + body + b"\n\n")
            return
        if isinstance(error, PassThrough):
            await self.whole(error.status, error.headers, error.body)
            return
        headers = [("content-type", "application/json")]
        if error.retry_after is not None:
            headers.append(("retry-after", str(error.retry_after)))
        await self.whole(error.status, headers, error_body(error.status, str(error)))


async def read_body(scope: Scope, receive: Receive, limit: int, timeout: float) -> bytes:
    """Read a client's body.

    Args:
        scope: The request, for its headers.
        receive: ASGI receive.
        limit: Largest size in bytes.
        timeout: Seconds for all of it.

    Returns:
        The body.

    Raises:
        ProxyError: It is too large (413), too slow (408), or not JSON by its own word (415).
        ClientGone: The connection closed.
    """
    headers = {name.lower(): value for name, value in scope["headers"]}
    media = headers.get(b"content-type", b"application/json").split(b";")[0].strip().lower()
    if media != b"application/json":
        raise ProxyError(415, f"the content type must be application/json, not {media.decode('latin-1')!r}")
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length) > limit:
        raise ProxyError(413, f"the body has {int(length)} bytes, at most {limit} are taken (--max-body-bytes)")
    parts: list[bytes] = []
    size = 0
    try:
        with anyio.fail_after(timeout):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > limit:
                    raise ProxyError(413, f"the body has more than {limit} bytes (--max-body-bytes)")
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise ProxyError(408, f"the body did not come within {timeout:g} s") from None


async def disconnected(receive: Receive) -> None:
    """Wait until the client goes away.

    Args:
        receive: ASGI receive, after the whole body was read.
    """
    while (await receive())["type"] != "http.disconnect":
        pass
