"""All pulls of one decoder's worker: ordering, renewing, cancelling, reporting. Nothing here blocks an engine step."""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from kvlink_vllm import wire
from kvlink_vllm.links import Link, Links
from kvlink_vllm.log import get_logger
from kvlink_vllm.metadata import Read, Track
from kvlink_vllm.pull import NotYet, Pull, Puller, PullError, describe
from kvlink_vllm.settings import Settings
from kvlink_vllm.waiting import Waiting

logger = get_logger()

_IDS_A_NOTICE = 1000
_CHILD = re.compile(r"\d+_")
"""vLLM names the requests that one with n > 1 becomes "0_<id>", "1_<id>", ...; they come one after the other."""
_LINGER = 0.25
_SIBLINGS = ""
"""Stands among a hand-off's requests for siblings that may still come within ``_LINGER`` seconds."""


@dataclass(frozen=True)
class Outcome:
    """How a pull ended.

    Attributes:
        read: What was to be pulled.
        failure: None, or the phase that failed.
        reason: For people; empty when it went well.
        record: Numbers for the log and the trace.
    """

    read: Read
    failure: str | None
    reason: str
    record: dict[str, Any]


class Pulls:
    """Runs pulls on background threads.

    Args:
        links: Connections.
        puller: Runs one pull.
        settings: The connector's settings.
        rank: This worker's rank, which picks the address.
        executor: Threads for pulls.
        notices: Thread for notices to prefillers.
        report: Gets each outcome, on the thread of the pull.
        on_end: Called once an outcome can be taken.
    """

    def __init__(
        self,
        links: Links,
        puller: Puller,
        settings: Settings,
        rank: int,
        executor: ThreadPoolExecutor,
        notices: ThreadPoolExecutor,
        report: Callable[[Outcome], None],
        on_end: Callable[[], None],
    ) -> None:
        self._links = links
        self._puller = puller
        self._settings = settings
        self._rank = rank
        self._executor = executor
        self._notices = notices
        self._report = report
        self._on_end = on_end
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._active: dict[str, Pull] = {}
        self._waiting = Waiting(self._finish)
        # Requests that still want a hand-off, and where: the last one to let go says done. Requests of one
        # parent (n > 1) share a hand-off.
        self._wanted: dict[tuple[str, str], set[str]] = {}
        self._request: dict[str, tuple[str, str]] = {}
        self._outcomes: deque[Outcome] = deque()
        self._lingering: deque[tuple[float, tuple[str, str]]] = deque()
        self._lease = settings.lease
        self._closed = False
        self._renewer: threading.Thread | None = None

    def track(self, track: Track) -> None:
        """Connects ahead of the pull and keeps the lease alive while the request queues.

        Args:
            track: The request.
        """
        address = track.addresses[self._rank]
        self._want(track.request_id, address, track.handoff)
        self._links.get(address).add_done_callback(
            lambda future: None if future.exception() else self._renew_new(future.result(), address, track.handoff)
        )

    def start(self, read: Read, stream: int | None = None) -> None:
        """Starts a pull; its outcome is among those of a later ``take``.

        Args:
            read: What to pull.
            stream: Device stream whose work until now may still touch the blocks; None = none.
        """
        now = time.monotonic()
        pull = Pull(read, read.addresses[self._rank], now, now + self._settings.pull_timeout, stream)
        with self._lock:
            self._active[read.request_id] = pull
        try:
            self._waiting.add(pull, "connect", pull.deadline, self._too_late("the prefiller's worker is not connected"))
            self._want(read.request_id, pull.address, read.handoff)
            self._links.get(pull.address).add_done_callback(lambda future: self._connected(pull, future))
        except Exception as error:  # such as no more threads: vLLM waits for this request, so it must end
            if self._waiting.take(pull, "connect"):
                self._finish(pull, PullError("connect", describe(error)))

    def drop(self, request_id: str) -> None:
        """Lets a hand-off go that will not be pulled.

        Args:
            request_id: The request that wanted it.
        """
        self._release(request_id)

    def cancel(self, request_ids: Iterable[str]) -> None:
        """Cancels the pulls of requests that ended; each still gets its outcome once nothing writes any more.

        Args:
            request_ids: Requests that ended; most have no pull.
        """
        for request_id in request_ids:
            pull = self._active.get(request_id)
            if pull is not None:
                pull.cancel()
                self._waiting.look()
            elif request_id in self._request:
                self._release(request_id)

    def ready(self, handoff: str) -> None:
        """Goes on with pulls that came before the prefiller knew their hand-off.

        Args:
            handoff: The hand-off that is there now.
        """
        with self._lock:
            pulls = [pull for pull in self._active.values() if pull.read.handoff == handoff]
        for pull in pulls:
            pull.ready = True
            self._ask_again(pull)

    def take(self) -> list[Outcome]:
        """Returns the outcomes since the last call, each once."""
        outcomes = []
        while self._outcomes:
            outcomes.append(self._outcomes.popleft())
        return outcomes

    @property
    def running(self) -> bool:
        """Whether a pull is under way."""
        return bool(self._active)

    def counts(self) -> dict[str, int]:
        """Returns how many pulls run and how many requests hold a hand-off."""
        with self._lock:
            return {"pulls": len(self._active), "wanted": len(self._request)}

    def close(self) -> None:
        """Cancels everything; the threads end by themselves."""
        with self._lock:
            self._closed = True
            pulls = list(self._active.values())
            self._changed.notify_all()
        for pull in pulls:
            pull.cancel()
        self._waiting.close()

    # On background threads

    def _connected(self, pull: Pull, future: Future[Link]) -> None:
        pull.link = future
        if self._waiting.take(pull, "connect"):
            self._submit(pull)

    def _submit(self, pull: Pull) -> None:
        """Queues a pull, which waits for nothing else, for a thread."""
        try:
            self._waiting.add(pull, "queued", pull.deadline, self._too_late("all kvlink.pulls are busy"))
            self._executor.submit(self._run, pull)
        except RuntimeError as error:  # shut down meanwhile, or no more threads
            if self._waiting.take(pull, "queued"):
                self._finish(pull, PullError("cancelled" if self._closed else "queued", str(error)))

    def _run(self, pull: Pull) -> None:
        if not self._waiting.take(pull, "queued"):
            return  # it ended while it was queued
        failure: PullError | None = None
        try:
            pull.record.setdefault("wait_seconds", time.monotonic() - pull.begin)
            error = pull.link.exception()
            if error is not None:
                raise PullError("connect", describe(error))
            pull.left("queued")
            self._shorten(pull.link.result())
            self._puller.run(pull, pull.link.result())
        except PullError as error:
            failure = error
        except NotYet as pending:
            if self._park(pull, str(pending)):
                return
            failure = PullError("claim", str(pending))
        except Exception as error:
            logger.exception("kvlink: request %s: unexpected error in its pull", pull.read.request_id)
            failure = PullError("transfer", describe(error))
        self._finish(pull, failure)

    def _park(self, pull: Pull, reason: str) -> bool:
        """Lets a pull wait for its hand-off without a thread; False if it has waited long enough."""
        give_up = min((pull.claimed_at or pull.begin) + self._settings.handoff_wait, pull.deadline)
        if time.monotonic() >= give_up:
            return False
        try:
            self._waiting.add(pull, "claim", give_up, reason)
        except RuntimeError:  # shut down meanwhile
            return not self._waiting.take(pull, "claim")
        if pull.ready:  # said before it was parked
            self._ask_again(pull)
        return True

    def _ask_again(self, pull: Pull) -> None:
        if self._waiting.take(pull, "claim"):
            self._submit(pull)

    def _too_late(self, why: str) -> str:
        return f"{why} after {self._settings.pull_timeout:g} s (kvlink.pull_timeout)"

    def _finish(self, pull: Pull, failure: PullError | None) -> None:
        read = pull.read
        pull.record["total_seconds"] = time.monotonic() - pull.begin
        outcome = Outcome(read, failure.phase if failure else None, str(failure or ""), pull.record)
        with self._lock:
            self._active.pop(read.request_id, None)
        # The outcome goes first: the engine may be waiting for it; the prefiller can free its blocks a moment later.
        self._outcomes.append(outcome)
        self._on_end()
        self._release(read.request_id)
        try:
            self._report(outcome)
        except Exception:
            logger.exception("kvlink: request %s: its pull could not be reported", read.request_id)

    def _want(self, request_id: str, address: str, handoff: str) -> None:
        with self._lock:
            if request_id in self._request or self._closed:
                return
            self._request[request_id] = (address, handoff)
            self._wanted.setdefault((address, handoff), set()).add(request_id)
            if self._renewer is None:
                self._renewer = threading.Thread(target=self._renew_all, name="kvlink-renew", daemon=True)
                self._renewer.start()
            self._changed.notify_all()

    def _release(self, request_id: str) -> None:
        """Takes a request off its hand-off; when it was the last, the prefiller is told on a background thread."""
        with self._lock:
            key = self._request.pop(request_id, None)
            if key is None:
                return
            requests = self._wanted[key]
            requests.discard(request_id)
            if not requests and _CHILD.match(request_id):
                requests.add(_SIBLINGS)
                self._lingering.append((time.monotonic() + _LINGER, key))
                self._changed.notify_all()
            if requests:
                return
            del self._wanted[key]
        self._done(key)

    def _done(self, key: tuple[str, str]) -> None:
        address, handoff = key
        link = self._links.connected(address)
        if link is not None:
            self._tell(link, wire.Done([handoff]))

    def _renew_new(self, link: Link, address: str, handoff: str) -> None:
        """First contact: the short lease before it becomes a full one. If the request is gone already, it is over."""
        self._shorten(link)
        with self._lock:  # told under it: the done of a request that ends now must come after
            self._tell(link, wire.Renew([handoff]))
            if (address, handoff) not in self._wanted:
                self._tell(link, wire.Done([handoff]))  # it counts only after a renewal, which gives the hold

    def _shorten(self, link: Link) -> None:
        """Renews often enough for the prefiller with the shortest lease."""
        with self._lock:
            if link.lease < self._lease:
                self._lease = link.lease
                self._changed.notify_all()

    def _tell(self, link: Link, message: Any) -> None:
        try:
            self._notices.submit(_notify, link, message)
        except RuntimeError as error:  # shut down meanwhile: the lease runs out by itself
            logger.debug("kvlink: %s not sent: %s", type(message).__name__, error)

    def _end_lingering(self, now: float) -> list[tuple[str, str]]:
        """Returns hand-offs for which no sibling came in time; the lock is held."""
        over = []
        while self._lingering and self._lingering[0][0] <= now:
            _, key = self._lingering.popleft()
            requests = self._wanted.get(key)
            if requests is not None:
                requests.discard(_SIBLINGS)
                if not requests:
                    del self._wanted[key]
                    over.append(key)
        return over

    def _renew_all(self) -> None:
        """Renews at a third of the lease while anything is wanted; sleeps for good otherwise."""
        due = 0.0
        while True:
            with self._lock:
                if self._wanted:
                    due = min(due, time.monotonic() + self._lease / 3)
                    first = min(due, self._lingering[0][0]) if self._lingering else due
                    self._changed.wait(max(0.0, first - time.monotonic()))
                else:
                    self._changed.wait()
                    due = time.monotonic() + self._lease / 3
                if self._closed:
                    return
                now = time.monotonic()
                over = self._end_lingering(now)
                by_address: dict[str, list[str]] = {}
                if now >= due:
                    due = now + self._lease / 3
                    for address, handoff in self._wanted:
                        by_address.setdefault(address, []).append(handoff)
            for key in over:
                self._done(key)
            for address, handoffs in by_address.items():
                link = self._links.connected(address)
                if link is not None:
                    for start in range(0, len(handoffs), _IDS_A_NOTICE):
                        _notify(link, wire.Renew(handoffs[start : start + _IDS_A_NOTICE]))


def _notify(link: Link, message: Any) -> None:
    try:
        link.peer.notify(wire.encode(message))
    except Exception as error:
        logger.debug("kvlink: %s was not told %s: %s", link.peer.address, type(message).__name__, describe(error))
