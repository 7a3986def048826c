"""A small client for OpenAI-style completions that times the first token. Standard library only."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


class HttpError(RuntimeError):
    """A server answered with an error status.

    Attributes:
        status: The HTTP status.
        body: The answer's body.
    """

    def __init__(self, url: str, status: int, body: str) -> None:
        super().__init__(f"{url} answered {status}: {body[:2000]}")
        self.status = status
        self.body = body


@dataclass
class Completion:
    """A completion as the client saw it.

    Attributes:
        text: The generated text.
        token_ids: The generated tokens (empty when the server does not return them).
        finish_reason: "stop", "length", or None.
        usage: The server's token counts.
        ttft_s: Seconds from sending the request to its first token.
        total_s: Seconds from sending the request to its last byte.
        raw: The last object received.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    ttft_s: float = 0.0
    total_s: float = 0.0
    raw: dict[str, Any] = field(default_factory=dict)


def _connect(url: str, timeout: float) -> tuple[http.client.HTTPConnection, str]:
    parts = urlsplit(url)
    if parts.hostname is None:
        raise ValueError(f"{url!r} has no host")
    return http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout), parts.path or "/"


def get(url: str, *, timeout: float = 5.0) -> tuple[int, str]:
    """Send a GET request.

    Args:
        url: Where to.
        timeout: Seconds for each step.

    Returns:
        The status and the body.

    Raises:
        OSError: The server cannot be reached.
    """
    connection, path = _connect(url, timeout)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode("utf-8", "replace")
    except http.client.HTTPException as error:
        raise ConnectionError(f"{url}: {error!r}") from error
    finally:
        connection.close()


def complete(
    url: str,
    prompt: str | list[int],
    *,
    model: str,
    max_tokens: int = 100,
    stream: bool = True,
    timeout: float = 300.0,
    **extra: Any,
) -> Completion:
    """Ask for a greedy completion and time it.

    Args:
        url: Base URL of an engine or the proxy.
        prompt: Text, or token ids.
        model: Name of the served model.
        max_tokens: Most tokens to generate.
        stream: Ask for a stream (needed for a true time of the first token).
        timeout: Seconds for each step of the exchange.
        **extra: More fields of the request's body; they override ours.

    Returns:
        The completion.

    Raises:
        HttpError: The server answered with an error.
        OSError: The connection failed.
    """
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": stream,
        "return_token_ids": True,
    }
    if stream:
        body["stream_options"] = {"include_usage": True}
    body.update(extra)
    connection, _ = _connect(url, timeout)
    result = Completion()
    started = time.perf_counter()
    try:
        connection.request("POST", "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise HttpError(url, answer.status, answer.read().decode("utf-8", "replace"))
        if stream:
            _read_stream(url, answer, result, started)
        else:
            _take(result, json.loads(answer.read()))
            result.ttft_s = time.perf_counter() - started
    except http.client.HTTPException as error:
        raise ConnectionError(f"{url}: {error!r}") from error
    finally:
        connection.close()
    result.total_s = time.perf_counter() - started
    return result


def _read_stream(url: str, answer: http.client.HTTPResponse, result: Completion, started: float) -> None:
    """Read server-sent events until [DONE]."""
    for line in answer:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        event: Mapping[str, Any] = json.loads(data)
        if "error" in event:
            raise HttpError(url, 200, json.dumps(event["error"]))
        before = len(result.token_ids), len(result.text)
        _take(result, event)
        if not result.ttft_s and (len(result.token_ids), len(result.text)) != before:
            result.ttft_s = time.perf_counter() - started
    raise ConnectionError(f"{url}: the stream ended without [DONE]")


def _take(result: Completion, event: Mapping[str, Any]) -> None:
    """Add one object of the answer to the result."""
    result.raw = dict(event)
    if event.get("usage"):
        result.usage = dict(event["usage"])
    for choice in event.get("choices", [])[:1]:
        result.text += choice.get("text") or ""
        result.token_ids += choice.get("token_ids") or []
        result.finish_reason = choice.get("finish_reason") or result.finish_reason
