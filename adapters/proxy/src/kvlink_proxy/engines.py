"""The engines behind the proxy: which one is up, which one is chosen next."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Collection, Iterator
from typing import Literal

import anyio
import httpx

from kvlink_proxy.config import ProxyConfig
from kvlink_proxy.errors import HopError
from kvlink_proxy.metrics import Metrics

Role = Literal["prefill", "decode"]
State = Literal["unknown", "up", "down"]

_REQUEST_COST = 256  # bytes: what a request weighs beside its body, so that many small ones spread too
_PAUSE_WHILE_DOWN = 1.0  # seconds between health checks of an engine that is not up

logger = logging.getLogger(__name__)


class Engine:
    """One engine: its address, what is known of its health, and what it is working on for this proxy.

    Attributes:
        role: "prefill" or "decode".
        url: Base URL.
        state: "unknown" until its first health check.
        in_flight: Requests in work.
        load: Their size in bytes of request body.
        last_error: The last failure in words, or None.
        wake: Set to have the health check look at once.
    """

    def __init__(self, role: Role, url: str, metrics: Metrics, cooldown: float) -> None:
        self.role = role
        self.url = url
        self.state: State = "unknown"
        self.in_flight = 0
        self.load = 0
        self.last_error: str | None = None
        self.wake = asyncio.Event()
        self.last_used = 0
        self._cooldown = cooldown
        self._cool_until = 0.0
        self._in_flight = metrics.in_flight.labels(role, url)
        self._load = metrics.load.labels(role, url)
        self._up = metrics.up.labels(role, url)

    @property
    def cooling(self) -> bool:
        """True for a while after it failed a request."""
        return time.monotonic() < self._cool_until

    @contextlib.contextmanager
    def busy(self, weight: int) -> Iterator[None]:
        """Count a request as in work.

        Args:
            weight: Its size in bytes.

        Yields:
            Nothing.
        """
        cost = weight + _REQUEST_COST
        self.in_flight += 1
        self.load += cost
        self._in_flight.set(self.in_flight)
        self._load.set(self.load)
        try:
            yield
        finally:
            self.in_flight -= 1
            self.load -= cost
            self._in_flight.set(self.in_flight)
            self._load.set(self.load)

    def mark(self, state: State, why: str = "") -> None:
        """Set what is known of its health; a change is logged once.

        Args:
            state: The new state.
            why: What was seen, for "down".
        """
        if state == "down":
            self.last_error = why
        if state != self.state:
            level = logging.WARNING if state == "down" else logging.INFO
            logger.log(level, "%s engine %s is %s%s", self.role, self.url, state, f": {why}" if why else "")
        self.state = state
        self._up.set(1 if state == "up" else 0)

    def failed(self, error: HopError) -> None:
        """Learn from a failed attempt.

        A refused connection takes the engine out until a health check brings it back; anything else makes it the last
        choice for a while, and has its health looked at now.

        Args:
            error: The attempt.
        """
        self.last_error = str(error)
        self._cool_until = time.monotonic() + self._cooldown
        if error.kind == "connect":
            self.mark("down", str(error))
        if error.kind in ("connect", "transport", "timeout"):
            self.wake.set()

    def describe(self) -> dict[str, object]:
        """Say how it is, for ``/health``.

        Returns:
            A JSON object.
        """
        return {
            "url": self.url,
            "state": self.state,
            "in_flight": self.in_flight,
            "load_bytes": self.load,
            "last_error": self.last_error,
        }


class EnginePool:
    """The engines of one role.

    Attributes:
        engines: All of them, in the order given.
    """

    def __init__(self, role: Role, urls: Collection[str], metrics: Metrics, cooldown: float) -> None:
        self.engines = [Engine(role, url, metrics, cooldown) for url in urls]
        self._uses = 0

    @property
    def up(self) -> list[Engine]:
        """The engines that answered their last health check."""
        return [engine for engine in self.engines if engine.state == "up"]

    def pick(self, exclude: Collection[Engine] = (), *, even_down: bool) -> Engine | None:
        """Choose the engine with the least work, measured in bytes of request bodies.

        Args:
            exclude: Engines not to choose.
            even_down: Whether one that is down is better than none.

        Returns:
            The engine, or None.
        """
        usable = [e for e in self.engines if e not in exclude and (even_down or e.state != "down")]
        if not usable:
            return None
        chosen = min(usable, key=lambda e: (e.state == "down", e.cooling, e.load, e.last_used))
        self._uses += 1
        chosen.last_used = self._uses
        return chosen


async def watch(engine: Engine, client: httpx.AsyncClient, config: ProxyConfig) -> None:
    """Check an engine's health for ever.

    A refused connection or an error counts at once; a slow answer only the second time in a row, because an engine's
    HTTP server is slow to answer while it takes a large request in.

    Args:
        engine: The engine.
        client: The client to ask with.
        config: The proxy's settings.
    """
    slow = 0
    while True:
        engine.wake.clear()
        try:
            with anyio.fail_after(config.health_timeout):
                answer = await client.get(f"{engine.url}/health")
            slow = 0
            if answer.status_code == 200:
                engine.mark("up")
            else:
                engine.mark("down", f"its /health answered {answer.status_code}")
        except (TimeoutError, httpx.TimeoutException):
            slow += 1
            if slow > 1 or engine.state == "unknown":
                engine.mark("down", f"its /health did not answer within {config.health_timeout:g} s")
        except httpx.HTTPError as error:
            engine.mark("down", f"its /health failed: {error or type(error).__name__}")
        except Exception as error:  # such as httpx.InvalidURL: a watcher that ended would leave the state as it is
            if engine.state != "down":
                logger.exception("%s engine %s: unexpected error in its health check", engine.role, engine.url)
            engine.mark("down", f"its /health could not be asked: {type(error).__name__}: {error}")
        pause = config.health_interval if engine.state == "up" else min(config.health_interval, _PAUSE_WHILE_DOWN)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(engine.wake.wait(), pause)
