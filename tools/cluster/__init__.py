"""Start vLLM engines and the proxy on this machine, and let nothing of them survive.

Used by the demo, the end-to-end tests and the benchmarks::

    with Cluster(log_dir) as cluster:
        prefill = cluster.engine(EngineSpec("prefill", model, cores="0", transfer=kvlink_config("kv_producer")))
        decode = cluster.engine(EngineSpec("decode", model, cores="1", transfer=kvlink_config("kv_consumer")))
        cluster.wait_ready()
        proxy = cluster.proxy([prefill], [decode])
        cluster.wait_ready()
        print(proxy.complete("Hello").text)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from tools.cluster.client import Completion, HttpError
from tools.cluster.engine import SERVED_NAME, Engine, EngineSpec, Proxy, Server, kvlink_config
from tools.cluster.process import Port, Process, ProcessFailedError
from tools.cluster.trace import Pull, PullTrace

__all__ = [
    "SERVED_NAME",
    "Cluster",
    "Completion",
    "Engine",
    "EngineSpec",
    "HttpError",
    "Port",
    "Process",
    "ProcessFailedError",
    "Proxy",
    "Pull",
    "PullTrace",
    "Server",
    "kvlink_config",
]

START_SECONDS = 300.0


def _silent(line: str) -> None:
    """Take a progress line and drop it."""


class Cluster:
    """Engines and proxies that are ended together, whatever happens.

    Args:
        log_dir: Folder of the logs; made when missing.
        report: Called with one line of progress at a time.
    """

    def __init__(self, log_dir: Path, *, report: Callable[[str], None] = _silent) -> None:
        self.log_dir = log_dir
        self.servers: list[Server] = []
        self._told: list[Server] = []
        self._report = report
        log_dir.mkdir(parents=True, exist_ok=True)

    def engine(self, spec: EngineSpec, *, port: Port | None = None) -> Engine:
        """Start an engine; returns at once.

        Args:
            spec: How to start it.
            port: Where it serves; None for a free port.

        Returns:
            The engine, not ready yet.
        """
        engine = Engine(spec, self.log_dir, port)
        self.servers.append(engine)
        return engine

    def proxy(
        self, prefills: Sequence[Server], decodes: Sequence[Server], *, name: str = "proxy", args: Sequence[str] = ()
    ) -> Proxy:
        """Start a proxy; returns at once.

        Args:
            prefills: The prefillers.
            decodes: The decoders.
            name: For messages and the log's name; unique in a cluster.
            args: More arguments of the proxy.

        Returns:
            The proxy, not ready yet.
        """
        proxy = Proxy(name, prefills, decodes, self.log_dir, args)
        self.servers.append(proxy)
        return proxy

    def wait_ready(self, *, timeout: float = START_SECONDS) -> None:
        """Wait until every server answers.

        Args:
            timeout: Seconds for all of them together.

        Raises:
            ProcessFailedError: One ended, or the time passed; with the end of its log.
        """
        begun = time.monotonic()
        waiting = list(self.servers)
        told = 0.0
        while waiting:
            for server in list(waiting):
                server.check()
                if server.ready():
                    waiting.remove(server)
                    if server not in self._told:
                        self._told.append(server)
                        self._report(f"{server.name} is ready after {time.monotonic() - server.started:.0f} s")
            elapsed = time.monotonic() - begun
            if waiting and elapsed > timeout:
                server = waiting[0]
                raise ProcessFailedError(
                    f"{server.name} was not ready after {timeout:.0f} s; the end of {server.log}:\n{server.tail()}"
                )
            if waiting and elapsed - told >= 10:
                told = elapsed
                self._report(f"waiting for {', '.join(server.name for server in waiting)} ({elapsed:.0f} s)")
            if waiting:
                time.sleep(0.1)

    def stop(self, *servers: Server) -> None:
        """End servers, or all of them, and wait until no process of theirs is left. Idempotent.

        Args:
            *servers: Which ones; none means all.
        """
        chosen = list(servers) or list(reversed(self.servers))
        for server in chosen:
            server.request_stop()
        for server in chosen:
            server.stop()
        self.servers = [server for server in self.servers if server not in chosen]

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
