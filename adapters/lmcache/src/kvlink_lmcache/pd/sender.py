"""The prefiller's side: takes chunks from the engine's step and brings them to their decoder, off that step.

Whatever goes wrong with one batch ends its whole hand-off: the pages are freed here, the decoder is told to forget it
once nothing of it is being written, and the proxy is told why. Nothing here makes the engine wait.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import kvlink
from kvlink.errors import KvlinkError, RequestError

from ..buffer import PDBuffer
from ..channel import settled
from ..endpoint import Endpoint, page_table
from ..log import get_logger
from . import chunks as chunk_table
from . import wire
from .loop import LoopThread
from .notifier import ProxyNotifier
from .options import DELAYED, PUSH, PDOptions, port_of
from .outgoing import HandOffFailed, Job, Outgoing

_log = get_logger()
Callback = Callable[[Any], None]


class Sender:
    """One prefiller rank."""

    def __init__(
        self, endpoint: Endpoint, buffer: PDBuffer, options: PDOptions, loop: LoopThread, notifier: ProxyNotifier
    ) -> None:
        """Starts.

        Args:
            endpoint: The channel.
            buffer: The PD buffer.
            options: The configuration.
            loop: Where everything happens.
            notifier: Tells the proxy; used on the loop only.
        """
        self._endpoint = endpoint
        self._buffer = buffer
        self._options = options
        self._loop = loop
        self._notifier = notifier
        self._local_id = f"{options.rank}@{endpoint.channel.id}"
        self._handoffs: dict[str, Outgoing] = {}  # by the proxy's id, those that take batches
        self._on_wire: dict[str, Outgoing] = {}  # by the decoder's id, all that are not over
        self._serial = itertools.count()
        self._broken: dict[str, tuple[float, HandOffFailed]] = {}
        self._lock = threading.Lock()  # of what the decoder's reports touch: Outgoing.offered
        self._sweeping = False
        endpoint.serve(wire.KIND, self._serve)
        endpoint.channel.on_notify = self._told
        endpoint.channel.on_peer_lost = self._lost

    # ---- from the engine's step ----

    def submit(
        self, keys: Sequence[Any], objects: Sequence[Any], spec: Any, callback: Callback | None, short: bool
    ) -> concurrent.futures.Future[int]:
        """Takes one batch; returns at once.

        Args:
            keys: LMCache's keys.
            objects: Its memory objects; a reference on each is taken here.
            spec: LMCache's ``DisaggSpec``.
            callback: Called with each key when it is at the decoder.
            short: The engine got no page for some of the step's chunks, so the hand-off fails.

        Returns:
            Resolves to the number of chunks, or to why the hand-off failed.
        """
        moved: concurrent.futures.Future[int] = concurrent.futures.Future()
        for item in objects:
            item.ref_count_up()
        arguments = (list(keys), list(objects), spec, callback, moved, time.perf_counter(), short)
        self._loop.call(self._begin, *arguments)
        return moved

    def nothing_stored(self, spec: Any) -> None:
        """The engine got no page for any of a step's chunks, so there is no batch.

        Args:
            spec: LMCache's ``DisaggSpec``.
        """
        self._loop.call(self._short, spec)

    def cancel(self, req_id: str) -> None:
        """Gives up a request's hand-off."""

        def give_up() -> None:
            handoff = self._handoffs.get(req_id)
            if handoff is not None:
                self._fail(handoff, HandOffFailed("the request was cancelled"))

        self._loop.call(give_up)

    # ---- one batch ----

    def _begin(
        self,
        keys: list[Any],
        objects: list[Any],
        spec: Any,
        callback: Callback | None,
        moved: concurrent.futures.Future[int],
        started: float,
        short: bool,
    ) -> None:
        handoff = self._handoff(spec)
        handoff.touched = time.monotonic()
        last = bool(spec.is_last_prefill)
        handoff.last_seen |= last
        job = Job(handoff, handoff.batches, keys, objects, last, started, moved)
        handoff.batches += 1
        handoff.running += 1
        if short:
            self._short(spec)
        self._loop.start(self._run(job, callback))
        self._sweep_soon()

    def _handoff(self, spec: Any) -> Outgoing:
        req_id = str(spec.req_id)
        handoff = self._handoffs.get(req_id)
        if handoff is None or handoff.told:
            total = int(getattr(spec, "total_chunks", 0) or 0)
            handoff = Outgoing(req_id, f"{next(self._serial)}/{req_id}", "", "", total)
            self._handoffs[req_id] = self._on_wire[handoff.wire_id] = handoff
            try:
                rank, ranks = self._options.rank, self._options.world_size
                port = port_of(spec.receiver_init_port, rank, ranks, "disagg_spec.receiver_init_port")
                host = str(spec.receiver_host)
                handoff.peer_id = f"{host}{port}"
                handoff.url = f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
            except KvlinkError as error:
                self._fail(handoff, HandOffFailed(str(error), True))
        return handoff

    async def _run(self, job: Job, callback: Callback | None) -> None:
        handoff = job.handoff
        try:
            if handoff.failure is not None:
                raise handoff.failure
            peer = await self._reach(handoff)
            if self._options.mode == PUSH:
                await self._push(peer, job)
            else:
                await self._offer(peer, job)
        except (HandOffFailed, KvlinkError, TimeoutError, asyncio.TimeoutError) as error:
            job.release()
            failure = error if isinstance(error, HandOffFailed) else HandOffFailed(f"{type(error).__name__}: {error}")
            self._fail(handoff, failure)
            _resolve(job.moved, failure)
        except BaseException as error:
            job.release()
            self._fail(handoff, HandOffFailed(f"the prefiller is ending ({type(error).__name__})"))
            _resolve(job.moved, error)
            raise
        else:
            for key in job.keys if callback is not None else ():
                _call(callback, key)
            _resolve(job.moved, None, len(job.keys))
        finally:
            handoff.running -= 1
            handoff.touched = time.monotonic()
            self._settle(handoff)

    async def _reach(self, handoff: Outgoing) -> kvlink.Peer:
        """Connects to the decoder; one that failed a moment ago is not tried again for each of many requests."""
        broken = self._broken.get(handoff.peer_id)
        if broken is not None:
            if broken[0] > time.monotonic():
                raise broken[1]
            del self._broken[handoff.peer_id]
        try:
            await self._endpoint.connect_async(self._local_id, handoff.peer_id, handoff.url)
            handoff.peer = await self._endpoint.peer_async(handoff.peer_id)
        except KvlinkError as error:
            failure = HandOffFailed(f"decoder {handoff.url} cannot be reached: {error}")
            self._broken[handoff.peer_id] = (time.monotonic() + self._options.backoff, failure)
            raise failure from error
        peer: kvlink.Peer = handoff.peer
        return peer

    async def _ask(self, peer: kvlink.Peer, message: wire.Message) -> wire.Message:
        return wire.decode(await peer.request_async(wire.encode(message), timeout=self._options.connect_timeout))

    async def _push(self, peer: kvlink.Peer, job: Job) -> None:
        handoff = job.handoff
        granted, asked = await self._allocate(peer, job)
        if len(granted.pages) != len(job.objects):
            raise HandOffFailed(f"the decoder named {len(granted.pages)} pages for {len(job.objects)} chunks")
        wanted = [index for index, page in enumerate(granted.pages) if page >= 0]
        if wanted:
            pages, sizes = page_table([job.objects[index] for index in wanted], self._endpoint.page_bytes)
            blocks = self._endpoint.blocks(peer, pages, [granted.pages[index] for index in wanted], sizes)
            left = asked + granted.within - time.monotonic()
            if left <= 0:
                raise HandOffFailed(f"the decoder's answer came after its {granted.within:g} s")
            transfer = peer.put(blocks, timeout=left)
            await settled(transfer)
            self._endpoint.trace("put", peer, transfer)
        count = len(job.objects)
        job.release()
        complete = self._complete_with(handoff, count)
        answer = await self._ask(peer, wire.Commit(handoff.wire_id, job.number, complete))
        if isinstance(answer, wire.Refused):
            raise HandOffFailed(answer.reason)
        handoff.chunks += count
        _log.debug(
            "request %s: batch %d of %d chunks at %s after %.3f ms",
            handoff.req_id, job.number, count, peer.address, (time.perf_counter() - job.started) * 1e3,
        )  # fmt: skip

    def _complete_with(self, handoff: Outgoing, count: int) -> bool:
        """Returns whether a batch of ``count`` chunks is what was missing."""
        if not handoff.last_seen or handoff.running > 1:
            return False
        return handoff.total == 0 or handoff.chunks + count >= handoff.total

    async def _allocate(self, peer: kvlink.Peer, job: Job) -> tuple[wire.Granted, float]:
        handoff = job.handoff
        message = wire.Reserve(handoff.wire_id, job.number, handoff.total, chunk_table.describe(job.keys, job.objects))
        deadline = time.monotonic() + self._options.alloc_timeout
        while True:
            handoff.go.clear()
            asked = time.monotonic()
            answer = await self._ask(peer, message)
            if isinstance(answer, wire.Granted):
                return answer, asked
            if isinstance(answer, wire.Refused):
                raise HandOffFailed(answer.reason, answer.never)
            if not isinstance(answer, wire.Wait):
                raise RequestError(f"the decoder answered a reservation with {type(answer).__name__}")
            try:
                await asyncio.wait_for(handoff.go.wait(), max(deadline - time.monotonic(), 0.0))
            except (TimeoutError, asyncio.TimeoutError):
                failure = HandOffFailed(
                    f"decoder {handoff.url} had no room for {handoff.total or len(job.keys)} chunks within "
                    f"{self._options.alloc_timeout:g} s"
                )
                self._broken[handoff.peer_id] = (time.monotonic() + self._options.backoff, failure)
                raise failure from None

    # ---- pull ----

    async def _offer(self, peer: kvlink.Peer, job: Job) -> None:
        handoff = job.handoff
        pages = [int(item.meta.address) for item in job.objects]
        count = len(pages)
        complete = job.last or (handoff.total > 0 and handoff.chunks + count >= handoff.total)
        offer = wire.Offer(
            handoff.wire_id, job.number, handoff.total, complete, chunk_table.describe(job.keys, job.objects), pages
        )
        with self._lock:
            handoff.offered[job.number] = (job, set(pages))
        if self._options.mode != DELAYED:
            handoff.uncommitted.add(job.number)
        try:
            answer = await self._ask(peer, offer)
            if isinstance(answer, wire.Refused):
                raise HandOffFailed(answer.reason, answer.never)
        except BaseException:
            with self._lock:
                handoff.offered.pop(job.number, None)
            handoff.uncommitted.discard(job.number)
            raise
        handoff.chunks += count
        self._loop.loop.call_later(self._options.pending_ttl, self._expire, handoff, job.number)

    def _expire(self, handoff: Outgoing, number: int) -> None:
        with self._lock:
            held = handoff.offered.pop(number, None)
        if held is not None:
            _log.warning(
                "request %s: %d chunks were not read within %g s and are freed",
                handoff.req_id, len(held[1]), self._options.pending_ttl,
            )  # fmt: skip
            held[0].release()
            if number in handoff.uncommitted:
                self._fail(handoff, HandOffFailed(f"the decoder read nothing within {self._options.pending_ttl:g} s"))
            self._settle(handoff)

    def _serve(self, peer: kvlink.Peer, body: bytes) -> bytes:
        """The decoder reports what it has read. Its answer is true only if nothing was given back meanwhile."""
        message = wire.decode(body)
        if not isinstance(message, wire.Pulled):
            raise RequestError(f"a prefiller takes no {type(message).__name__}")
        return wire.encode(wire.Held(self._pulled(message)))[1:]

    def _pulled(self, message: wire.Pulled) -> bool:
        handoff = self._on_wire.get(message.handoff)
        if handoff is None:
            return False
        read = set(message.pages)
        with self._lock:
            job, left = handoff.offered.get(message.batch, (None, set()))
            held = job is not None and read <= left
            if held:
                left -= read
                if not left:
                    del handoff.offered[message.batch]
            finished = held and not left
        if job is not None and finished:
            self._loop.call(job.release)
        if message.failure:
            self._loop.call(self._fail, handoff, HandOffFailed(f"the decoder could not read it: {message.failure}"))
        self._loop.call(self._settle, handoff)
        return held

    def _told(self, peer: kvlink.Peer, message: bytes) -> None:
        if message[:1] != wire.KIND:
            return
        told = wire.decode(message[1:])
        if isinstance(told, wire.Pulled):
            self._pulled(told)
            return
        handoff = self._on_wire.get(getattr(told, "handoff", ""))
        if handoff is not None and isinstance(told, wire.Go):
            self._loop.call(handoff.go.set)
        elif handoff is not None and isinstance(told, wire.Commit):
            self._loop.call(self._shown, handoff, told.batch)

    def _shown(self, handoff: Outgoing, number: int) -> None:
        handoff.uncommitted.discard(number)
        self._settle(handoff)

    # ---- the end of a hand-off ----

    def _short(self, spec: Any) -> None:
        handoff = self._handoff(spec)
        handoff.last_seen |= bool(spec.is_last_prefill)
        self._fail(
            handoff,
            HandOffFailed(
                f"the prefiller's PD buffer of {self._buffer.total} chunks had no room for all of the request's "
                f"{handoff.total or 'chunks'}: raise its pd_buffer_size",
                handoff.total > self._buffer.total,
            ),
        )
        self._settle(handoff)
        self._sweep_soon()

    def _fail(self, handoff: Outgoing, failure: HandOffFailed) -> None:
        if handoff.failure is not None:
            return
        handoff.failure = failure
        _log.warning("request %s does not reach decoder %s: %s", handoff.req_id, handoff.url or "?", failure)
        self._notifier.failed(handoff.req_id, str(failure), failure.never)

    def _settle(self, handoff: Outgoing) -> None:
        """Ends a hand-off of which nothing is under way any more, if it is over."""
        if handoff.running or handoff.wire_id not in self._on_wire:
            return
        if handoff.failure is not None:
            self._forget(handoff)
            if handoff.last_seen:
                self._end(handoff)
            return
        if not handoff.last_seen or handoff.uncommitted:
            return
        if handoff.total and handoff.chunks < handoff.total:
            missing = f"{handoff.chunks} of {handoff.total} chunks were stored"
            self._fail(handoff, HandOffFailed(f"the prefiller is through, but only {missing}"))
            self._settle(handoff)
            return
        if not handoff.told:
            handoff.told = True
            self._notifier.done(handoff.req_id)
        if not handoff.offered:
            self._end(handoff)

    def _end(self, handoff: Outgoing) -> None:
        del self._on_wire[handoff.wire_id]
        if self._handoffs.get(handoff.req_id) is handoff:
            del self._handoffs[handoff.req_id]

    def _forget(self, handoff: Outgoing) -> None:
        """Frees what a failed hand-off still offers, and has the decoder forget it."""
        with self._lock:
            offered, handoff.offered = handoff.offered, {}
        for job, _ in offered.values():
            job.release()
        peer = handoff.peer
        if peer is not None and peer.error is None:
            self._loop.start(self._cancel(peer, handoff.wire_id))

    async def _cancel(self, peer: kvlink.Peer, wire_id: str) -> None:
        try:
            await self._ask(peer, wire.Cancel(wire_id))
        except KvlinkError as error:
            _log.debug("telling %s to forget %s: %s", peer.address, wire_id, error)

    def _lost(self, peer: kvlink.Peer, error: KvlinkError) -> None:
        def give_up() -> None:
            for handoff in [handoff for handoff in self._on_wire.values() if handoff.peer is peer]:
                self._fail(handoff, HandOffFailed(f"decoder {handoff.url} went away: {error}"))
                self._settle(handoff)

        self._loop.call(give_up)

    # ---- time ----

    def _sweep_soon(self) -> None:
        if not self._sweeping:
            self._sweeping = True
            self._loop.loop.call_later(min(max(self._options.idle_timeout / 4, 0.02), 5.0), self._sweep)

    def _sweep(self) -> None:
        """Gives up hand-offs that do not go on: the request ended in the engine, or the decoder says nothing."""
        self._sweeping = False
        before = time.monotonic() - self._options.idle_timeout
        for handoff in list(self._on_wire.values()):
            if handoff.running or handoff.told or handoff.touched > before:
                continue
            if handoff.offered and handoff.last_seen:
                continue  # it has its own deadline
            if handoff.failure is None:
                who = (
                    "the decoder showed nothing" if handoff.last_seen else f"{handoff.chunks} chunks came, and no more,"
                )
                why = f"the hand-off did not go on: {who} for {self._options.idle_timeout:g} s"
                self._fail(handoff, HandOffFailed(why))
            handoff.last_seen = True
            self._settle(handoff)
        if self._on_wire:
            self._sweep_soon()

    def held(self) -> dict[str, int]:
        """Returns hand-offs and batches that are not over; of one moment."""
        handoffs = list(self._on_wire.values())
        return {
            "handoffs": len(handoffs),
            "running": sum(handoff.running for handoff in handoffs),
            "offered": sum(len(handoff.offered) for handoff in handoffs),
        }


def _resolve(moved: concurrent.futures.Future[int], error: BaseException | None, count: int = 0) -> None:
    """Ends LMCache's future, whoever may have cancelled it."""
    if not moved.set_running_or_notify_cancel():
        return
    if error is None:
        moved.set_result(count)
    else:
        moved.set_exception(error)


def _call(callback: Callback | None, key: Any) -> None:
    """Calls LMCache's callback; what it raises is LMCache's, and logged."""
    try:
        if callback is not None:
            callback(key)
    except Exception:
        _log.exception("LMCache's on_complete_callback failed")
