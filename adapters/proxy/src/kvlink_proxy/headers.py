"""Which headers go on to an engine, and which come back to a client."""

from __future__ import annotations

from collections.abc import Iterable

_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
# x-request-id becomes the engine's key of a request's state, so it is the proxy's to make; the rank of a data parallel
# engine is the router's to choose; the body is written anew.
_NOT_UPSTREAM = _HOP_BY_HOP | {
    b"accept-encoding",
    b"content-encoding",
    b"content-length",
    b"content-type",
    b"cookie",
    b"expect",
    b"host",
    b"x-data-parallel-rank",
    b"x-request-id",
}
_NOT_DOWNSTREAM = _HOP_BY_HOP | {b"content-length", b"date", b"server", b"x-request-id", b"set-cookie"}

Headers = list[tuple[str, str]]
RawHeaders = list[tuple[bytes, bytes]]


def to_engine(headers: Iterable[tuple[bytes, bytes]]) -> RawHeaders:
    """Choose the headers of a client that every engine it reaches may see (Authorization, tracing, priority, ...).

    Args:
        headers: The client's headers in ASGI form.

    Returns:
        Names, in lower case, and values, as bytes: a client's need not be ASCII.
    """
    pairs = [(name.lower(), value) for name, value in headers]
    named = {item.strip().lower() for name, value in pairs if name == b"connection" for item in value.split(b",")}
    kept = [(name, value) for name, value in pairs if name not in _NOT_UPSTREAM and name not in named]
    return [*kept, (b"accept-encoding", b"identity"), (b"content-type", b"application/json")]


def to_client(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Choose the headers of an engine that a client may see.

    Args:
        headers: The engine's headers, raw.

    Returns:
        Names, in lower case, and values.
    """
    return [
        (name.lower().decode("latin-1"), value.decode("latin-1"))
        for name, value in headers
        if name.lower() not in _NOT_DOWNSTREAM
    ]
