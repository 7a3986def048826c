"""Fixtures: fake engines and proxies on free ports."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from proxy_fake_engine import FakeEngine, ThreadServer, listen, wait_until

pytest.importorskip("kvlink_proxy")

from kvlink_proxy.app import create_app
from kvlink_proxy.config import ProxyConfig
from kvlink_proxy.service import Service


class Proxy:
    """A proxy in a thread, with a client."""

    def __init__(self, prefillers: list[str], decoders: list[str], **settings: Any) -> None:
        defaults: dict[str, Any] = {"health_interval": 0.2, "connect_timeout": 2.0}
        self.config = ProxyConfig(tuple(prefillers), tuple(decoders), **{**defaults, **settings})
        app = create_app(self.config)
        self.service: Service = app.state.service
        self.listener = listen()
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.server = ThreadServer(app, self.listener)
        self.http = httpx.Client(base_url=self.url, timeout=30, trust_env=False, verify=False)

    def wait_checked(self) -> None:
        """Wait until every engine had its first health check."""
        engines = [*self.service.prefillers.engines, *self.service.decoders.engines]
        wait_until(lambda: all(engine.state != "unknown" for engine in engines), 20, "the first health checks")

    def metric(self, name: str, **labels: str) -> float:
        return self.service.metrics.registry.get_sample_value(f"kvlink_proxy_{name}", labels) or 0.0

    def complete(self, **body: Any) -> httpx.Response:
        return self.http.post("/v1/completions", json={"model": "fake", "prompt": "a b c d", "max_tokens": 4, **body})

    def chat(self, **body: Any) -> httpx.Response:
        message = {"role": "user", "content": "a b c"}
        return self.http.post("/v1/chat/completions", json={"model": "fake", "messages": [message], **body})

    def close(self) -> None:
        self.http.close()
        self.server.stop()


def events_of(text: str) -> list[Any]:
    """Parse a stream; its end mark comes back as the string "[DONE]"."""
    lines = [line[6:] for line in text.replace("\r\n", "\n").split("\n\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


@pytest.fixture
def engines() -> Iterator[Callable[..., FakeEngine]]:
    """Make fake engines: ``engines("prefill", delay=1)``."""
    made: list[FakeEngine] = []
    with ExitStack() as stack:

        def make(role: str, **behaviour: Any) -> FakeEngine:
            made.append(FakeEngine(role, **behaviour))
            stack.callback(made[-1].stop)
            return made[-1]

        yield make
        for engine in made:
            engine.ask_to_stop()


@pytest.fixture
def proxies() -> Iterator[Callable[..., Proxy]]:
    """Make proxies: ``proxies([prefiller], [decoder], max_attempts=1)``; engines or URLs."""
    with ExitStack() as stack:

        def make(prefillers: list[Any], decoders: list[Any], *, checked: bool = True, **settings: Any) -> Proxy:
            urls = [[getattr(engine, "url", engine) for engine in side] for side in (prefillers, decoders)]
            proxy = Proxy(urls[0], urls[1], **settings)
            stack.callback(proxy.close)
            if checked:
                proxy.wait_checked()
            return proxy

        yield make


@pytest.fixture
def free_port() -> int:
    """A port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
