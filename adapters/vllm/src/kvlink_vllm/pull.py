"""One pull, from the claim to the confirmation that the lease stood. Runs on a background thread of the decoder."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import kvlink
from kvlink.errors import KvlinkError
from kvlink_vllm import wire
from kvlink_vllm.layout import CacheLayout, build_ranges, checksum
from kvlink_vllm.links import Link
from kvlink_vllm.metadata import Read
from kvlink_vllm.settings import Settings


class PullError(Exception):
    """A pull that did not bring the blocks.

    Attributes:
        phase: "connect", "queued" (for a thread), "claim", "transfer", "lease", "verify" or "cancelled".
    """

    def __init__(self, phase: str, message: str) -> None:
        super().__init__(message)
        self.phase = phase


class NotYet(Exception):
    """The prefiller does not know the hand-off; it sends ``Ready`` when it comes."""


@dataclass
class Pull:
    """A pull under way.

    Attributes:
        read: What to pull.
        address: The prefiller's worker.
        begin: Monotonic time of the order.
        deadline: Monotonic time at which it is given up.
        stream: Device stream whose work until now comes before the transfer; None = none.
        link: Future of the link, once it is done.
        ready: The prefiller has said that the hand-off is there since it was last asked for it.
        claimed_at: Monotonic time of the first claim, or None.
        cancelled: The request is gone.
        transfer: The transfer while it runs.
        record: Numbers for the log and the trace.
    """

    read: Read
    address: str
    begin: float
    deadline: float
    stream: int | None = None
    link: Any = None
    ready: bool = False
    claimed_at: float | None = None
    cancelled: bool = False
    transfer: Any = None
    record: dict[str, Any] = field(default_factory=dict)

    def cancel(self) -> None:
        """Stops it as soon as possible; it still ends on the thread that runs it, or on that of those that wait."""
        self.cancelled = True
        transfer = self.transfer
        if transfer is not None:
            transfer.cancel()

    def left(self, phase: str, limit: float | None = None) -> float:
        """Returns the seconds left, at most ``limit``.

        Args:
            phase: What is being done, for the error.
            limit: Seconds this step may take.

        Raises:
            PullError: Cancelled, or out of time.
        """
        if self.cancelled:
            raise PullError("cancelled", "the request was aborted")
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise PullError(phase, f"no time left after {time.monotonic() - self.begin:.1f} s (kvlink.pull_timeout)")
        return left if limit is None else min(left, limit)


class Puller:
    """Runs single pulls against a connected link.

    Args:
        layout: This worker's caches.
        handles: Region handle of each of our storages.
        scratch: Region for generation words.
        settings: The connector's settings.
    """

    def __init__(self, layout: CacheLayout, handles: Sequence[int], scratch: Any, settings: Settings) -> None:
        self._layout = layout
        self._handles = list(handles)
        self._scratch = scratch
        self._words = np.frombuffer(scratch.buffer(), dtype=np.uint64)
        self._settings = settings
        self._slots = list(range(len(self._words)))
        self._slots_lock = threading.Lock()

    def run(self, pull: Pull, link: Link) -> None:
        """Claims, transfers and confirms.

        Args:
            pull: The pull; its record is filled.
            link: The prefiller's worker.

        Raises:
            PullError: The blocks did not come, or may not be trusted. Nothing writes to them any more.
            NotYet: It should be run again when the hand-off is there. Nothing writes to the blocks.
        """
        read = pull.read
        begin = pull.claimed_at = pull.claimed_at or time.monotonic()
        claim = self._claim(pull, link)
        remote = self._remote_blocks(read, claim, link)
        local = np.asarray(read.blocks, dtype=np.int64)
        pull.record["claim_seconds"] = time.monotonic() - begin
        # vLLM hands freed blocks out again in falling order; sorted, such runs are neighbours that can be joined.
        order = np.argsort(remote)
        ranges = build_ranges(
            kvlink.RANGE, self._layout, self._handles, link.planes, link.handles, local[order], remote[order]
        )
        self._transfer(pull, link, ranges)
        self._confirm(pull, link, claim)
        if self._settings.verify:
            self._verify(pull, link, local, len(remote))
            # The sums were taken while the lease stood only if it stands now.
            self._confirm(pull, link, claim)

    def _claim(self, pull: Pull, link: Link) -> wire.ClaimReply:
        read = pull.read
        message = wire.encode(wire.Claim(read.handoff, read.digest, read.tokens))
        pull.ready = False  # before the question: what is said from now on must not be lost
        timeout = pull.left("claim", self._settings.request_timeout)
        try:
            reply = wire.claim_reply.decode(link.peer.request(message, timeout=timeout))
        except Exception as error:
            raise PullError("claim", f"the prefiller's worker was not asked: {describe(error)}") from error
        if reply.status == wire.PENDING:
            raise NotYet(reply.reason)
        if reply.status != wire.OK:
            raise PullError("claim", reply.reason or f"the prefiller answered {reply.status!r}")
        return reply

    @staticmethod
    def _remote_blocks(read: Read, claim: wire.ClaimReply, link: Link) -> Any:
        blocks = np.frombuffer(claim.blocks, dtype="<i8")[read.first : read.first + len(read.blocks)]
        if len(blocks) != len(read.blocks):
            raise PullError(
                "claim", f"the hand-off has {len(claim.blocks) // 8} blocks, {read.first + len(read.blocks)} are needed"
            )
        if len(blocks) and (blocks.min() < 0 or blocks.max() >= link.blocks):
            raise PullError("claim", "the hand-off names blocks outside the prefiller's cache")
        return blocks.astype(np.int64)

    def _transfer(self, pull: Pull, link: Link, ranges: Any) -> None:
        timeout = pull.left("transfer")
        begin = time.monotonic()
        try:
            transfer = link.peer.get(ranges, stream=pull.stream, timeout=timeout)
            pull.transfer = transfer
            pull.record["submit_seconds"] = time.monotonic() - begin
            if pull.cancelled:
                transfer.cancel()
            # No time limit here: the transfer has its own deadline, and only its completion says that nothing
            # writes to our blocks any more.
            transfer.wait()
        except KvlinkError as error:
            if pull.cancelled:
                raise PullError("cancelled", "the request was aborted") from error
            raise PullError("transfer", describe(error)) from error
        finally:
            pull.transfer = None
        result = transfer.result()
        pull.record.update(
            transfer_seconds=time.monotonic() - begin,
            engine_seconds=result.duration_s,
            bytes=int(result.nbytes),
            ranges=int(result.ranges),
            path=result.path,
        )

    def _confirm(self, pull: Pull, link: Link, claim: wire.ClaimReply) -> None:
        """Reads the generation word after the blocks: unmoved means that they were still held when they were read."""
        with self._slots_lock:
            slot = self._slots.pop()
        try:
            row = np.zeros(1, dtype=kvlink.RANGE)
            row["mem"], row["rmem"] = self._scratch.handle, link.leases
            row["local_offset"], row["remote_offset"], row["length"] = 8 * slot, 8 * claim.slot, 8
            link.peer.get(row, timeout=pull.left("lease")).wait()
            generation = int(self._words[slot])
        except KvlinkError as error:
            raise PullError("lease", f"the lease could not be confirmed: {describe(error)}") from error
        finally:
            with self._slots_lock:
                self._slots.append(slot)
        if generation != claim.generation:
            raise PullError("lease", "the lease ended before the blocks were read; what was read is thrown away")

    def _verify(self, pull: Pull, link: Link, local: Any, count: int) -> None:
        read = pull.read
        message = wire.encode(wire.Checksum(read.handoff, read.first, count))
        try:
            reply = wire.checksum_reply.decode(link.peer.request(message, timeout=pull.left("verify")))
        except Exception as error:
            raise PullError("verify", f"no checksum of the source: {describe(error)}") from error
        ours = checksum(self._layout, local)
        pull.record.update(source_checksum=reply.checksum, destination_checksum=ours)
        if reply.status != wire.OK:
            raise PullError("verify", "the prefiller gives no checksum (set kvlink.verify there too)")
        if reply.checksum != ours:
            raise PullError("verify", f"checksums differ: source {reply.checksum}, destination {ours}")


def describe(error: BaseException) -> str:
    """Returns an error's text, never empty, with its type."""
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
