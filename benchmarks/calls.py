"""What single calls cost: submitting many ranges, and registering memory over and over."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

import kvlink
from benchmarks.checks import Check
from kvlink.bench import Plan
from kvlink.bench._session import Session

RANGES = 8192
SUBMIT_US = 200.0
CYCLES = 10_000
WINDOW = 1_000
SPEED_RATIO = 1.1
RSS_MIB = 1.0
_REGISTERED_BYTES = 1 << 20


def submit_latency(repeats: int) -> Iterator[Check]:
    """Compare how soon ``put()`` of one range and of 8,192 scattered ranges returns.

    Args:
        repeats: Rounds of ten calls each.

    Yields:
        One figure a path.
    """
    for path in ("shm", "cma", "tcp"):
        with ExitStack() as stack:
            plan = Plan(path, "put", 4096, RANGES)
            session = Session(plan, stack)
            blocks = plan.block_list(0)
            arrays = {"one": session.ranges(blocks[:1]), "many": session.ranges(blocks)}
            times: dict[str, list[float]] = {name: [] for name in arrays}
            for turn in range(10 * repeats + 1):
                for name, ranges in arrays.items():
                    begun = time.perf_counter()
                    transfer = session.peer.put(ranges)
                    elapsed = time.perf_counter() - begun
                    transfer.wait(60)
                    transfer.result()
                    if turn:
                        times[name].append(elapsed * 1e6)
            one, many = statistics.median(times["one"]), statistics.median(times["many"])
            note = f"{many:.0f} us and {one:.0f} us"
            yield Check(
                f"{path} put() of {RANGES:,} ranges returns later than of one by",
                many - one,
                "us",
                SUBMIT_US,
                note=note,
            )


def _rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def register_cycles() -> Iterator[Check]:
    """Register and close the same memory 10,000 times, alone and with a peer that sees every change.

    Yields:
        Speed, memory and descriptors at the end against the beginning.
    """
    for connected in (False, True):
        with ExitStack() as stack:
            if connected:
                channel = Session(Plan("tcp", "put", 4096, 1), stack).channel
            else:
                channel = stack.enter_context(kvlink.open("host"))
            yield from _cycle(channel, "with a peer" if connected else "alone")


def _cycle(channel: kvlink.Channel, kind: str) -> Iterator[Check]:
    memory = np.zeros(_REGISTERED_BYTES, dtype=np.uint8)

    def cycle() -> float:
        begun = time.perf_counter()
        channel.register(memory, name="cycled").close()
        return time.perf_counter() - begun

    for _ in range(WINDOW // 10):
        cycle()
    seconds = np.zeros(CYCLES)  # touched before the memory is measured
    seconds[:] = 1
    rss, descriptors = _rss_bytes(), _descriptors()
    for number in range(CYCLES):
        seconds[number] = cycle()
    grown, opened = _rss_bytes() - rss, _descriptors() - descriptors
    first, last = float(seconds[:WINDOW].sum()), float(seconds[-WINDOW:].sum())
    name = f"register/close {CYCLES:,} times {kind}"
    note = f"{first / WINDOW * 1e6:.0f} us and {last / WINDOW * 1e6:.0f} us each"
    yield Check(f"{name}: last {WINDOW:,} over first {WINDOW:,}", last / first, at_most=SPEED_RATIO, note=note)
    yield Check(f"{name}: memory grown by", grown / (1 << 20), "MiB", at_most=RSS_MIB)
    yield Check(f"{name}: descriptors more", float(opened), "", at_most=0.0)
