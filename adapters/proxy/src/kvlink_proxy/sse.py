"""Server-sent events: passed on whole, and looked into only where something must not pass."""

from __future__ import annotations

import json

from kvlink_proxy.rewrite import UNTRUSTED_KEYS, encode

_MARKERS = tuple(f'"{key}"'.encode() for key in UNTRUSTED_KEYS)
_DONE = b"data: [DONE]"
MAX_EVENT_BYTES = 64 << 20


class EventFilter:
    """Cuts a byte stream at event ends and takes transfer parameters out of events that carry them.

    The usual chunk is one whole event without such a key: it costs one suffix test and a search, and comes back as the
    same object.
    """

    def __init__(self) -> None:
        self._partial = b""
        self._done = False

    @property
    def done(self) -> bool:
        """True once the stream's own end mark went through."""
        return self._done

    def feed(self, chunk: bytes) -> bytes:
        """Take a piece of the stream.

        Args:
            chunk: Bytes as they came.

        Returns:
            The whole events that are now complete, maybe none.

        Raises:
            ValueError: An event is larger than :data:`MAX_EVENT_BYTES`.
        """
        data = self._partial + chunk if self._partial else chunk
        if data.endswith(b"\n\n"):
            self._partial = b""
        else:
            end = max(_end_of(data, b"\n\n"), _end_of(data, b"\r\n\r\n"))
            data, self._partial = data[:end], data[end:]
            if len(self._partial) > MAX_EVENT_BYTES:
                raise ValueError(f"an event is larger than {MAX_EVENT_BYTES} bytes")
        if _DONE in data and _ends_stream(data):
            self._done = True
        for marker in _MARKERS:
            if marker in data:
                return b"\n".join(_clean_line(line) for line in data.split(b"\n"))
        return data


def first_error(events: bytes) -> dict[str, object] | None:
    """Look whether a stream begins with an error instead of output.

    Engines answer 200 before they know whether a request works, and say what went wrong in the first event.

    Args:
        events: The first events of a stream.

    Returns:
        The error object, or None where the stream begins otherwise.
    """
    line = events.lstrip().split(b"\n", 1)[0]
    if not line.startswith(b"data:") or b'"error"' not in line[:64]:
        return None
    try:
        event = json.loads(line[5:])
    except ValueError:
        return None
    error = event.get("error") if isinstance(event, dict) else None
    return error if isinstance(error, dict) else None


def error_event(body: bytes) -> bytes:
    """Make the event that ends a broken stream. No end mark follows it: the answer is not whole.

    Args:
        body: An error body in JSON.

    Returns:
        The event.
    """
    return b"data: " + body + b"\n\n"


def _end_of(data: bytes, mark: bytes) -> int:
    at = data.rfind(mark)
    return at + len(mark) if at >= 0 else 0


def _ends_stream(data: bytes) -> bool:
    # A model may write the mark's text; inside JSON it cannot stand at the start of a line.
    return any(line.strip() == _DONE for line in data.split(b"\n"))


def _clean_line(line: bytes) -> bytes:
    if not line.startswith(b"data:") or not any(marker in line for marker in _MARKERS):
        return line
    try:
        event = json.loads(line[5:])
    except (ValueError, RecursionError):
        return line
    if not isinstance(event, dict) or not any(key in event for key in UNTRUSTED_KEYS):
        return line  # the text only, say a model that writes about this very key
    for key in UNTRUSTED_KEYS:
        event.pop(key, None)
    return b"data: " + encode(event) + (b"\r" if line.endswith(b"\r") else b"")
