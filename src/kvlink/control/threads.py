"""The channel's few threads: a loop for control I/O, pools for calls that may block, one for callbacks in order.

All are daemon threads that start on first use and sleep without ticking. ``concurrent.futures`` is not used because its
threads keep the interpreter from exiting.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import queue
import socket
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from kvlink.errors import BusyError, ClosedError

logger = logging.getLogger("kvlink")
T = TypeVar("T")
Job = Callable[[], object]
_SETTLE_ROUNDS = 10


class WorkerPool:
    """Runs jobs on at most ``size`` daemon threads, started as they are needed.

    Args:
        name: Prefix of the threads' names.
        size: Most threads. With one, jobs run in the order of their submission.
        backlog: Most jobs that may wait; 0 = any number.
    """

    def __init__(self, name: str, size: int, backlog: int = 0) -> None:
        self._name = name
        self._size = size
        self._jobs: queue.Queue[Job | None] = queue.Queue(backlog)
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._free = 0
        self._closed = False

    def submit(self, job: Job) -> None:
        """Queue a job. Its exceptions are logged.

        Raises:
            BusyError: Too many jobs wait already.
            ClosedError: The pool was closed.
        """
        inline = False
        with self._lock:
            if self._closed:
                raise ClosedError("the channel is closed")
            try:
                self._jobs.put_nowait(job)
            except queue.Full:
                raise BusyError(f"{self._jobs.maxsize} jobs wait already") from None
            if self._free < self._jobs.qsize() and len(self._threads) < self._size:
                number = len(self._threads)
                thread = threading.Thread(target=self._work, name=f"{self._name}-{number}", daemon=True)
                try:
                    thread.start()
                    self._threads.append(thread)
                except RuntimeError:  # the interpreter is shutting down
                    inline = not self._threads
        if inline:
            self._run(self._jobs.get_nowait())

    def close(self) -> None:
        """Let the threads end after the jobs queued so far; does not wait for them."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            threads = list(self._threads)
        for _ in threads:
            try:
                self._jobs.put_nowait(None)
            except queue.Full:
                break

    def join(self, timeout: float) -> bool:
        """Wait until its threads ended, up to ``timeout`` seconds for each; the caller's own thread does not count."""
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout)
        return not any(thread.is_alive() for thread in self._threads if thread is not threading.current_thread())

    def holds_current_thread(self) -> bool:
        """Whether the caller runs on one of these threads."""
        return threading.current_thread() in self._threads

    def _work(self) -> None:
        while True:
            with self._lock:
                self._free += 1
            job = self._jobs.get()
            with self._lock:
                self._free -= 1
            if job is None:
                return
            self._run(job)
            del job

    def _run(self, job: Job | None) -> None:
        try:
            if job is not None:
                job()
        except Exception:
            logger.exception("%s: a callback raised", self._name)


class ControlLoop:
    """A thread with an asyncio loop."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(self._on_error)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._streams: weakref.WeakSet[asyncio.StreamWriter] = weakref.WeakSet()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    @property
    def inside(self) -> bool:
        """Whether the caller is the loop's thread."""
        return threading.current_thread() is self._thread

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Run a function soon on the loop, from any thread.

        Raises:
            ClosedError: The loop has ended.
        """
        try:
            self.loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            raise ClosedError("the channel is closed") from None

    def spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task and keep it referenced; only on the loop's thread."""
        task = self.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def run(self, function: Callable[[], Coroutine[Any, Any, T]], timeout: float | None = None) -> T:
        """Run a coroutine on the loop and wait for it, from any other thread.

        Args:
            function: Makes the coroutine.
            timeout: Seconds to wait; the coroutine is cancelled then.

        Raises:
            ClosedError: The loop has ended.
            TimeoutError: It took longer.
        """
        if self.inside:
            raise RuntimeError("a blocking call on the control loop's own thread")
        future = self.start(function)
        try:
            return future.result(timeout)
        except concurrent.futures.TimeoutError:
            if future.done():
                raise
            future.cancel()
            raise TimeoutError(f"the control loop did not answer within {timeout} s") from None
        except BaseException:
            future.cancel()
            raise

    def start(self, function: Callable[[], Coroutine[Any, Any, T]]) -> concurrent.futures.Future[T]:
        """Start a coroutine on the loop, from any thread.

        Raises:
            ClosedError: The loop has ended.
        """
        coroutine = function()
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        except RuntimeError:
            coroutine.close()
            raise ClosedError("the channel is closed") from None

    async def offload(self, pool: WorkerPool, function: Callable[..., T], *args: Any) -> T:
        """Run a blocking function on a pool and await it; when the await is cancelled, the function goes on."""
        done: asyncio.Future[T] = self.loop.create_future()

        def finish(setter: Callable[[Any], None], value: object) -> None:
            if not done.done():
                setter(value)

        def job() -> None:
            setter: Callable[[Any], None] = done.set_result
            value: object
            try:
                value = function(*args)
            except Exception as error:
                setter, value = done.set_exception, error
            try:
                self.loop.call_soon_threadsafe(finish, setter, value)
            except RuntimeError:
                pass  # the loop ended meanwhile: nobody waits any more

        pool.submit(job)
        return await done

    async def open_stream(self, sock: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Make streams of a connected socket; it is closed at the latest when the loop ends."""
        reader, writer = await asyncio.open_connection(sock=sock)
        self._streams.add(writer)
        return reader, writer

    def stop(self, timeout: float) -> None:
        """Cancel what still runs, end the loop and its thread; idempotent."""
        try:
            self.loop.call_soon_threadsafe(self._halt)
        except RuntimeError:
            return
        if not self.inside:
            self._thread.join(timeout)

    def _halt(self) -> None:
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.loop.call_soon(self._settle, _SETTLE_ROUNDS)

    def _settle(self, rounds: int) -> None:
        """Let the cancelled tasks run their last steps, then drop every socket, then stop."""
        if rounds and asyncio.all_tasks(self.loop):
            self.loop.call_soon(self._settle, rounds - 1)
            return
        for writer in list(self._streams):
            writer.transport.abort()
        self.loop.call_soon(self.loop.call_soon, self.loop.stop)

    def _main(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
        finally:
            self.loop.close()

    def _on_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        logger.error("control plane: %s", context.get("message"), exc_info=error)
