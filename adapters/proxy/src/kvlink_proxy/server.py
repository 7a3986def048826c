"""Runs the proxy: listens, drains on SIGTERM or Ctrl-C, ends with status 0."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType

import uvicorn

from kvlink_proxy.app import create_app
from kvlink_proxy.config import ProxyConfig
from kvlink_proxy.service import Service

logger = logging.getLogger(__name__)


class ProxyServer(uvicorn.Server):
    """A uvicorn server that ends by itself after a signal instead of raising the signal again.

    Args:
        config: uvicorn's settings.
        service: The proxy, told that it drains.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM while the server runs.

        Yields:
            Nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; at a second signal, stop at once.

        Args:
            sig: The signal.
            frame: Unused.
        """
        del frame
        if self.should_exit:
            self.force_exit = True
            return
        logger.info("%s: draining, %d requests in work", signal.Signals(sig).name, self._service.active)
        self._service.draining = True
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening and say where.

        Args:
            sockets: Sockets to listen on instead of the configured address.
        """
        await super().startup(sockets=sockets)
        for server in self.servers:
            for listener in server.sockets:
                host, port = listener.getsockname()[:2]
                logger.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)


def run(config: ProxyConfig) -> int:
    """Serve until a signal comes.

    Args:
        config: The settings.

    Returns:
        Exit status: 0 after a drain, 1 where it could not start.
    """
    try:
        app = create_app(config)
    except OSError as error:
        logger.error("%s", error)  # noqa: TRY400 -- the message says it all
        return 1
    service: Service = app.state.service
    settings = uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=max(1, round(config.drain_seconds)),
        timeout_keep_alive=75,
        server_header=False,
        proxy_headers=False,
    )
    server = ProxyServer(settings, service)
    logger.info("prefill: %s; decode: %s", ", ".join(config.prefillers), ", ".join(config.decoders))
    try:
        server.run()  # on uvloop where it is installed
    except SystemExit:  # uvicorn's way to say that it cannot listen; the reason is in the log
        return 1
    return 0 if server.started else 1
