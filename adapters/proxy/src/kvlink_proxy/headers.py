"""Which headers go on to an engine, and which come back to a client."""

from __future__ import annotations

from collections.abc import Iterable

_HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
# x-request-id becomes the engine's key of a request's state, so it is the proxy's to make; the rank of a data parallel
# engine is the router's to choose; the body is written anew.
_NOT_UPSTREAM = _HOP_BY_HOP | {
    "accept-encoding",
    "content-encoding",
    "content-length",
    "content-type",
    "cookie",
    "expect",
    "host",
    "x-data-parallel-rank",
    "x-request-id",
}
_NOT_DOWNSTREAM = _HOP_BY_HOP | {"content-length", "date", "server", "x-request-id", "set-cookie"}

Headers = list[tuple[str, str]]


def to_engine(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Choose the headers of a client that every engine it reaches may see (Authorization, tracing, priority, ...).

    Args:
        headers: The client's headers in ASGI form.

    Returns:
        Names and values.
    """
    pairs = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in headers]
    named = {item.strip().lower() for name, value in pairs if name == "connection" for item in value.split(",")}
    kept = [(name, value) for name, value in pairs if name not in _NOT_UPSTREAM and name not in named]
    return [*kept, ("accept-encoding", "identity"), ("content-type", "application/json")]


def to_client(headers: Iterable[tuple[str, str]]) -> Headers:
    """Choose the headers of an engine that a client may see.

    Args:
        headers: The engine's headers.

    Returns:
        Names, in lower case, and values.
    """
    return [(name.lower(), value) for name, value in headers if name.lower() not in _NOT_DOWNSTREAM]
