"""Three processes, one device each, that all connect to each other at the same moment over a collective provider."""

from __future__ import annotations

import itertools
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from .ends import End, end
from .simulated import Cell, on_host

LIMIT = 30.0
"""Seconds in which all six connects have to stand."""


def connect_all(ends: list[End], addresses: list[str]) -> float:
    """Starts all six directed connects at once; returns the seconds until the last stood."""
    start = time.monotonic()
    pending = [
        (one, ends[one].start("connect", address=addresses[two], timeout=LIMIT))
        for one, two in itertools.permutations(range(len(ends)), 2)
    ]
    for _, future in pending:
        future.result(LIMIT + 5.0)
    return time.monotonic() - start


@pytest.mark.parametrize("runs", [5, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("provider", ["hcomm_onesided"])
def test_six_connects_at_once(tmp_path: Path, provider: str, runs: int) -> None:
    cell = Cell(provider, "9.0")
    with on_host(cell, tmp_path), ExitStack() as stack:
        ends = [stack.enter_context(end(cell, name, f"npu:{index}")) for index, name in enumerate("abc")]
        for run in range(runs):
            addresses = [one.open() for one in ends]
            for index, one in enumerate(ends):
                one.memory(f"r{index}", 1 << 16, index, kind="device")
            took = connect_all(ends, addresses)
            assert took < LIMIT, f"run {run}: {took:.1f} s"
            for index, one in enumerate(ends):
                for peer in one.wait_peers(2):
                    regions = one.call("regions", peer=peer)
                    assert len(regions) == 1 and regions != [f"r{index}"]
                    one.transfer("get", peer, f"r{index}", regions[0], [(0, 0, 4096)])
            for one in ends:
                assert one.close() < 5.0
