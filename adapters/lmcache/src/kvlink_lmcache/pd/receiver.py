"""The decoder's side: grants pages, takes what is pushed, reads what is offered, and lends it to LMCache's engine."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

import kvlink
from kvlink.errors import KvlinkError, RequestError

from ..buffer import PDBuffer
from ..endpoint import Endpoint, page_table
from ..log import get_logger
from . import chunks as chunk_table
from . import wire
from .ledger import Entry, HandOffId, Ledger, NoRoom
from .loop import LoopThread
from .options import DELAYED, PULL, PUSH, PDOptions
from .windows import Reading, Windows

_log = get_logger()


class Receiver:
    """One decoder rank.

    Attributes:
        ledger: What is here and what is promised.
    """

    def __init__(self, endpoint: Endpoint, buffer: PDBuffer, options: PDOptions, loop: LoopThread) -> None:
        """Starts to serve.

        Args:
            endpoint: The channel.
            buffer: The PD buffer.
            options: The configuration.
            loop: For deadlines and reads.
        """
        self._endpoint = endpoint
        self._buffer = buffer
        self._options = options
        self._loop = loop
        self._peers: dict[str, kvlink.Peer] = {}
        self._go: dict[HandOffId, asyncio.Event] = {}
        self._sweeping = False
        self.ledger = Ledger(
            buffer,
            alloc_timeout=options.alloc_timeout,
            idle_timeout=options.idle_timeout,
            pending_ttl=options.pending_ttl if options.mode != PUSH else max(options.pending_ttl, options.idle_timeout),
            write_timeout=options.transfer_timeout + 2.0,  # the engine's grace for what cannot be stopped at once
            extra_references=1 if options.engine_counts else 0,
            on_go=self._go_on,
        )
        buffer.pages.freed = self._freed
        endpoint.serve(wire.KIND, self._serve)
        endpoint.channel.on_peer_lost = self._lost

    # ---- messages ----

    def _serve(self, peer: kvlink.Peer, body: bytes) -> bytes:
        message = wire.decode(body)
        owner = (peer.id, getattr(message, "handoff", ""))
        if len(owner[1]) > wire.MAX_TEXT:
            raise RequestError(f"a request id of {len(owner[1])} characters; at most {wire.MAX_TEXT} are taken")
        self._peers[peer.id] = peer
        answer: wire.Message
        if isinstance(message, wire.Reserve):
            answer = self._reserve(owner, message)
        elif isinstance(message, wire.Commit):
            kept = self.ledger.commit(owner, message.batch, message.complete)
            answer = wire.Done() if kept else wire.Refused("the hand-off was given up before: it took too long")
        elif isinstance(message, wire.Offer):
            answer = self._offer(peer, owner, message)
        elif isinstance(message, wire.Cancel):
            self.ledger.drop(owner)
            answer = wire.Done()
        else:
            raise RequestError(f"a decoder takes no {type(message).__name__}")
        self._sweep_later()
        return wire.encode(answer)[1:]

    def _reserve(self, owner: HandOffId, message: wire.Reserve) -> wire.Message:
        keys, tokens = chunk_table.read(message.chunks, self._buffer)
        try:
            if not self.ledger.reserve(owner, message.total, len(keys)):
                return wire.Wait()
            return wire.Granted(self.ledger.grant(owner, message.batch, keys, tokens), self._options.transfer_timeout)
        except NoRoom as error:
            never = max(message.total, len(keys)) > self._buffer.total
            return wire.Refused(str(error), never)

    def _go_on(self, owner: HandOffId) -> None:
        """Room was reserved for who waited: here for a read, or at a prefiller."""
        event = self._go.get(owner)
        if event is not None:
            self._loop.call(event.set)
            return
        peer = self._peers.get(owner[0])
        if peer is not None:
            self._tell(peer, wire.Go(owner[1]))

    def _lost(self, peer: kvlink.Peer, error: KvlinkError) -> None:
        self._peers.pop(peer.id, None)
        self.ledger.peer_lost(peer.id)
        self._sweep_later()
        _log.info("prefiller %s went away: %s", peer.address, error)

    # ---- time ----

    def _freed(self) -> None:
        self._loop.call(self.ledger.room_came)

    def _sweep_later(self) -> None:
        self._loop.call(self._sweep_soon)

    def _sweep_soon(self) -> None:
        if not self._sweeping:
            self._sweeping = True
            options = self._options
            shortest = min(options.alloc_timeout, options.idle_timeout, options.pending_ttl, options.transfer_timeout)
            self._loop.loop.call_later(min(max(shortest / 4, 0.02), 5.0), self._sweep)

    def _sweep(self) -> None:
        self._sweeping = False
        if self.ledger.sweep():
            self._sweep_soon()

    # ---- pull ----

    def _offer(self, peer: kvlink.Peer, owner: HandOffId, message: wire.Offer) -> wire.Message:
        keys, tokens = chunk_table.read(message.chunks, self._buffer)
        if len(message.pages) != len(keys) or min(message.pages) < 0:
            raise RequestError(f"{len(message.pages)} pages for {len(keys)} chunks")
        if self._options.mode == DELAYED:
            self.ledger.offered(owner, message.batch, keys, tokens, message.pages, message.complete)
            return wire.Done()
        if self._options.mode != PULL:
            return wire.Refused("the decoder is configured for push (pd_pull_mode: false), the prefiller for pull")
        if max(message.total, len(keys)) > self._buffer.total:
            try:
                self.ledger.reserve(owner, message.total, len(keys))
            except NoRoom as error:
                return wire.Refused(str(error), True)
        self._loop.start(self._pull(peer, owner, message, keys, tokens))
        return wire.Done()

    async def _pull(
        self, peer: kvlink.Peer, owner: HandOffId, message: wire.Offer, keys: Sequence[Any], tokens: Sequence[int]
    ) -> None:
        """Reads a batch as soon as there is room for it."""
        failure = ""
        try:
            await self._room(owner, message.total, len(keys))
            pages = self.ledger.grant(owner, message.batch, keys, tokens)
            wanted = [index for index, page in enumerate(pages) if page >= 0]
            entries = self.ledger.entries(owner, message.batch)
            if wanted:
                remote = [message.pages[index] for index in wanted]
                items = [entry.item for entry in entries]
                local, sizes = page_table(items, self._endpoint.page_bytes)
                transfer = peer.get(
                    self._endpoint.blocks(peer, local, remote, sizes), timeout=self._options.transfer_timeout
                )
                await transfer
                self._endpoint.trace("get", peer, transfer)
        except (KvlinkError, NoRoom, TimeoutError) as error:
            failure = f"{type(error).__name__}: {error}"
            _log.warning("request %s: reading from prefiller %s failed: %s", owner[1], peer.address, error)
            self.ledger.drop_batch(owner, message.batch)
            self.ledger.drop(owner)
        try:
            report = wire.Pulled(message.handoff, message.batch, message.pages, failure)
            answer = await peer.request_async(wire.encode(report), timeout=self._options.connect_timeout)
            held = wire.decode(answer)
            if not failure and not (
                isinstance(held, wire.Held) and held.held and self.ledger.commit(owner, message.batch, message.complete)
            ):
                raise RequestError("the prefiller had given the chunks up while they were read")
            if not failure:
                peer.notify(wire.encode(wire.Commit(message.handoff, message.batch, message.complete)))
        except KvlinkError as error:
            _log.warning("request %s from prefiller %s is given up: %s", owner[1], peer.address, error)
            self.ledger.drop_batch(owner, message.batch)
            self.ledger.drop(owner)
            self._tell(peer, wire.Pulled(message.handoff, message.batch, [], str(error)))
        self._sweep_soon()

    async def _room(self, owner: HandOffId, total: int, pages: int) -> None:
        """Waits for room, with the deadline of every allocation."""
        deadline = time.monotonic() + self._options.alloc_timeout
        event = self._go.setdefault(owner, asyncio.Event())
        try:
            while not self.ledger.reserve(owner, total, pages):
                left = deadline - time.monotonic()
                try:
                    await asyncio.wait_for(event.wait(), max(left, 0.0))
                except (TimeoutError, asyncio.TimeoutError):
                    raise NoRoom(
                        f"the decoder's PD buffer had no room for {max(total, pages)} chunks within "
                        f"{self._options.alloc_timeout:g} s"
                    ) from None
                event.clear()
        finally:
            self._go.pop(owner, None)

    # ---- LMCache's engine ----

    def get(self, keys: Sequence[Any]) -> list[Any]:
        """Lends chunks to the engine, in order, up to the first that is not there; the rest is None.

        Args:
            keys: LMCache's keys.
        """
        entries: list[Entry] = []
        for key in keys:
            entry = self.ledger.take(key)
            if entry is None:
                break
            entries.append(entry)
        absent = [entry for entry in entries if entry.item is None]
        if absent and not self._fetch(absent):
            first = entries.index(absent[0])
            for entry in entries[first:]:
                self.ledger.put_back(entry)
            self._give_back(absent)
            entries = entries[:first]
        return [entry.item for entry in entries] + [None] * (len(keys) - len(entries))

    def _abandon(self, entries: Sequence[Entry]) -> None:
        """Takes chunks back from the engine, which will not remove them, and gives them up."""
        for entry in entries:
            self.ledger.put_back(entry)
        self._give_back(entries)

    def _give_back(self, entries: Sequence[Entry]) -> None:
        """Tells prefillers that chunks will not be read, and forgets their hand-offs."""
        batches: dict[tuple[HandOffId, int], list[int]] = defaultdict(list)
        for entry in entries:
            batches[(entry.owner.id, entry.batch)].append(entry.page)
        for (owner, number), pages in batches.items():
            peer = self._peers.get(owner[0])
            if peer is not None:
                self._tell(peer, wire.Pulled(owner[1], number, pages, "it gave up"))
            self.ledger.drop(owner)

    def _tell(self, peer: kvlink.Peer, message: wire.Message) -> None:
        """Notifies a prefiller; one that is gone has been told otherwise."""
        try:
            peer.notify(wire.encode(message))
        except KvlinkError as error:
            _log.debug("telling %s: %s", peer.address, error)

    def _fetch(self, entries: Sequence[Entry]) -> bool:
        """Reads chunks that stayed at the prefiller (delayed pull), on the engine's thread, with a deadline.

        What does not fit the buffer as a whole is read in windows, while the engine copies it.
        """
        groups: dict[str, list[Entry]] = defaultdict(list)
        for entry in entries:
            groups[entry.owner.id[0]].append(entry)
        done: list[tuple[Entry, Any]] = []
        try:
            for peer_id, group in groups.items():
                peer = self._peers.get(peer_id)
                if peer is None:
                    raise NoRoom("the prefiller went away before its chunks were read")
                if len(group) > self._buffer.free_pages:
                    done += zip(group, self._windows(peer, group), strict=True)
                    continue
                items = self._buffer.take([entry.tokens for entry in group])
                if items is None:
                    raise NoRoom(f"{len(group)} pages of the decoder's PD buffer are taken by others")
                done += zip(group, items, strict=True)
                self._start(peer, group, items).finish()
        except (KvlinkError, NoRoom) as error:
            _log.warning("reading %d chunks from the prefiller failed: %s", len(entries), error)
            for _, item in done:
                item.ref_count_down()
            return False
        for entry, item in done:
            self.ledger.fill(entry, item)
        return True

    def _windows(self, peer: kvlink.Peer, group: Sequence[Entry]) -> list[Any]:
        if self._buffer.free_pages == 0:
            raise NoRoom("no page of the decoder's PD buffer is free")

        def start(entries: Sequence[Entry], items: list[Any]) -> Reading:
            return self._start(peer, entries, items)

        return list(Windows(group, self._buffer, start, lambda: self._abandon(group)).items)

    def _start(self, peer: kvlink.Peer, group: Sequence[Entry], items: list[Any]) -> Reading:
        local, sizes = page_table(items, self._endpoint.page_bytes)
        remote = np.fromiter((entry.page for entry in group), dtype=np.int64, count=len(group))
        blocks = self._endpoint.blocks(peer, local, remote, sizes)
        transfer = peer.get(blocks, timeout=self._options.transfer_timeout)
        return Reading(items, transfer, lambda: self._finish(peer, group, transfer))

    def _finish(self, peer: kvlink.Peer, group: Sequence[Entry], transfer: kvlink.Transfer) -> None:
        """Waits for a read, and asks the prefiller whether it had held all of it until now."""
        transfer.wait()
        self._endpoint.trace("get", peer, transfer)
        batches: dict[tuple[str, int], list[int]] = defaultdict(list)
        for entry in group:
            batches[(entry.owner.id[1], entry.batch)].append(entry.page)
        for (handoff, number), pages in batches.items():
            report = wire.encode(wire.Pulled(handoff, number, pages))
            answer = wire.decode(peer.request(report, timeout=self._options.connect_timeout))
            if not isinstance(answer, wire.Held) or not answer.held:
                raise NoRoom("the prefiller had given the chunks up while they were read")
