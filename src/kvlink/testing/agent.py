"""One side of a test: owns channels, memory, peers and transfers by name and does what it is told.

The same object serves in the test's own process and, behind JSON lines on its standard streams, in a child process
(``python -m kvlink.testing.agent``), so that every case is written once.
"""

from __future__ import annotations

import base64
import logging
import os
import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

import kvlink

from .._engine import EngineChannel, EnginePeer
from ..errors import ConfigError, KvlinkError
from . import resources
from .storage import Storage, make_storage
from .streams import Stream
from .trials import MAIN, Trials

_RESET_GRACE = 8.0
"""Seconds for a close that nobody measures, so that a busy machine is no finding."""


class Agent(Trials):
    """Commands are the methods whose names begin with ``do_``; arguments and results are plain JSON values."""

    def __init__(self) -> None:
        self._channels: dict[str, kvlink.Channel] = {}
        self._storage: dict[str, Storage] = {}
        self._handles: dict[tuple[str, str], int] = {}
        self._raw: list[EnginePeer | EngineChannel] = []
        self._known: dict[str, kvlink.Peer] = {}
        self._aliases: dict[str, kvlink.Region] = {}
        self._transfers: dict[int, kvlink.Transfer] = {}
        self._callbacks: dict[int, int] = {}
        self._streams: dict[int, Stream] = {}
        self._notes: list[dict[str, Any]] = []
        self._lost: list[dict[str, Any]] = []
        self._watch: dict[str, Any] | None = None
        self._condition = threading.Condition()
        self._next = 0
        self._refuse = ""

    def run(self, command: str, arguments: Mapping[str, Any]) -> Any:
        """Runs one command.

        Raises:
            KvlinkError: Whatever the command raises.
        """
        method = getattr(self, f"do_{command}", None)
        if method is None:
            raise ConfigError(f"the agent has no command {command!r}")
        return method(**arguments)

    # ---- channels ----
    def do_open(self, *, channel: str = MAIN, provider: str, **settings: Any) -> dict[str, Any]:
        """Opens a channel; returns its address and what it claims."""
        opened = kvlink.open(provider, **settings)
        self._channels[channel] = opened
        opened.on_notify = self._on_notify
        opened.on_peer = self._on_peer
        opened.on_request = self._on_request
        opened.on_peer_lost = self._on_lost
        return {"address": opened.address, "capabilities": int(opened.capabilities), "id": opened.id}

    def do_close(self, *, channel: str = MAIN, grace: float = 1.0) -> float:
        """Closes a channel; returns the seconds it took."""
        start = time.monotonic()
        self._channels.pop(channel).close(grace=grace)
        return time.monotonic() - start

    def do_address(self, *, channel: str = MAIN) -> str:
        """Returns the channel's address."""
        return self._channels[channel].address

    def do_statistics(self, *, channel: str = MAIN) -> dict[str, Any]:
        """Returns the channel's counters that are whole numbers."""
        statistics = self._channels[channel].statistics()
        names = ("peers", "in_flight", "submitted", "succeeded", "failed", "cancelled", "timed_out")
        return {name: int(getattr(statistics, name)) for name in names}

    def do_provider_statistics(self, *, channel: str = MAIN) -> dict[str, int]:
        """Returns the provider's own counters."""
        return {name: int(value) for name, value in self._channels[channel].statistics().provider.items()}

    def do_reset(self) -> list[str]:
        """Closes everything; returns the texts of errors that came up."""
        problems = []
        for stream in self._streams.values():
            stream.stop(5.0)
        for raw in self._raw:
            raw.close()
        for name in list(self._channels):
            try:
                self._channels.pop(name).close(grace=_RESET_GRACE)
            except KvlinkError as error:
                problems.append(str(error))
        self.__init__()  # type: ignore[misc]
        return problems

    # ---- memory ----
    def do_memory(
        self,
        *,
        name: str,
        nbytes: int,
        seed: int,
        kind: str = "plain",
        access: str = "rw",
        alignment: int = 1,
        channel: str = MAIN,
    ) -> int:
        """Makes a region filled with the pattern of ``seed``; returns its handle."""
        storage = make_storage(
            self._channels[channel], name, nbytes, kind=kind, access=access, alignment=max(1, alignment)
        )
        storage.fill(seed)
        self._storage[name] = storage
        return int(storage.region.handle)

    def do_fill(self, *, name: str, seed: int, offset: int = 0, length: int | None = None) -> None:
        """Writes the pattern of ``seed``."""
        self._storage[name].fill(seed, offset, length)

    def do_compare(self, *, name: str, seed: int, patches: list[list[int]]) -> str | None:
        """Compares a region, closed or not; returns what differs."""
        return self._storage[name].compare(seed, patches)

    def do_snapshot(self, *, name: str) -> str:
        """Returns a copy of the whole region as base64."""
        storage = self._storage[name]
        return base64.b64encode(storage.read(0, storage.nbytes).tobytes()).decode()

    def do_close_region(self, *, name: str, timeout: float = 5.0, keep: bool = True) -> float:
        """Closes a region; its memory stays for comparisons when ``keep``. Returns the seconds it took."""
        storage = self._storage[name] if keep else self._storage.pop(name)
        start = time.monotonic()
        storage.region.close(timeout=timeout)
        return time.monotonic() - start

    def do_watch_close(self, *, name: str, timeout: float, quiet: float) -> dict[str, Any]:
        """Closes a region, copies its memory at once, and copies it again after ``quiet`` seconds.

        Returns:
            ``seconds`` of the close and how many bytes ``changed`` after it had returned.
        """
        storage = self._storage[name]
        start = time.monotonic()
        storage.region.close(timeout=timeout)
        seconds = time.monotonic() - start
        before = storage.read(0, storage.nbytes)
        # Time has to pass here: what is tested is that nothing happens in it.
        time.sleep(quiet)
        changed = int(np.count_nonzero(storage.read(0, storage.nbytes) != before))
        return {"seconds": seconds, "changed": changed}

    # ---- peers ----
    def _peer(self, peer: str, channel: str) -> kvlink.Peer:
        found = self._channels[channel].peers().get(peer)
        if found is None:
            found = self._known.get(peer)  # a lost or closed peer still answers, with its error
        if found is None:
            raise ConfigError(f"the channel never had a peer {peer!r}", operation="test")
        self._known[peer] = found
        return found

    def do_connect(self, *, address: str, timeout: float = 10.0, channel: str = MAIN) -> dict[str, Any]:
        """Connects; returns the peer's id, its regions and its identity."""
        start = time.monotonic()
        peer = self._channels[channel].connect(address, timeout=timeout)
        self._known[peer.id] = peer
        return {
            "peer": peer.id,
            "regions": sorted(peer.regions),
            "identity": dict(peer.identity),
            "seconds": time.monotonic() - start,
        }

    def do_peers(self, *, channel: str = MAIN) -> dict[str, str]:
        """Returns the states of the channel's peers by id."""
        return {peer_id: str(peer.state) for peer_id, peer in self._channels[channel].peers().items()}

    def do_wait_peers(self, *, count: int, timeout: float = 10.0, channel: str = MAIN) -> list[str]:
        """Waits until exactly ``count`` peers are connected; returns their ids."""

        def connected() -> list[str]:
            peers = self._channels[channel].peers()
            return [peer_id for peer_id, peer in peers.items() if str(peer.state) == "connected"]

        return resources.until(
            connected, lambda ids: len(ids) == count, timeout, lambda ids: f"{len(ids)} peers instead of {count}"
        )

    def do_wait_lost(self, *, count: int = 1, timeout: float = 10.0) -> list[dict[str, Any]]:
        """Waits until ``count`` peers were reported lost; returns id, error type and text of each."""
        with self._condition:
            self._condition.wait_for(lambda: len(self._lost) >= count, timeout)
            if len(self._lost) < count:
                raise ConfigError(f"{len(self._lost)} of {count} peers were reported lost within {timeout:g} s")
            return list(self._lost)

    def do_wait_region(self, *, peer: str, name: str, timeout: float = 10.0, channel: str = MAIN) -> int:
        """Waits until a peer published a region; returns its bytes."""
        return int(self._peer(peer, channel).wait_region(name, timeout=timeout).nbytes)

    def do_regions(self, *, peer: str, channel: str = MAIN) -> list[str]:
        """Returns the names of the regions that a peer publishes."""
        return sorted(self._peer(peer, channel).regions)

    def do_wait_no_region(self, *, peer: str, name: str, timeout: float = 10.0, channel: str = MAIN) -> None:
        """Waits until a peer publishes a region no more."""
        found = self._peer(peer, channel)
        resources.until(
            lambda: name in found.regions, lambda there: not there, timeout, lambda _: f"region {name!r} is still there"
        )

    def do_close_peer(self, *, peer: str, channel: str = MAIN) -> None:
        """Closes a peer."""
        self._peer(peer, channel).close()

    def do_refuse(self, *, reason: str) -> None:
        """Refuses peers from now on; "" accepts them again."""
        self._refuse = reason

    def _on_peer(self, identity: Mapping[str, Any]) -> None:
        if self._refuse:
            raise ConfigError(self._refuse)

    def _on_lost(self, peer: kvlink.Peer, error: BaseException | None) -> None:
        with self._condition:
            self._lost.append({"peer": peer.id, "type": type(error).__name__, "text": str(error)})
            self._condition.notify_all()

    # ---- messages ----
    def do_request(self, *, peer: str, message: str, timeout: float = 10.0, channel: str = MAIN) -> str:
        """Sends a request; returns the answer."""
        return self._peer(peer, channel).request(message.encode(), timeout=timeout).decode()

    def do_notify(self, *, peer: str, message: str, channel: str = MAIN) -> None:
        """Sends a notification."""
        self._peer(peer, channel).notify(message.encode())

    def do_watch(self, *, name: str, seed: int, patches: list[list[int]]) -> None:
        """From now on every notification compares this region at once, in its handler."""
        self._watch = {"name": name, "seed": seed, "patches": patches}

    def do_notes(self, *, count: int, timeout: float = 10.0, clear: bool = True) -> list[dict[str, Any]]:
        """Waits for ``count`` notifications; returns message and comparison of each."""
        with self._condition:
            self._condition.wait_for(lambda: len(self._notes) >= count, timeout)
            if len(self._notes) < count:
                raise ConfigError(f"{len(self._notes)} of {count} notifications came within {timeout:g} s")
            notes = list(self._notes)
            if clear:
                self._notes.clear()
            return notes

    def _on_notify(self, peer: kvlink.Peer, message: bytes) -> None:
        watch = self._watch
        difference = None
        if watch is not None:
            difference = self._storage[watch["name"]].compare(watch["seed"], watch["patches"])
        with self._condition:
            self._notes.append({"message": message.decode(), "difference": difference})
            self._condition.notify_all()

    def _on_request(self, peer: kvlink.Peer, message: bytes) -> bytes:
        if message == b"fail":
            raise ValueError("the handler failed on purpose")
        return b"echo " + message

    # ---- transfers ----
    def _ranges(self, peer: str, local: str, remote: str, blocks: list[list[int]], channel: str) -> Any:
        return kvlink.ranges(
            self._storage[local].region,
            self._remote_region(peer, remote, channel),
            np.asarray(blocks, dtype=np.int64).reshape(-1, 3),
        )

    def _remote_region(self, peer: str, name: str, channel: str) -> kvlink.RemoteRegion | int:
        """The region, or its old handle when it is gone: a stale handle is what a careless caller would use."""
        region = self._peer(peer, channel).regions.get(name)
        if region is None:
            return self._handles.get((peer, name), 0xFFFF_FFFF)
        self._handles[peer, name] = region.handle
        return region

    def do_start(
        self,
        *,
        operation: str,
        peer: str,
        local: str,
        remote: str,
        blocks: list[list[int]],
        timeout: float | None = None,
        notify: str | None = None,
        stream: int | None = None,
        spoil: bool = False,
        channel: str = MAIN,
    ) -> int:
        """Submits a transfer; returns its number. ``spoil`` overwrites the ranges as soon as the call returned."""
        ranges = self._ranges(peer, local, remote, blocks, channel)
        found = self._peer(peer, channel)
        if operation == "put":
            message = None if notify is None else notify.encode()
            transfer = found.put(ranges, notify=message, stream=stream, timeout=timeout)
        else:
            transfer = found.get(ranges, stream=stream, timeout=timeout)
        if spoil:
            ranges.view(np.uint8)[:] = 0xA5
        with self._condition:
            self._next += 1
            number = self._next
            self._transfers[number] = transfer
            self._callbacks[number] = 0
        transfer.add_done_callback(lambda _: self._count_callback(number))
        return number

    def _count_callback(self, number: int) -> None:
        with self._condition:
            self._callbacks[number] += 1
            self._condition.notify_all()

    def do_done(self, *, transfer: int) -> bool:
        """Whether a transfer finished."""
        return bool(self._transfers[transfer].done())

    def do_cancel(self, *, transfer: int) -> None:
        """Cancels a transfer."""
        self._transfers[transfer].cancel()

    def do_wait(self, *, transfer: int, timeout: float = 30.0) -> dict[str, Any]:
        """Waits for a transfer; returns its result, or raises its error."""
        pending = self._transfers[transfer]
        start = time.monotonic()
        if not pending.wait(timeout):
            raise ConfigError(f"transfer {transfer} did not finish within {timeout:g} s")
        result = pending.result()
        return {
            "nbytes": int(result.nbytes),
            "ranges": int(result.ranges),
            "path": str(result.path),
            "seconds": time.monotonic() - start,
        }

    def do_callbacks(self, *, transfers: list[int], timeout: float = 5.0) -> list[int]:
        """Waits until each of these transfers called back; returns how often each did."""
        with self._condition:
            self._condition.wait_for(lambda: all(self._callbacks[number] for number in transfers), timeout)
            return [self._callbacks[number] for number in transfers]

    def do_transfer(self, *, timeout: float | None = None, **arguments: Any) -> dict[str, Any]:
        """Submits a transfer and waits for its end."""
        number = self.do_start(timeout=timeout, **arguments)
        return self.do_wait(transfer=number, timeout=30.0 if timeout is None else timeout + 10.0)

    def do_transfer_parts(self, *, operation: str, peer: str, parts: list[dict[str, Any]], channel: str = MAIN) -> int:
        """Moves blocks of several region pairs in one transfer; returns the bytes."""
        ranges = np.concatenate([self._ranges(peer, channel=channel, **part) for part in parts])
        found = self._peer(peer, channel)
        transfer = found.put(ranges) if operation == "put" else found.get(ranges)
        transfer.wait()
        return int(transfer.result().nbytes)

    def do_stream(self, *, operation: str, peer: str, depth: int = 4, channel: str = MAIN, **where: Any) -> int:
        """Keeps ``depth`` transfers going until told to stop or until one fails; returns a number."""
        ranges = self._ranges(peer, channel=channel, **where)
        self._next += 1
        self._streams[self._next] = Stream(self._peer(peer, channel), operation, ranges, depth)
        return self._next

    def do_stream_count(self, *, stream: int, at_least: int = 0, timeout: float = 10.0) -> int:
        """Waits until a stream finished so many transfers well; returns how many it has."""
        return self._streams[stream].wait_count(at_least, timeout)

    def do_stream_end(self, *, stream: int, timeout: float, stop: bool = False) -> dict[str, Any]:
        """Waits until a stream ended, by its first error or because it is told to; returns how."""
        return self._streams[stream].end(timeout, stop)

    # ---- the process ----
    def do_resources(self) -> dict[str, int]:
        """Returns open descriptors, threads, mappings and resident KiB of this process."""
        return resources.usage()

    def do_pid(self) -> int:
        """Returns the process id."""
        return os.getpid()

    def do_log(self, *, message: str) -> None:
        """Writes a line to this process's log."""
        logging.getLogger("kvlink.testing").info(message)


def main() -> int:
    """Serves an agent on the standard streams until they close."""
    from .wire import serve

    return serve(Agent())


if __name__ == "__main__":
    raise SystemExit(main())
