"""Ends of transfers that somebody wants to hear of, in order with what users post meanwhile."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvlink.control.threads import ControlLoop
from kvlink.errors import ClosedError

if TYPE_CHECKING:
    from kvlink._engine import EngineChannel
    from kvlink.transfer import Transfer

Hook = Callable[[], object]
_log = logging.getLogger("kvlink")


class Reports:
    """Takes finished transfers from the engine and runs their hooks on the control loop. Thread-safe.

    Args:
        engine: The open engine; its event descriptor is readable while it has something to report.
        loop: Where hooks run.
    """

    def __init__(self, engine: EngineChannel, loop: ControlLoop) -> None:
        self._engine = engine
        self._loop = loop
        self._watch_lock = threading.Lock()
        self._order_lock = threading.Lock()
        self._watched: dict[int, tuple[Transfer, list[Hook]]] = {}
        self._ended = False

    def start(self) -> None:
        """Listen to the engine; on the loop's thread."""
        self._loop.loop.add_reader(self._engine.event_fd, self.drain)

    def stop(self) -> None:
        """Stop listening; on the loop's thread."""
        self._loop.loop.remove_reader(self._engine.event_fd)

    def watch(self, transfer: Transfer, hook: Hook) -> None:
        """Run ``hook`` on the loop once the transfer has ended; here and now when the channel has ended."""
        with self._watch_lock:
            late = transfer.reported or self._ended
            if not late:
                number = transfer.id
                entry = self._watched.get(number)
                if entry is not None:
                    entry[1].append(hook)
                    return
                self._watched[number] = (transfer, [hook])
        if not late:
            transfer.request_report()
            return
        try:
            self._loop.call(hook)
        except ClosedError:
            _run(hook)

    def drain(self) -> None:
        """Take up the transfers that have ended.

        Taking and posting are one step under a lock that nothing waits under, so that what is posted to the loop keeps
        the order in which transfers ended and users called.
        """
        with self._order_lock:
            self._take()

    def post(self, function: Callable[..., object], *args: object) -> None:
        """Run a function on the loop, behind the hooks of all transfers that have ended by now.

        Raises:
            ClosedError: The channel has ended.
        """
        with self._order_lock:
            self._take()
            self._loop.call(function, *args)

    def end(self) -> None:
        """The engine is closed and every transfer has ended: report the rest; on the loop's thread."""
        with self._watch_lock:
            self._ended = True
            rest = list(self._watched)
        for number in rest:
            self._report(number)

    def _take(self) -> None:
        finished = self._engine.drain()
        if finished:
            try:
                self._loop.call(self._report_all, finished)
            except ClosedError:
                pass  # ``end`` has reported them

    def _report_all(self, numbers: list[int]) -> None:
        for number in numbers:
            self._report(number)

    def _report(self, number: int) -> None:
        with self._watch_lock:
            entry = self._watched.pop(number, None)
            if entry is None:
                return
            transfer, hooks = entry
            transfer.reported = True
        for hook in hooks:
            _run(hook)


def _run(hook: Hook) -> None:
    try:
        hook()
    except Exception:
        _log.exception("a completion hook raised")
