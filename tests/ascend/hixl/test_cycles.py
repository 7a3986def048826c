"""After 200 times connect, transfer and disconnect nothing is left: not here, not at the peer, not in the simulator."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from kvlink.testing import resources

from .simulated import Cell, two_processes

ROUNDS = 200


@pytest.mark.parametrize("flavour", ["8.5.0", pytest.param("9.1", marks=pytest.mark.slow)])
def test_two_hundred_cycles(flavour: str, tmp_path: Path) -> None:
    with two_processes(Cell("hixl", flavour), tmp_path, CANN_SIM_DELAY_US="1:5") as ends:
        ends.open()
        ends.memory()
        # The first rounds make what is made once: pools, thread arenas, the vendor's own caches.
        ends.a.call("cycle", address=ends.address, count=ROUNDS, deadline=300.0)
        ends.b.wait_peers(0)
        both = (ends.a, ends.b)
        before = {end.name: (end.call("resources"), end.call("live")) for end in both}
        resident = [[end.call("resources")["resident_kib"] for end in both]]
        for _ in range(3):
            ends.a.call("cycle", address=ends.address, count=ROUNDS, deadline=300.0)
            ends.b.wait_peers(0)
            resident.append([end.call("resources")["resident_kib"] for end in both])
        for end in both:
            was, live = before[end.name]
            resources.until(
                lambda end=end: end.call("live"),  # type: ignore[misc]
                lambda now, live=live: now == live,  # type: ignore[misc]
                10.0,
                lambda now, live=live: f"the simulator holds {now} instead of {live}",  # type: ignore[misc]
            )
            for what in ("descriptors", "threads"):
                resources.until(
                    lambda end=end, what=what: int(end.call("resources")[what]),  # type: ignore[misc]
                    lambda now, limit=was[what]: now <= limit,  # type: ignore[misc]
                    10.0,
                    lambda now, what=what, limit=was[what]: f"{now} {what} instead of {limit}",  # type: ignore[misc]
                )
        # What leaks, leaks every time; an allocator's arenas grow once in a while.
        for index, end in enumerate(both):
            grown = min(after[index] - earlier[index] for earlier, after in itertools.pairwise(resident))
            assert grown < ROUNDS or resources.sanitized(), f"{end.name} grew by {grown} KiB in {ROUNDS} rounds"
