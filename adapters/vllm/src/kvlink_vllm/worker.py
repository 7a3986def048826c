"""The worker's half: one channel, the caches registered with it, leases of the prefiller, pulls of the decoder."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

import kvlink
from kvlink.registry import device_for
from kvlink_vllm import wire
from kvlink_vllm.device_stream import current_stream
from kvlink_vllm.identity import build_identity
from kvlink_vllm.layout import build_layout
from kvlink_vllm.lease import LeaseTable
from kvlink_vllm.links import Links
from kvlink_vllm.log import get_logger
from kvlink_vllm.metadata import KVLinkHandshake, KVLinkMetadata
from kvlink_vllm.pull import Puller
from kvlink_vllm.pulls import Outcome, Pulls
from kvlink_vllm.serve import Server
from kvlink_vllm.settings import Settings, parse_cores
from kvlink_vllm.stats import KVLinkStats
from kvlink_vllm.trace import Trace

logger = get_logger()

_T = TypeVar("_T")

_LEASES = "kvlink.leases"
_SCRATCH = "kvlink.scratch"
_MAX_LEASES = 1 << 17


class KVLinkWorker:
    """Worker side of the connector.

    Args:
        vllm_config: vLLM's configuration.
        settings: The connector's.
        blocks: Blocks of the cache.
        block_size: Tokens of a block.
        rank: Tensor-parallel rank.
    """

    def __init__(self, vllm_config: Any, settings: Settings, *, blocks: int, block_size: int, rank: int) -> None:
        self._vllm_config = vllm_config
        self._settings = settings
        self._blocks = blocks
        self._block_size = block_size
        self._rank = rank
        self._trace = Trace(settings.trace_file)
        self._errors: set[int] = set()
        self._stats = KVLinkStats()
        self._channel: Any = None
        self._device = "cpu"
        self._host = False
        self._started: KVLinkMetadata | None = None
        self._executors: list[ThreadPoolExecutor] = []
        self._table: LeaseTable | None = None
        self._server: Server | None = None
        self._pulls: Pulls | None = None
        self._idle = False
        # Set when a pull or a lease ends.
        self._news = threading.Event()

    def register(self, caches: Mapping[str, Any]) -> None:
        """Opens the channel and registers the caches.

        Args:
            caches: Layer name to tensor or tuple of tensors.

        Raises:
            LayoutError: A layout that cannot be moved block by block.
            kvlink.errors.KvlinkError: The channel cannot be opened or the memory not be registered.
        """
        settings = self._settings
        layout = build_layout(caches, self._blocks)
        identity = build_identity(self._vllm_config, settings, layout, rank=self._rank, block_size=self._block_size)
        self._device = layout.storages[0].device
        self._host = self._device.startswith("cpu")
        device = settings.device or device_for(settings.transfer_channel, self._device, self._rank)
        channel = self._channel = _on_own_thread(lambda: self._open(identity, device), settings)
        regions = [
            channel.register((storage.pointer, storage.nbytes, storage.device), name=storage.name, access="r")
            for storage in layout.storages
        ]
        slots = min(self._blocks, _MAX_LEASES)
        leases = channel.allocate(8 * slots, name=_LEASES, access="r", device="cpu")
        self._table = LeaseTable(
            np.frombuffer(leases.buffer(), dtype=np.uint64)[:slots],
            lease=settings.lease,
            contact=settings.contact,
            on_end=self._news.set,
        )
        # One word a pull; "r" is the least that a region can grant, and the words are no secret.
        scratch = channel.allocate(8 * 64, name=_SCRATCH, access="r", device="cpu")
        notices = self._executor("kvlink-notice", 1)
        self._server = Server(
            self._table,
            layout,
            _LEASES,
            handoff_wait=settings.handoff_wait,
            verify=settings.verify,
            defer=lambda function: _submit(notices, function),
        )
        links = Links(channel, layout, settings, self._executor("kvlink-connect", 4))
        self._pulls = Pulls(
            links,
            Puller(layout, [region.handle for region in regions], scratch, settings),
            settings,
            self._rank,
            self._executor("kvlink-pull", settings.pulls),
            notices,
            self._report,
            self._news.set,
        )
        channel.on_request = self._server.on_request
        channel.on_notify = self._on_notify
        channel.on_peer_lost = self._on_peer_lost
        logger.info(
            "kvlink: rank %d: channel %s at %s, %d blocks of %d bytes in %d region(s), %s",
            self._rank,
            channel.name,
            channel.address,
            layout.blocks,
            layout.block_bytes,
            len(regions),
            identity["cache_layout"],
        )

    def handshake(self) -> KVLinkHandshake | None:
        """Returns this worker's address for the scheduler, or None before ``register``."""
        return None if self._channel is None else KVLinkHandshake(self._channel.address, self._rank)

    def bind(self, meta: KVLinkMetadata) -> None:
        """Carries out one step's instructions before its forward; starts background work only.

        Args:
            meta: From the scheduler.
        """
        if self._server is None or self._pulls is None:
            return
        self._idle = meta.idle
        for hold in meta.holds:
            _shielded("a hand-off", self._server.hold, hold)
        for track in meta.tracks:
            _shielded("a waiting request", self._pulls.track, track)
        if self._host:
            # No device stream orders anything here, so the pull may run beside the forward instead of after it.
            self.start_reads(meta)
        for request_id in meta.drops:
            _shielded("a dropped request", self._pulls.drop, request_id)

    def start_reads(self, meta: KVLinkMetadata) -> None:
        """Starts this step's pulls, each once however often it is called.

        Args:
            meta: From the scheduler.
        """
        if self._pulls is None or self._started is meta:
            return
        self._started = meta
        # This thread launched whatever still works on the blocks, so it is its stream that the pulls wait for.
        stream = current_stream(self._device) if meta.reads else None
        for read in meta.reads:
            self._pulls.start(read, stream)

    def finished(self, finished_req_ids: Iterable[str]) -> tuple[set[str] | None, set[str] | None]:
        """Returns what ended since the last step; each id once.

        Args:
            finished_req_ids: Requests that vLLM finished; their pulls are cancelled.

        Returns:
            Requests whose blocks the prefiller may free, and requests whose pull ended, well or not.
        """
        if self._table is None or self._pulls is None:
            return None, None
        self._pulls.cancel(finished_req_ids)
        if self._idle:
            self._wait_for_news()
        self._news.clear()
        received = set()
        for outcome in self._pulls.take():
            received.add(outcome.read.request_id)
            if outcome.failure is not None:
                self._errors.update(outcome.read.blocks)
            _shielded("a pull's numbers", self._count, outcome)
        sent = set()
        for ended in self._table.collect():
            sent.add(ended.request_id)
            if ended.expired:
                self._stats.add(leases_expired=1)
                logger.warning(
                    "kvlink: request %s: no decoder said done before its lease ended; its blocks are freed",
                    ended.request_id,
                )
            else:
                self._stats.add(leases_released=1)
        return sent or None, received or None

    def _wait_for_news(self) -> None:
        """Sleeps for a few milliseconds of a step that computes nothing, or until a pull or a lease ends.

        vLLM makes such steps one after the other, and its processes spin between them. On a machine with few cores
        they take the time, and this process's threads the interpreter, that the pull itself needs.
        """
        if self._pulls is not None and self._table is not None and (self._pulls.running or len(self._table)):
            self._news.wait(self._settings.idle_wait)

    def take_errors(self) -> set[int]:
        """Returns the local blocks that were not filled since the last call."""
        errors, self._errors = self._errors, set()
        return errors

    def take_stats(self) -> KVLinkStats | None:
        """Returns the numbers since the last call."""
        return self._stats.take()

    def counts(self) -> dict[str, int]:
        """Returns what is held right now: leases, blocks under lease, pulls, hand-offs wanted."""
        held = {} if self._table is None else self._table.snapshot()
        return {**held, **({} if self._pulls is None else self._pulls.counts())}

    def close(self) -> None:
        """Ends all leases and pulls and closes the channel."""
        if self._pulls is not None:
            self._pulls.close()
        if self._table is not None:
            self._table.close()
        for executor in self._executors:
            executor.shutdown(wait=False, cancel_futures=True)
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close(grace=0.2)

    def _open(self, identity: Mapping[str, str | int], device: str) -> Any:
        settings = self._settings
        return kvlink.open(
            settings.transfer_channel,
            listen=settings.listen_for(self._rank),
            advertise=settings.advertise_for(self._rank),
            device=device,
            secret=settings.shared_secret(),
            identity=identity,
            options=settings.options,
            insecure=settings.insecure,
            peer_timeout=settings.peer_timeout,
            transfer_timeout=settings.pull_timeout,
        )

    def _executor(self, name: str, threads: int) -> ThreadPoolExecutor:
        cores = parse_cores(self._settings.cpu_affinity)
        executor = ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=_bind, initargs=(cores,))
        self._executors.append(executor)
        return executor

    def _on_notify(self, peer: Any, message: bytes) -> None:
        notice = wire.decode_notice(message)
        if isinstance(notice, wire.Ready):
            if self._pulls is not None:
                self._pulls.ready(notice.id)
        elif self._server is not None:
            self._server.on_notify(peer, notice)

    def _on_peer_lost(self, peer: Any, error: Exception) -> None:
        if self._server is not None:
            self._server.on_peer_lost(peer)

    def _count(self, outcome: Outcome) -> None:
        read, record = outcome.read, outcome.record
        if outcome.failure is None:
            self._stats.add(
                pulls=1,
                bytes=record["bytes"],
                blocks=len(read.blocks),
                tokens=read.tokens - read.local_tokens,
                local_tokens=read.local_tokens,
            )
            self._stats.data["seconds"].append(record["transfer_seconds"])
        else:
            self._stats.fail(outcome.failure, read.tokens - read.local_tokens)

    def _report(self, outcome: Outcome) -> None:
        read, record = outcome.read, outcome.record
        address = read.addresses[self._rank]
        pulled = read.tokens - read.local_tokens
        if outcome.failure is None:
            logger.info(
                "kvlink pull request=%s rank=%d peer=%s path=%s prompt_tokens=%d pulled_tokens=%d local_tokens=%d "
                "blocks=%d ranges=%d bytes=%d transfer_ms=%.3f total_ms=%.3f",
                read.request_id,
                self._rank,
                address,
                record["path"],
                read.prompt_tokens,
                pulled,
                read.local_tokens,
                len(read.blocks),
                record["ranges"],
                record["bytes"],
                record["transfer_seconds"] * 1e3,
                record["total_seconds"] * 1e3,
            )
        elif outcome.failure == "cancelled":
            logger.info("kvlink: request %s: its pull was cancelled", read.request_id)
        else:
            logger.warning(
                "kvlink: request %s: the pull from %s failed in phase %s after %.0f ms; %s: %s",
                read.request_id,
                address,
                outcome.failure,
                record["total_seconds"] * 1e3,
                "the request fails (kvlink.on_load_failure)"
                if self._settings.on_load_failure == "fail"
                else f"{pulled} tokens are recomputed here",
                outcome.reason,
            )
        self._trace.write(
            {
                "event": "pull",
                "request": read.request_id,
                "handoff": read.handoff,
                "rank": self._rank,
                "peer": address,
                "outcome": outcome.failure or "ok",
                "reason": outcome.reason,
                "prompt_tokens": read.prompt_tokens,
                "pulled_tokens": pulled,
                "local_tokens": read.local_tokens,
                "blocks": len(read.blocks),
                **record,
            }
        )


def _shielded(what: str, function: Callable[[_T], None], argument: _T) -> None:
    """Keeps an error in one item from touching the next; the engine relies on every item being carried out."""
    try:
        function(argument)
    except Exception:
        logger.exception("kvlink: unexpected error with %s", what)


def _bind(cores: Iterable[int] | None) -> None:
    if cores is not None:
        os.sched_setaffinity(0, cores)


def _submit(executor: ThreadPoolExecutor, function: Callable[[], None]) -> None:
    try:
        executor.submit(function)
    except RuntimeError as error:  # shut down meanwhile
        logger.debug("kvlink: not run any more: %s", error)


def _on_own_thread(function: Callable[[], Any], settings: Settings) -> Any:
    """Runs a function; with ``kvlink.cpu_affinity`` on a thread with those cores, which its threads inherit."""
    cores = parse_cores(settings.cpu_affinity)
    if cores is None:
        return function()
    result: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            _bind(cores)
            result.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="kvlink-open")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return result[0]
