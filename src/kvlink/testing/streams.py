"""A stream of transfers: several at once, again and again, until told to stop or until one fails."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from ..errors import KvlinkError
from .suite import ConformanceFailure

if TYPE_CHECKING:
    from ..peer import Peer
    from ..transfer import Transfer


class Stream:
    """Runs in a thread of its own. Ends at the first error, after every transfer it submitted has ended."""

    def __init__(self, peer: Peer, operation: str, ranges: Any, depth: int) -> None:
        self._peer = peer
        self._operation = operation
        self._ranges = ranges
        self._depth = depth
        self._stop = threading.Event()
        self._condition = threading.Condition()
        self._good = 0
        self._errors: list[KvlinkError] = []
        self._error_at: float | None = None
        self._crash: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="kvlink-test-stream", daemon=True)
        self._thread.start()

    def _submit(self) -> Transfer:
        call = self._peer.put if self._operation == "put" else self._peer.get
        return call(self._ranges)

    def _run(self) -> None:
        pending: deque[Transfer] = deque()
        try:
            while not self._stop.is_set() and not self._errors:
                try:
                    while len(pending) < self._depth:
                        pending.append(self._submit())
                except KvlinkError as error:
                    self._note(error)
                if pending:
                    self._finish(pending.popleft())
            while pending:
                self._finish(pending.popleft())
        except BaseException as error:
            self._crash = error
        finally:
            with self._condition:
                self._condition.notify_all()

    def _note(self, error: KvlinkError) -> None:
        self._errors.append(error)
        if self._error_at is None:
            self._error_at = time.monotonic()

    def _finish(self, transfer: Transfer) -> None:
        try:
            transfer.wait()
        except KvlinkError as error:
            self._note(error)
            return
        with self._condition:
            self._good += 1
            self._condition.notify_all()

    def stop(self, timeout: float) -> None:
        """Stops submitting and waits for what is under way."""
        self._stop.set()
        self._thread.join(timeout)

    def wait_count(self, at_least: int, timeout: float) -> int:
        """Waits until so many transfers ended well.

        Raises:
            ConformanceFailure: Not in time, or the stream ended before.
        """
        with self._condition:
            self._condition.wait_for(lambda: self._good >= at_least or not self._thread.is_alive(), timeout)
            if self._good < at_least:
                why = f"; it ended: {self._errors[0]}" if self._errors else ""
                raise ConformanceFailure(f"{self._good} of {at_least} transfers ended well in {timeout:g} s{why}")
            return self._good

    def end(self, timeout: float, stop: bool) -> dict[str, Any]:
        """Waits for the end.

        Returns:
            ``good`` transfers, ``errors`` (type, operation, text, site and code of each), and ``at``: the monotonic
            time, in seconds, of the first error, which all processes of a host share.

        Raises:
            ConformanceFailure: It did not end in time: a transfer hangs.
        """
        if stop:
            self._stop.set()
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise ConformanceFailure(f"a transfer was still unfinished after {timeout:g} s")
        if self._crash is not None:
            raise self._crash
        return {
            "good": self._good,
            "at": self._error_at,
            "errors": [
                {
                    "type": type(error).__name__,
                    "operation": error.operation,
                    "text": str(error),
                    "site": error.site,
                    "vendor_code": error.vendor_code,
                }
                for error in self._errors
            ],
        }
