"""What can go wrong in the proxy, and how it is told to a client.

Three kinds, because they are handled in three ways: a :class:`ProxyError` is the proxy's own answer to the client, a
:class:`HopError` is one failed attempt at one engine (another may follow), and a :class:`PassThrough` is an engine's
refusal that belongs to the client as it is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

HopKind = Literal["connect", "transport", "timeout", "status", "stream", "no_kv_params", "unavailable", "kv"]

_TYPES = {
    400: "BadRequestError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    500: "InternalServerError",
    502: "BadGatewayError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}


def error_body(status: int, message: str) -> bytes:
    """Build an error body in the form that OpenAI clients (and vLLM) use.

    Args:
        status: HTTP status, repeated as the error's code.
        message: What happened.

    Returns:
        The JSON body.
    """
    kind = _TYPES.get(status, "ProxyError")
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": status}}).encode()


class ProxyError(Exception):
    """The proxy's own answer to a request that it cannot serve.

    Attributes:
        status: HTTP status.
        retry_after: Seconds after which a client may try again, or None.
    """

    def __init__(self, status: int, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class PassThrough(Exception):
    """An engine's answer that goes to the client as it is: the request itself is at fault.

    Attributes:
        status: HTTP status of the engine.
        headers: The engine's headers that a client may see.
        body: The engine's body.
    """

    def __init__(self, status: int, headers: Sequence[tuple[str, str]], body: bytes) -> None:
        super().__init__(f"the engine answered {status}")
        self.status = status
        self.headers = headers
        self.body = body


class HopError(Exception):
    """One attempt at one engine failed.

    Attributes:
        hop: "prefill" or "decode".
        engine: The engine's URL, or a phrase where there was none to ask.
        elapsed: Seconds from the start of the attempt.
        kind: Why, as a label of metrics.
        status: The engine's HTTP status where it answered, else None.
        answer: The engine's own answer where a client may be given it (503, 429), else None.
    """

    def __init__(
        self,
        hop: str,
        engine: str,
        elapsed: float,
        kind: HopKind,
        detail: str,
        *,
        status: int | None = None,
        answer: PassThrough | None = None,
    ) -> None:
        super().__init__(f"{hop}: engine {engine} {detail} ({elapsed:.2f} s elapsed)")
        self.hop = hop
        self.engine = engine
        self.elapsed = elapsed
        self.kind = kind
        self.status = status
        self.answer = answer

    def to_client(self) -> ProxyError | PassThrough:
        """Turn the last failed attempt into what the client is told.

        Returns:
            The engine's own "busy" answer where it gave one, else a 502, 503 or 504 that names hop, engine and time.
        """
        if self.answer is not None:
            return self.answer
        if self.kind == "timeout":
            return ProxyError(504, str(self))
        if self.kind in ("connect", "unavailable"):
            return ProxyError(503, str(self), retry_after=1)
        return ProxyError(502, str(self))
