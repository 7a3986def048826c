"""Fixtures: fake engines and proxies on free ports."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

pytest.importorskip("kvlink_proxy")

from proxy_servers import FakeEngine, Proxy, Setup


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


@pytest.fixture
def pd(engines: Callable[..., FakeEngine], proxies: Callable[..., Proxy]) -> Setup:
    """One prefiller, one decoder, and a proxy in front of them."""
    p, d = engines("prefill"), engines("decode")
    return p, d, proxies([p], [d])
