"""What tests are made of: fake engines and proxies in threads, streams parsed, waiting with a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import uvicorn
from proxy_fake_engine import Behaviour, Engine, make_app

from kvlink_proxy.app import create_app
from kvlink_proxy.config import ProxyConfig
from kvlink_proxy.service import Service


def listen(port: int = 0) -> socket.socket:
    """Listen on loopback. The protocol is named because asyncio sets TCP_NODELAY only on sockets that name it."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(128)
    return listener


class FakeEngine:
    """An engine in a thread of this process, on a free port."""

    def __init__(self, role: str, **behaviour: Any) -> None:
        self.engine = Engine(role, Behaviour(**behaviour))
        self.socket = listen()
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server: ThreadServer | None = ThreadServer(make_app(self.engine), self.socket)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def stop(self) -> None:
        """Refuse connections from now on."""
        if self._server is not None:
            self._server.stop()
            self._server = None

    def ask_to_stop(self) -> None:
        """Begin to stop, so that several engines do it at once."""
        if self._server is not None:
            self._server.ask_to_stop()

    def start_again(self) -> None:
        self.socket = listen(self.port)
        self._server = ThreadServer(make_app(self.engine), self.socket)


class ThreadServer:
    """uvicorn in a thread."""

    def __init__(self, app: Any, listener: socket.socket, *, make: Callable[..., uvicorn.Server] | None = None) -> None:
        config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1, timeout_keep_alive=5)
        self.server = make(config) if make else uvicorn.Server(config)
        self.thread = threading.Thread(target=self._run, args=(listener,), daemon=True)
        self.thread.start()
        wait_until(lambda: self.server.started or not self.thread.is_alive(), 20, "the server's start")

    def _run(self, listener: socket.socket) -> None:
        with contextlib.suppress(SystemExit):
            asyncio.run(self.server.serve(sockets=[listener]))

    def ask_to_stop(self) -> None:
        self.server.should_exit = True

    def stop(self) -> None:
        self.ask_to_stop()
        self.thread.join(15)
        assert not self.thread.is_alive(), "the server did not stop"


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait for a condition, with a deadline that fails the test."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.01)


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


Engines = Callable[..., FakeEngine]
Proxies = Callable[..., Proxy]
Setup = tuple[FakeEngine, FakeEngine, Proxy]
