"""An event loop on a thread of its own: a backend's deadlines and transfers, off the engine's step."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from ..log import get_logger

_log = get_logger()
T = TypeVar("T")


class LoopThread:
    """Runs coroutines and callbacks; started by the constructor.

    Attributes:
        loop: The loop.
    """

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._closed = False
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def call(self, function: Callable[..., object], *arguments: Any) -> None:
        """Calls a function on the loop soon; nothing after :meth:`close`."""
        try:
            self.loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            if not self._closed:
                raise

    def start(self, coroutine: Coroutine[Any, Any, object]) -> None:
        """Starts a coroutine from any thread; what it raises is logged."""

        def begin() -> None:
            task = self.loop.create_task(coroutine)
            self._tasks.add(task)
            task.add_done_callback(self._ended)

        if self._closed:
            coroutine.close()
            return
        self.call(begin)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error("a PD task failed", exc_info=task.exception())

    def close(self, timeout: float) -> None:
        """Cancels what runs, waits for its end and stops the thread. Idempotent.

        Args:
            timeout: Seconds for both.
        """
        if self._closed:
            return
        self._closed = True

        async def stop() -> None:
            for task in list(self._tasks):
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=timeout)
            self.loop.stop()

        self.loop.call_soon_threadsafe(lambda: self.loop.create_task(stop()))
        self._thread.join(timeout + 1.0)
        if self._thread.is_alive():
            _log.warning("the PD thread did not end within %g s", timeout)
            return
        self.loop.close()
