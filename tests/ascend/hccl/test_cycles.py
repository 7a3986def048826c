"""Nothing piles up: objects of the vendor, descriptors, threads and memory are as before after many links."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvlink.testing import resources

from .ends import Ends, two_ends
from .simulated import Cell

CYCLES = 200
LOOSE = 4
"""Threads and descriptors of the agents themselves that come and go; a leak would be one a cycle."""


def live(ends: Ends) -> dict[str, int]:
    """The live vendor objects of both processes."""
    return {f"{end.name}.{name}": count for end in (ends.a, ends.b) for name, count in end.live().items()}


def held(ends: Ends, what: str) -> int:
    """Descriptors, threads or resident KiB of both processes."""
    return sum(end.call("resources")[what] for end in (ends.a, ends.b))


def cycles(ends: Ends, count: int) -> None:
    """Connects, moves bytes both ways, and disconnects, so many times; both sides have settled afterwards."""
    ends.a.call("cycles", address=ends.address, count=count, local="a", remote="b", deadline=120.0)
    ends.a.wait_peers(0)
    ends.b.wait_peers(0)
    comms = ("a.hccl_comm", "b.hccl_comm")
    resources.until(
        lambda: [live(ends)[name] for name in comms],
        lambda now: now == [0, 0],
        10.0,
        lambda now: f"{now} communicators",
    )


CELLS = [Cell("hcomm_onesided", "9.1", "A2", "roce"), Cell("hccl", "8.3", "A2", "hccs")]


@pytest.mark.parametrize("cell", CELLS, ids=[cell.id for cell in CELLS])
def test_two_hundred_links_leave_nothing(tmp_path: Path, cell: Cell) -> None:
    with two_ends(tmp_path, cell, CANN_SIM_DELAY_US="1:5") as ends:
        ends.open()
        cycles(ends, 400)  # pools fill and allocators find their size
        before = live(ends)
        at_first = {what: held(ends, what) for what in ("descriptors", "threads", "resident_kib")}
        cycles(ends, CYCLES)
        resources.until(lambda: live(ends), lambda now: now == before, 10.0, lambda now: f"{now} instead of {before}")
        for what in ("descriptors", "threads"):
            count = at_first[what]
            resources.until(
                lambda what=what: held(ends, what),  # type: ignore[misc]
                lambda now, count=count: now <= count + LOOSE,  # type: ignore[misc]
                10.0,
                lambda now, what=what, count=count: f"{now} {what} instead of {count}",  # type: ignore[misc]
            )
        grown = held(ends, "resident_kib") - at_first["resident_kib"]
        assert grown < 2 * CYCLES or resources.sanitized(), f"the two processes grew by {grown} KiB"
        ends.a.close()
        ends.b.close()
        assert all(end.call("violations") == 0 for end in (ends.a, ends.b))
