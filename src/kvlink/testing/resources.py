"""What a process holds: descriptors, threads, mappings, memory; and waiting for a condition."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from .suite import ConformanceFailure

T = TypeVar("T")

_POLL = 0.005


def until(read: Callable[[], T], good: Callable[[T], bool], timeout: float, describe: Callable[[T], str]) -> T:
    """Waits until what ``read`` returns is good.

    Args:
        read: Looks at the state.
        good: Whether that is what is waited for.
        timeout: Seconds.
        describe: Says what is wrong with it.

    Returns:
        The good state.

    Raises:
        ConformanceFailure: It was not good in time.
    """
    deadline = time.monotonic() + timeout
    while True:
        state = read()
        if good(state):
            return state
        if time.monotonic() > deadline:
            raise ConformanceFailure(f"{describe(state)} after {timeout:g} s")
        time.sleep(_POLL)


def sanitized() -> bool:
    """Whether this process runs under a sanitizer, which keeps freed memory on purpose."""
    return "/libasan.so" in Path("/proc/self/maps").read_text(encoding="utf-8")


def usage() -> dict[str, int]:
    """Returns open descriptors, threads, mappings and resident KiB of this process."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return {
        "descriptors": sum(1 for _ in Path("/proc/self/fd").iterdir()) - 1,
        "threads": int(fields["Threads"]),
        "mappings": Path("/proc/self/maps").read_text(encoding="utf-8").count("\n"),
        "resident_kib": int(fields["VmRSS"].split()[0]),
    }


def descriptor_targets() -> dict[str, str]:
    """Returns what each open descriptor of this process is, by number."""
    targets = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            targets[entry.name] = str(entry.readlink())
        except FileNotFoundError:
            continue
    return targets


class Stalls:
    """Measures how late a sleeping thread of this process is woken: on a crowded machine nobody can be in time.

    Attributes:
        seconds: Sum of the delays so far.
    """

    _STEP = 0.01

    def __init__(self) -> None:
        self.seconds = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvlink-test-stalls", daemon=True)

    def _run(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(self._STEP):
            now = time.monotonic()
            self.seconds += max(0.0, now - last - 2 * self._STEP)
            last = now

    def __enter__(self) -> Stalls:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def thread_states(pid: int) -> set[str]:
    """Returns the states of a process's threads, as in /proc: {"T"} when it is stopped."""
    states = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            # The name in brackets may hold anything; the state is the first word behind it.
            states.add((task / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0])
        except FileNotFoundError:
            continue
    return states


def hold_gil(seconds: float) -> None:
    """Sleeps while holding the interpreter lock: a foreign call that does not release it."""
    library = ctypes.PyDLL(None)
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        library.usleep(ctypes.c_uint(min(int(left * 1e6) + 1, 900_000)))


def in_fork(function: Callable[[], dict[str, str]], timeout: float = 20.0) -> dict[str, str]:
    """Runs a function in a forked child and returns its answer.

    Raises:
        ConformanceFailure: The child crashed or hung.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        # Only this thread exists here, and nothing of the parent's may run: no clean-up, no handlers.
        signal.alarm(int(timeout))
        try:
            os.write(write, json.dumps(function()).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        answer = stream.read()
    _, status = os.waitpid(child, 0)
    if status or not answer:
        raise ConformanceFailure(f"the forked child ended with wait status {status}")
    found: dict[str, str] = json.loads(answer)
    return found


def call_named(name: str) -> int:
    """Calls "module:function" and returns its number."""
    module, _, function = name.partition(":")
    return int(getattr(importlib.import_module(module), function)())
