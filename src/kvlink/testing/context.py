"""What a case gets: endpoints in this process and in others, connected pairs, and what the provider declares."""

from __future__ import annotations

import gc
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from .. import errors
from .._engine_types import Attributes, Capability
from ..registry import ProviderSpec, find
from . import hook, resources
from .bench import Bench, channel_of, declared_kinds
from .endpoint import Endpoint, LocalEndpoint, RemoteEndpoint
from .hook import CallLog
from .layouts import round_up
from .suite import ConformanceFailure, DeclaredSkip, check
from .wire import ChildProcess, fresh_folder

E = TypeVar("E", bound=Endpoint)

_SETTLE = 15.0
"""Seconds that threads and descriptors of closed channels have to go."""


@dataclass
class Pair:
    """Two connected endpoints: ``a`` is the initiator, ``b`` the acceptor.

    Attributes:
        a: The initiator.
        b: The acceptor.
        ab: The acceptor's id at the initiator.
        ba: The initiator's id at the acceptor.
    """

    a: Endpoint
    b: Endpoint
    ab: str
    ba: str

    def side(self, initiator: bool) -> tuple[Endpoint, str, Endpoint]:
        """Returns who acts, the other's id there, and the other."""
        return (self.a, self.ab, self.b) if initiator else (self.b, self.ba, self.a)


class Caught:
    """What :meth:`Context.error` caught."""

    error: errors.KvlinkError


class Warnings(logging.Handler):
    """Collects warnings of kvlink's loggers."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps the text."""
        self.texts.append(record.getMessage())


class Context:
    """Everything of one case. :meth:`close` ends what it made and checks that nothing is left."""

    def __init__(self, bench: Bench) -> None:
        self.settings = bench.settings
        self._bench = bench
        self._locals: list[LocalEndpoint] = []
        self._remotes: list[RemoteEndpoint] = []
        self._children = 0
        self._sides = 0
        self._cleanup: list[Callable[[], object]] = []
        self._folder = fresh_folder()
        self.folder = Path(self._folder.name)
        self._idle_before = bench.idle_count
        self._before = resources.usage()
        self._targets = resources.descriptor_targets()

    # ---- what is declared ----
    @cached_property
    def spec(self) -> ProviderSpec:
        """The provider's description."""
        return find(self.settings.provider)

    @property
    def attributes(self) -> Attributes:
        """What an open engine of the provider declares."""
        return self._bench.attributes

    @property
    def capabilities(self) -> Capability:
        """What the provider claims."""
        return self.attributes.capabilities

    @property
    def full(self) -> bool:
        """Whether the long versions run."""
        return self.settings.full

    def align(self, nbytes: int) -> int:
        """Rounds up to what the provider demands of ranges."""
        return round_up(nbytes, max(1, self.attributes.alignment))

    @property
    def alignment(self) -> int:
        """What offsets and lengths of ranges must be multiples of."""
        return max(1, self.attributes.alignment)

    def need(self, condition: object, reason: str) -> None:
        """Skips the case for a reason that the provider declares.

        Raises:
            DeclaredSkip: The condition is false.
        """
        if not condition:
            raise DeclaredSkip(reason)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of memory that the provider serves: "plain", "allocated", "device"."""
        return self._bench.kinds()

    @property
    def local_kinds(self) -> tuple[str, ...]:
        """Kinds of memory that can be the local side of a transfer."""
        return tuple(declared_kinds(self.attributes))

    @property
    def kind(self) -> str:
        """The kind of memory that a case uses when any will do; "any": what the settings' ``pair`` gives each side."""
        return "any" if self.settings.pair else self.kinds[0]

    def sided(self, endpoint: E) -> E:
        """Gives a new endpoint its side of the settings' ``pair``: a case's first the first, all others the second."""
        endpoint.plain_alignment = self.settings.plain_alignment
        if self.settings.pair:
            endpoint.any_kind = self.settings.pair[min(self._sides, 1)]
            self._sides += 1
        return endpoint

    # ---- endpoints ----
    def _defaults(self, through_hook: bool, process: int = 0) -> dict[str, Any]:
        name, options = channel_of(self.settings)
        if through_hook and name != "hook":
            name = hook.install(self.settings.provider)
        if name == "hook":
            options["hook_rendezvous"] = str(self.folder)
        return {"provider": name, "options": options, "device": self.settings.device_of(process)}

    def local(self, name: str = "a", *, through_hook: bool = False) -> LocalEndpoint:
        """Makes an endpoint in this process."""
        endpoint = self.sided(LocalEndpoint(f"{name} (this process)", self._defaults(through_hook)))
        self._locals.append(endpoint)
        return endpoint

    def remote(self, name: str = "b", *, through_hook: bool = False) -> RemoteEndpoint:
        """Makes an endpoint in a child process that serves nothing else meanwhile.

        Args:
            name: For people.
            through_hook: Wrap the provider in the hook.
        """
        self._children += 1
        defaults = self._defaults(through_hook, self._children)
        child = self._bench.take(defaults["device"])
        endpoint = self.sided(RemoteEndpoint(f"{name} (process {child.pid})", defaults, child))
        self._remotes.append(endpoint)
        if defaults["provider"] == "hook":
            endpoint.call("install_hook", inner=self.settings.provider)
        return endpoint

    def adopt(self, child: ChildProcess) -> None:
        """Ends a child process with the case."""
        self.later(child.kill)

    def endpoint(self, name: str, *, two_processes: bool, through_hook: bool = False) -> Endpoint:
        """Makes an endpoint in this process or in a child; in a child where the ends of a link have to be apart."""
        return (self.remote if two_processes or self.settings.apart else self.local)(name, through_hook=through_hook)

    def pair(
        self,
        *,
        two_processes: bool = False,
        through_hook: bool = False,
        nbytes: int = 1 << 20,
        kinds: tuple[str, str] | None = None,
        a: Mapping[str, Any] | None = None,
        b: Mapping[str, Any] | None = None,
        regions: bool = True,
    ) -> Pair:
        """Opens two endpoints, gives each a region ("a" with seed 1, "b" with seed 2), and connects a to b.

        Args:
            two_processes: Whether b runs in a child.
            through_hook: Wrap the provider in the hook on both sides.
            nbytes: Bytes of both regions.
            kinds: Kinds of their memory; None takes the provider's first.
            a: Settings of a's channel.
            b: Settings of b's channel.
            regions: Make the regions.
        """
        first = self.local("a", through_hook=through_hook)
        second = self.endpoint("b", two_processes=two_processes, through_hook=through_hook)
        first.open(**(a or {}))
        address = second.open(**(b or {}))
        if regions:
            nbytes = round_up(nbytes, max(1, self.attributes.memory_alignment))
            for endpoint, name, seed, kind in zip(
                (first, second), "ab", (1, 2), kinds or (self.kind, self.kind), strict=True
            ):
                endpoint.memory(name, nbytes, seed, kind=kind, alignment=self.attributes.memory_alignment)
        return self.join(first, second, address)

    def join(self, a: Endpoint, b: Endpoint, address: str, *, timeout: float = 10.0) -> Pair:
        """Connects a to b and waits until b has the connection too."""
        known = set(b.call("peers"))
        peer = a.connect(address, timeout=timeout)
        found = resources.until(
            lambda: [key for key, state in b.call("peers").items() if state == "connected" and key not in known],
            lambda ids: len(ids) == 1,
            timeout,
            lambda ids: f"the acceptor has {len(ids)} new peers instead of 1",
        )
        return Pair(a, b, peer, found[0])

    def still(self, pair: Pair) -> Pair:
        """The pair while it is connected, else a new connection: closing a region costs some providers the link."""
        if pair.a.call("peers").get(pair.ab) == "connected":
            return pair
        pair.b.wait_no_peer(pair.ba)
        return self.join(pair.a, pair.b, pair.b.call("address"))

    def settle(self, pair: Pair) -> Pair:
        """Makes memory that was registered after the connect usable: connects again where that is what it takes."""
        if Capability.LATE_MEMORY in self.capabilities:
            return pair
        pair.a.call("close_peer", peer=pair.ab)
        pair.b.wait_no_peer(pair.ba)
        return self.join(pair.a, pair.b, pair.b.call("address"))

    def round_trip(self, pair: Pair) -> None:
        """Moves a little both ways between regions "a" and "b" and compares both regions in full."""
        size = self.align(1000)
        pair.a.fill("a", 1)
        pair.b.fill("b", 2)
        pair.a.call("wait_region", peer=pair.ab, name="b")
        if Capability.PUT in self.capabilities:
            pair.a.transfer("put", pair.ab, "a", "b", [(0, size, size)])
            pair.b.verify("b", 2, [(size, 1, 0, size)])
        if Capability.GET in self.capabilities:
            pair.b.fill("b", 2)
            pair.a.transfer("get", pair.ab, "a", "b", [(3 * size, 0, size)])
            pair.a.verify("a", 1, [(3 * size, 2, 0, size)])

    def round_trip_of_new_region(self, pair: Pair) -> None:
        """As :meth:`round_trip`, after region "b" was closed; connects again when that cost the connection."""
        pair = self.still(pair)
        pair.b.memory("b", round_up(1 << 20, max(1, self.attributes.memory_alignment)), 2, kind=self.kind)
        self.round_trip(self.settle(pair))

    @contextmanager
    def error(self, *kinds: type[errors.KvlinkError], operation: str | None = None) -> Iterator[Caught]:
        """Expects one of these errors, with a text that helps.

        Args:
            *kinds: Error classes.
            operation: What ``error.operation`` has to be; None only asks that there is one.

        Raises:
            ConformanceFailure: None came, or one without text or operation.
        """
        caught = Caught()
        try:
            yield caught
        except kinds as error:
            caught.error = error
            check_error(error)
            if operation is not None:
                check(error.operation == operation, f"operation is {error.operation!r}, not {operation!r}: {error}")
            return
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ConformanceFailure(f"no {names} was raised")

    @contextmanager
    def error_text(self, *kinds: type[errors.KvlinkError]) -> Iterator[Caught]:
        """Expects one of these errors from a helper that is no operation on a channel: only the text matters."""
        caught = Caught()
        try:
            yield caught
        except kinds as error:
            caught.error = error
            check(str(error).strip(), f"{type(error).__name__} has no text")
            return
        raise ConformanceFailure(f"no {' or '.join(kind.__name__ for kind in kinds)} was raised")

    def config_error(self) -> AbstractContextManager[Caught]:
        """Expects that a wrong argument is refused."""
        return self.error(errors.ConfigError)

    def refused(self) -> AbstractContextManager[Caught]:
        """Expects that ranges are refused before anything moves."""
        return self.error(errors.RangeError)

    def release(self, pair: Pair) -> None:
        """Closes everything of a pair and makes its endpoints go, so that memory does not pile up within a case."""
        for endpoint in (pair.a, pair.b):
            self._dispose(endpoint)

    def close_pair(self, pair: Pair) -> None:
        """Closes both channels the orderly way, the acceptor's last."""
        pair.a.close()
        pair.b.close()

    def check_log(self, *paths: Path) -> CallLog:
        """Fails when the hook saw the contract broken; returns the last log."""
        log = CallLog()
        for path in paths:
            log = hook.read_log(path)
            check(log.order, f"the hook wrote nothing into {path.name}")
            check(not log.violations, "the contract was broken: " + "; ".join(sorted(set(log.violations))[:5]))
        return log

    def check_nothing_left_of(self, *endpoints: Endpoint) -> None:
        """Disposes of endpoints and checks that nothing of them is left, in the middle of a case."""
        for endpoint in endpoints:
            self._dispose(endpoint)
        self.check_nothing_left()

    def send_garbage(self, address: str) -> None:
        """Sends nonsense to a listener, over connections that are then dropped."""
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        for payload in (b"", b"\0", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 70_000, os.urandom(5000), b"\0\0\0\x05hello"):
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5) as stranger:
                try:
                    stranger.sendall(payload)
                except OSError:
                    pass  # it was thrown out already

    def later(self, function: Callable[[], object]) -> None:
        """Calls ``function`` when the case is over, before the endpoints go."""
        self._cleanup.append(function)

    # ---- the end ----
    def close(self, *, failed: bool) -> None:
        """Ends everything that the case made.

        Args:
            failed: The case failed already; what is left then is no further finding.

        Raises:
            ConformanceFailure: A descriptor or a thread of this process is left, or closing failed.
        """
        problems: list[str] = []
        while self._cleanup:
            self._cleanup.pop()()
        for endpoint in self._locals:
            problems += endpoint.dispose()
        for remote in self._remotes:
            problems += self._dispose_remote(remote)
        self._folder.cleanup()
        if failed:
            return
        check(not problems, f"closing failed: {'; '.join(problems)}")
        self.check_nothing_left()

    def _dispose(self, endpoint: Endpoint) -> None:
        if isinstance(endpoint, RemoteEndpoint):
            self._remotes.remove(endpoint)
            problems = self._dispose_remote(endpoint)
        else:
            assert isinstance(endpoint, LocalEndpoint)
            self._locals.remove(endpoint)
            problems = endpoint.dispose()
        check(not problems, f"closing failed: {'; '.join(problems)}")

    def _dispose_remote(self, remote: RemoteEndpoint) -> list[str]:
        if not remote.child.alive:
            remote.child.kill()
            return []
        if remote.stopped:
            remote.child.kill()
            return []
        try:
            problems = list(remote.call("reset"))
        except ConformanceFailure as error:
            remote.child.kill()
            return [str(error)]
        self._bench.give(remote.child, remote.open_defaults["device"])
        return problems

    def check_nothing_left(self) -> None:
        """Fails when this process has more descriptors or threads than before the case."""
        gc.collect()  # a closed channel's event descriptor goes with its object
        for what in ("descriptors", "threads"):
            # Children in the pool have two pipes and a file each, and a reader thread here.
            extra = (self._bench.idle_count - self._idle_before) * (3 if what == "descriptors" else 1)
            limit = self._before[what] + extra
            resources.until(
                lambda what=what: resources.usage()[what],  # type: ignore[misc]
                lambda now, limit=limit: now <= limit,  # type: ignore[misc]
                _SETTLE,
                lambda now, what=what, limit=limit: f"{now} {what} instead of {limit}; new are {self._new(what)}",  # type: ignore[misc]
            )

    def _new(self, what: str) -> str:
        if what == "threads":
            return ", ".join(sorted(thread.name for thread in threading.enumerate()))
        now = resources.descriptor_targets()
        return ", ".join(sorted(target for number, target in now.items() if self._targets.get(number) != target))


def check_error(error: errors.KvlinkError) -> None:
    """Fails when an error does not say what a user needs."""
    check(str(error).strip(), f"{type(error).__name__} has no text")
    check(error.operation, f"{type(error).__name__} names no operation: {error}")
