"""One request to one engine, with its deadlines. Every failure comes out as a :class:`HopError` naming the engine."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import anyio
import httpx

from kvlink_proxy.config import ProxyConfig
from kvlink_proxy.engines import Engine
from kvlink_proxy.errors import HopError, PassThrough
from kvlink_proxy.headers import RawHeaders, to_client

_BUSY = (429, 503)
# Statuses below 500 that speak of the engine's moment, not of the request.
_RETRY_BELOW_500 = (408, 425, 429)


def make_client(config: ProxyConfig) -> httpx.AsyncClient:
    """Make the HTTP client for all engines.

    Deadlines are set by the callers, hop by hop, so the client itself has only the connect timeout. Idle connections
    are dropped before vLLM's server drops them (5 s), so that no request meets a connection just closed.

    Args:
        config: The proxy's settings.

    Returns:
        The client. Proxy settings of the environment are not followed: engines are near.
    """
    tls = any(url.startswith("https:") for url in (*config.prefillers, *config.decoders))
    transport = httpx.AsyncHTTPTransport(
        verify=tls,  # reading the certificates takes longer than the rest of the start
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=4.0),
        socket_options=[(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
    )
    return httpx.AsyncClient(
        transport=transport, timeout=httpx.Timeout(None, connect=config.connect_timeout), trust_env=False
    )


@contextlib.contextmanager
def hop_errors(hop: str, engine: Engine, began: float, waiting_for: str) -> Iterator[None]:
    """Turn what httpx and deadlines raise into a :class:`HopError`.

    Args:
        hop: "prefill" or "decode".
        engine: The engine asked.
        began: ``time.monotonic()`` when the attempt began.
        waiting_for: What was awaited, for a deadline's message.

    Yields:
        Nothing.

    Raises:
        HopError: Something failed within.
    """
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        text = "is not reachable: " + (str(error) or type(error).__name__)
        raise HopError(hop, engine.url, time.monotonic() - began, "connect", text) from error
    except TimeoutError as error:
        text = f"did not send {waiting_for} in time"
        raise HopError(hop, engine.url, time.monotonic() - began, "timeout", text) from error
    except httpx.HTTPError as error:
        text = "broke the connection: " + (str(error) or type(error).__name__)
        raise HopError(hop, engine.url, time.monotonic() - began, "transport", text) from error


def check_status(hop: str, engine: Engine, began: float, response: httpx.Response) -> None:
    """Sort an engine's status; its body must have been read.

    Args:
        hop: "prefill" or "decode".
        engine: The engine.
        began: ``time.monotonic()`` when the attempt began.
        response: Its answer.

    Raises:
        PassThrough: It refuses the request itself (4xx), so another engine would too.
        HopError: It failed, or is too busy.
    """
    status = response.status_code
    if status == 200:
        return
    answer = PassThrough(status, to_client(response.headers.raw), response.content)
    if 400 <= status < 500 and status not in _RETRY_BELOW_500:
        raise answer
    text = f"answered {status}: {_message_of(response.content)}"
    elapsed = time.monotonic() - began
    raise HopError(hop, engine.url, elapsed, "status", text, status=status, answer=answer if status in _BUSY else None)


@dataclass(frozen=True)
class Handoff:
    """What a prefiller handed over.

    Attributes:
        params: Its ``kv_transfer_params``, opaque to the proxy; may be empty where the KV goes its own way.
        engine: The prefiller.
        at: ``time.monotonic()`` of its answer.
        seconds: How long the attempt took.
        answer: Its answer.
    """

    params: Mapping[str, Any]
    engine: Engine
    at: float
    seconds: float
    answer: Mapping[str, Any]


async def ask_prefiller(
    client: httpx.AsyncClient,
    engine: Engine,
    path: str,
    body: bytes,
    headers: RawHeaders,
    timeout: float,
    *,
    params_needed: bool = True,
) -> Handoff:
    """Have a prompt prefilled.

    Args:
        client: The HTTP client.
        engine: The prefiller.
        path: The endpoint.
        body: The request, as ``rewrite.prefill_body`` makes it.
        headers: Headers for the engine.
        timeout: Seconds for the whole answer.
        params_needed: An answer without ``kv_transfer_params`` hands nothing over.

    Returns:
        The hand-off.

    Raises:
        PassThrough: The request is at fault.
        HopError: The prefiller failed, or handed nothing over.
    """
    began = time.monotonic()
    with hop_errors("prefill", engine, began, "its answer"), anyio.fail_after(timeout):
        response = await client.post(engine.url + path, content=body, headers=headers)
    check_status("prefill", engine, began, response)
    now = time.monotonic()
    try:
        answer = response.json()
    except ValueError:
        answer = None
    params = answer.get("kv_transfer_params") if isinstance(answer, dict) else None
    if not isinstance(params, dict):
        params = {}
    if not params and params_needed:
        text = "handed no KV blocks over (is it started with a --kv-transfer-config of role kv_producer or kv_both?)"
        raise HopError("prefill", engine.url, now - began, "no_kv_params", text)
    return Handoff(params, engine, now, now - began, answer if isinstance(answer, dict) else {})


@dataclass(frozen=True)
class Stream:
    """A decoder's answer that has begun.

    Attributes:
        response: The response, open.
        first: Its first bytes; the whole body where it is not a stream of events.
        rest: What follows.
        events: True for a stream of events.
        began: ``time.monotonic()`` when the request was sent.
    """

    response: httpx.Response
    first: bytes
    rest: AsyncIterator[bytes]
    events: bool
    began: float


@contextlib.asynccontextmanager
async def ask_decoder(
    client: httpx.AsyncClient, engine: Engine, path: str, body: bytes, headers: RawHeaders, timeout: float
) -> AsyncIterator[Stream]:
    """Have a request decoded; the answer's connection is closed at the end, which makes the engine drop the request.

    Args:
        client: The HTTP client.
        engine: The decoder.
        path: The endpoint.
        body: The request.
        headers: Headers for the engine.
        timeout: Seconds until the first bytes of a stream, or the whole of another answer.

    Yields:
        The answer, once it has begun.

    Raises:
        PassThrough: The request is at fault.
        HopError: The decoder failed before its answer began.
    """
    began = time.monotonic()
    async with contextlib.AsyncExitStack() as stack:
        with hop_errors("decode", engine, began, "the first bytes of its answer"), anyio.fail_after(timeout):
            request = client.build_request("POST", engine.url + path, content=body, headers=headers)
            response = await client.send(request, stream=True)
            stack.push_async_callback(_close, response)
            kind = response.headers.get("content-type", "")
            events = response.status_code == 200 and kind.startswith("text/event-stream")
            if events:
                # An async generator: closed here, in order, and not whenever the collector comes by.
                rest = await stack.enter_async_context(contextlib.aclosing(_raw(response)))
                first = await anext(rest, b"")
            else:
                rest, first = await stack.enter_async_context(contextlib.aclosing(_nothing())), await response.aread()
        check_status("decode", engine, began, response)
        yield Stream(response, first, rest, events, began)


async def _close(response: httpx.Response) -> None:
    with anyio.CancelScope(shield=True), contextlib.suppress(httpx.HTTPError):
        await response.aclose()


async def _raw(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    async for chunk in response.aiter_raw():
        yield chunk


async def _nothing() -> AsyncGenerator[bytes, None]:
    return
    yield b""


def _message_of(body: bytes) -> str:
    text = body[:4096].decode("utf-8", "replace")
    with contextlib.suppress(ValueError, AttributeError, KeyError, TypeError):
        text = str(json.loads(body)["error"]["message"])
    return text[:500] or "(an empty body)"
