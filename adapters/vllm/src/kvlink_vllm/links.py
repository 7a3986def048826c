"""The decoder's connections to prefillers' workers: made in the background, kept, and made anew when lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from kvlink_vllm import wire
from kvlink_vllm.layout import CacheLayout, check_peer
from kvlink_vllm.settings import Settings

_MAX_ENTRIES = 1024


@dataclass(frozen=True)
class Link:
    """A connected prefiller's worker.

    Attributes:
        peer: kvlink's peer.
        planes: Its planes, checked against ours.
        handles: Its regions' handles by name.
        leases: Handle of the region with the generation words.
        blocks: Blocks of its cache.
        lease: Seconds that it holds blocks after a word from us.
        seconds: How long the connect took.
    """

    peer: Any
    planes: Sequence[wire.WirePlane]
    handles: dict[str, int]
    leases: int
    blocks: int
    lease: float
    seconds: float


@dataclass
class _Entry:
    future: Future[Link]
    failed_at: float | None = None


class Links:
    """Links by address.

    Args:
        channel: This worker's channel.
        layout: This worker's caches.
        settings: The connector's settings.
        executor: Threads for connects.
    """

    def __init__(self, channel: Any, layout: CacheLayout, settings: Settings, executor: ThreadPoolExecutor) -> None:
        self._channel = channel
        self._layout = layout
        self._settings = settings
        self._executor = executor
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}

    def get(self, address: str) -> Future[Link]:
        """Returns the link's future without waiting; starts a connect if there is none that could work.

        A prefiller that could not be reached is tried again only after ``kvlink.retry_after`` seconds; until then
        its last error stands, so that its requests are recomputed at once.

        Args:
            address: "tcp://host:port".
        """
        with self._lock:
            entry = self._entries.get(address)
            if entry is not None and not self._stale(entry):
                return entry.future
            entry = self._entries[address] = _Entry(Future())
            if len(self._entries) > _MAX_ENTRIES:
                self._entries = {key: item for key, item in self._entries.items() if not self._over(item)}
        try:
            self._executor.submit(self._connect, address, entry)
        except Exception as error:  # no more threads, or shut down: who waits for this future must hear of it
            entry.failed_at = time.monotonic()
            entry.future.set_exception(error)
        return entry.future

    def connected(self, address: str) -> Link | None:
        """Returns the link if it stands right now."""
        with self._lock:
            entry = self._entries.get(address)
        if entry is None or not entry.future.done() or entry.future.exception() is not None:
            return None
        link = entry.future.result()
        return link if link.peer.state == "connected" else None

    def _stale(self, entry: _Entry) -> bool:
        if not entry.future.done():
            return False
        if entry.failed_at is not None:
            return time.monotonic() - entry.failed_at >= self._settings.retry_after
        return bool(entry.future.result().peer.state != "connected")

    @staticmethod
    def _over(entry: _Entry) -> bool:
        if not entry.future.done():
            return False
        return entry.failed_at is not None or bool(entry.future.result().peer.state != "connected")

    def _connect(self, address: str, entry: _Entry) -> None:
        begin = time.monotonic()
        peer = None
        try:
            peer = self._channel.connect(address, timeout=self._settings.connect_timeout)
            timeout = self._settings.request_timeout
            end = time.monotonic() + timeout
            reply = wire.layout_reply.decode(peer.request(wire.encode(wire.Layout()), timeout=timeout))
            check_peer(self._layout, reply.planes)
            names = {plane.region for plane in reply.planes} | {reply.leases}
            handles = {name: int(peer.wait_region(name, max(0.0, end - time.monotonic())).handle) for name in names}
            link = Link(
                peer, reply.planes, handles, handles[reply.leases], reply.blocks, reply.lease, time.monotonic() - begin
            )
        except BaseException as error:
            if peer is not None:
                _close(peer)
            entry.failed_at = time.monotonic()
            entry.future.set_exception(error)
        else:
            entry.future.set_result(link)


def _close(peer: Any) -> None:
    try:
        peer.close()
    except Exception:
        pass
