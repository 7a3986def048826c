"""Pulls that wait without a thread: for their link, for a thread, or for a hand-off that is not there yet.

One thread ends those that are cancelled or out of time, at that moment; it sleeps otherwise. Whoever wants to go on
with a pull takes it out first, so each pull goes on or ends, never both.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from kvlink_vllm.log import get_logger
from kvlink_vllm.pull import Pull, PullError

logger = get_logger()


@dataclass(frozen=True)
class _Entry:
    phase: str
    until: float
    reason: str


class Waiting:
    """The pulls that wait.

    Args:
        over: Ends a pull that was taken out with an error; called on the thread of this class.
    """

    def __init__(self, over: Callable[[Pull, PullError], None]) -> None:
        self._over = over
        self._changed = threading.Condition()
        self._entries: dict[int, tuple[Pull, _Entry]] = {}
        self._thread: threading.Thread | None = None
        self._looks_at = 0.0  # when the thread looks next by itself
        self._closed = False

    def add(self, pull: Pull, phase: str, until: float, reason: str) -> None:
        """Puts a pull among those that wait, or changes what it waits for.

        Args:
            pull: The pull.
            phase: What it waits for; the phase of its failure.
            until: Monotonic time at which it fails.
            reason: Why it failed then, for people.

        Raises:
            RuntimeError: No more threads; the pull can still be taken.
        """
        with self._changed:
            self._entries[id(pull)] = (pull, _Entry(phase, until, reason))
            if self._thread is None:
                self._looks_at = until
                thread = threading.Thread(target=self._watch, name="kvlink-wait", daemon=True)
                thread.start()
                self._thread = thread
            elif pull.cancelled or self._closed or until < self._looks_at:
                self._changed.notify()

    def take(self, pull: Pull, phase: str) -> bool:
        """Takes a pull out to go on with it.

        Args:
            pull: The pull.
            phase: What it must be waiting for.

        Returns:
            False if it does not wait for that, among others because it ended.
        """
        with self._changed:
            item = self._entries.get(id(pull))
            if item is None or item[1].phase != phase:
                return False
            del self._entries[id(pull)]
            return True

    def look(self) -> None:
        """Ends at once what was cancelled."""
        with self._changed:
            self._changed.notify()

    def close(self) -> None:
        """Ends all that waits, and whatever is added later; the thread ends then too."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _watch(self) -> None:
        while True:
            with self._changed:
                over = self._take_over()
                if not over:
                    if self._closed:
                        self._thread = None
                        return
                    now = time.monotonic()
                    self._looks_at = min((entry.until for _, entry in self._entries.values()), default=now + 3600.0)
                    self._changed.wait(max(0.0, self._looks_at - now))
            for pull, error in over:
                try:
                    self._over(pull, error)
                except Exception:
                    logger.exception("kvlink: request %s: unexpected error at its pull's end", pull.read.request_id)

    def _take_over(self) -> list[tuple[Pull, PullError]]:
        now = time.monotonic()
        over = []
        for pull, entry in list(self._entries.values()):
            if pull.cancelled or self._closed:
                error = PullError("cancelled", "the request was aborted")
            elif entry.until <= now:
                error = PullError(entry.phase, entry.reason)
            else:
                continue
            del self._entries[id(pull)]
            over.append((pull, error))
        return over
