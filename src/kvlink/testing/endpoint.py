"""One side of a test as the cases see it, in this process or in a child."""

from __future__ import annotations

import base64
import os
import signal
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

import numpy as np

from . import resources
from .agent import Agent
from .patterns import Bytes
from .suite import ConformanceFailure, check
from .wire import ChildProcess

Blocks = Sequence[Sequence[int]]

CALL_TIMEOUT = 45.0
"""Seconds that a command may take unless the case says otherwise."""


class Endpoint:
    """Commands of :class:`~kvlink.testing.agent.Agent` as methods; all times are seconds, all sizes bytes."""

    name: str
    open_defaults: Mapping[str, Any]
    any_kind: str = "plain"  # what "any" means here
    plain_alignment: int = 1

    def start(self, command: str, **arguments: Any) -> Future[Any]:
        """Runs a command in the background."""
        raise NotImplementedError

    @property
    def pid(self) -> int:
        """The process it runs in."""
        raise NotImplementedError

    def call(self, command: str, *, deadline: float = CALL_TIMEOUT, **arguments: Any) -> Any:
        """Runs a command.

        Args:
            command: A command of the agent.
            deadline: Seconds after which the case fails.
            **arguments: Of the command.

        Raises:
            ConformanceFailure: It did not end in time.
        """
        future = self.start(command, **arguments)
        try:
            return future.result(deadline)
        except FutureTimeout:
            if future.done():
                raise  # the command's own error, which is a TimeoutError too
        raise ConformanceFailure(f"{self.name}: {command} did not end within {deadline:g} s")

    # ---- channels ----
    def open(self, *, options: Mapping[str, object] | None = None, **settings: Any) -> str:
        """Opens a channel with the options under test and these on top; returns its address."""
        merged = {**self.open_defaults, **settings}
        merged["options"] = {**self.open_defaults.get("options", {}), **(options or {})}
        return str(self.call("open", **merged)["address"])

    def close(self, *, grace: float = 1.0, channel: str = "main") -> float:
        """Closes a channel; returns the seconds it took."""
        return float(self.call("close", grace=grace, channel=channel))

    def statistics(self, channel: str = "main") -> dict[str, int]:
        """Returns the channel's counters."""
        return dict(self.call("statistics", channel=channel))

    # ---- memory ----
    def memory(self, name: str, nbytes: int, seed: int, *, kind: str = "plain", alignment: int = 1, **more: Any) -> int:
        """Makes a region filled with the pattern of ``seed``; returns its handle. Kind "any" is this side's own."""
        kind = self.any_kind if kind == "any" else kind
        alignment = max(alignment, self.plain_alignment)
        return int(self.call("memory", name=name, nbytes=nbytes, seed=seed, kind=kind, alignment=alignment, **more))

    def fill(self, name: str, seed: int) -> None:
        """Fills a region with the pattern of ``seed``."""
        self.call("fill", name=name, seed=seed)

    def verify(self, name: str, seed: int, patches: Iterable[Sequence[int]] = (), *, what: str = "") -> None:
        """Fails unless every byte of a region, and its guards, are as expected."""
        difference = self.call("compare", name=name, seed=seed, patches=[list(patch) for patch in patches])
        check(difference is None, f"{what + ': ' if what else ''}{self.name}: {difference}")

    def content(self, name: str) -> Bytes:
        """Returns a copy of a whole region."""
        return np.frombuffer(base64.b64decode(self.call("snapshot", name=name)), dtype=np.uint8)

    def close_region(self, name: str, *, timeout: float = 5.0, keep: bool = True) -> float:
        """Closes a region; returns the seconds it took."""
        return float(self.call("close_region", name=name, timeout=timeout, keep=keep))

    # ---- peers ----
    def connect(self, address: str, *, timeout: float = 10.0, channel: str = "main") -> str:
        """Connects; returns the peer's id."""
        return str(self.call("connect", address=address, timeout=timeout, channel=channel)["peer"])

    def wait_peers(self, count: int, *, timeout: float = 10.0, channel: str = "main") -> list[str]:
        """Waits for exactly so many connected peers; returns their ids."""
        return list(self.call("wait_peers", count=count, timeout=timeout, channel=channel))

    def wait_no_peer(self, peer: str, *, timeout: float = 10.0) -> None:
        """Waits until a peer is gone."""
        resources.until(
            lambda: dict(self.call("peers")), lambda peers: peer not in peers, timeout, lambda _: f"peer {peer} stays"
        )

    def wait_region(self, peer: str, name: str, *, timeout: float = 10.0) -> int:
        """Waits until a peer published a region; returns its bytes."""
        return int(self.call("wait_region", peer=peer, name=name, timeout=timeout))

    # ---- transfers ----
    def submit(self, operation: str, peer: str, local: str, remote: str, blocks: Blocks, **more: Any) -> int:
        """Submits a transfer; returns its number."""
        return int(self.call("start", **_work(operation, peer, local, remote, blocks), **more))

    def transfer(
        self, operation: str, peer: str, local: str, remote: str, blocks: Blocks, **more: Any
    ) -> dict[str, Any]:
        """Submits a transfer and waits for its end; returns its result."""
        return dict(self.call("transfer", **_work(operation, peer, local, remote, blocks), **more))

    def wait(self, transfer: int, timeout: float = 30.0) -> dict[str, Any]:
        """Waits for a transfer; returns its result or raises its error."""
        return dict(self.call("wait", transfer=transfer, timeout=timeout, deadline=timeout + 10))

    def stream(self, operation: str, peer: str, local: str, remote: str, blocks: Blocks, depth: int = 4) -> int:
        """Keeps transfers going; returns the stream's number."""
        return int(self.call("stream", **_work(operation, peer, local, remote, blocks), depth=depth))

    def stream_count(self, stream: int, at_least: int = 0) -> int:
        """Waits until so many transfers of a stream ended well."""
        return int(self.call("stream_count", stream=stream, at_least=at_least))

    def stream_end(self, stream: int, *, timeout: float, stop: bool = False) -> dict[str, Any]:
        """Waits for the end of a stream; returns its good transfers and its errors."""
        return dict(self.call("stream_end", stream=stream, timeout=timeout, stop=stop, deadline=timeout + 10))


def _work(operation: str, peer: str, local: str, remote: str, blocks: Blocks) -> dict[str, Any]:
    return {
        "operation": operation,
        "peer": peer,
        "local": local,
        "remote": remote,
        "blocks": [list(block) for block in blocks],
    }


class LocalEndpoint(Endpoint):
    """In the test's own process."""

    def __init__(self, name: str, open_defaults: Mapping[str, Any]) -> None:
        self.name = name
        self.open_defaults = open_defaults
        self.agent = Agent()
        self._threads = ThreadPoolExecutor(32, thread_name_prefix="kvlink-test-call")

    def start(self, command: str, **arguments: Any) -> Future[Any]:
        """Runs a command in the background."""
        return self._threads.submit(self.agent.run, command, arguments)

    @property
    def pid(self) -> int:
        """This process."""
        return os.getpid()

    def dispose(self) -> list[str]:
        """Closes everything; returns the texts of errors that came up."""
        problems = list(self.call("reset"))
        self._threads.shutdown(wait=False, cancel_futures=True)
        return problems


class RemoteEndpoint(Endpoint):
    """In a child process."""

    def __init__(self, name: str, open_defaults: Mapping[str, Any], child: ChildProcess) -> None:
        self.name = name
        self.open_defaults = open_defaults
        self.child = child
        self.stopped = False

    def signal(self, number: int) -> None:
        """Sends a signal to the child and waits until a SIGKILL or SIGSTOP has its effect; it serves no other case."""
        self.stopped = self.stopped or number in (signal.SIGKILL, signal.SIGSTOP)
        self.child.signal(number)
        if number == signal.SIGKILL:
            self.child.wait(20.0)
        if number == signal.SIGSTOP:
            resources.until(
                lambda: resources.thread_states(self.pid),
                lambda states: states <= {"T"},
                5.0,
                lambda s: f"threads are {s}",
            )

    def start(self, command: str, **arguments: Any) -> Future[Any]:
        """Runs a command in the background."""
        return self.child.start(command, arguments)

    @property
    def pid(self) -> int:
        """The child."""
        return self.child.pid
