"""Host memory that cannot be registered moves through the staging area, and device memory beside it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from kvlink import errors
from kvlink.testing.layouts import contiguous, mixed, scattered

from .ends import Ends, two_ends
from .simulated import Cell

MIB = 1 << 20
STAGING = {"host_staging": 8 * MIB}


def make(ends: Ends, kinds: tuple[str, str], nbytes: int) -> None:
    """Opens both channels, makes regions "a" and "b" of these kinds, plain memory at odd addresses, and connects."""
    ends.a.open(options=ends.options)
    ends.address = ends.b.open(options=ends.options)
    ends.a.memory("a", nbytes, 1, kind=kinds[0])
    ends.b.memory("b", nbytes, 2, kind=kinds[1])
    ends.connect()


@pytest.mark.parametrize("link", ["roce", "hccs"])
@pytest.mark.parametrize("kinds", list(itertools.product(("plain", "device"), repeat=2))[:3], ids="-".join)
def test_every_byte_arrives(tmp_path: Path, link: str, kinds: tuple[str, str]) -> None:
    """Regions larger than the area, in one piece and in many. Where a link may be HCCS the area is device memory."""
    cell = Cell("hcomm_onesided", "9.1", link=link)
    with two_ends(tmp_path, cell, options=STAGING, CANN_SIM_DELAY_US="5:20") as ends:
        nbytes = 20 * MIB
        make(ends, kinds, nbytes)
        for layout in (contiguous(nbytes, 1), scattered(4097, 300, shift=(3, 11)), mixed(60, seed=4)):
            for operation in ("put", "get"):
                ends.a.fill("a", 1)
                ends.b.fill("b", 2)
                ends.a.transfer(operation, ends.peer, "a", "b", layout.blocks)
                if operation == "put":
                    ends.b.verify("b", 2, layout.patches("put", 1), what=layout.name)
                else:
                    ends.a.verify("a", 1, layout.patches("get", 2), what=layout.name)
        assert ends.a.counter("staged_bytes") > 0


def test_both_sides_at_once(tmp_path: Path) -> None:
    with two_ends(tmp_path, options=STAGING, CANN_SIM_DELAY_US="5:20") as ends:
        make(ends, ("plain", "plain"), 8 * MIB)
        (back,) = ends.b.wait_peers(1)
        ends.b.wait_region(back, "a")
        blocks = scattered(64 * 1024, 50).blocks
        pending = [(ends.a, ends.a.submit("put", ends.peer, "a", "b", blocks)) for _ in range(6)]
        pending += [(ends.b, ends.b.submit("get", back, "b", "a", blocks)) for _ in range(6)]
        for one, number in pending:
            one.wait(number)


def test_late_staged_memory_needs_no_new_link(tmp_path: Path) -> None:
    """The vendor knows the area only, and has known it from the start."""
    with two_ends(tmp_path, options=STAGING) as ends:
        make(ends, ("plain", "device"), MIB)
        ends.a.memory("late", MIB, 7, kind="plain")
        ends.a.transfer("put", ends.peer, "late", "b", [(0, 0, 4096)])
        ends.b.verify("b", 2, [(0, 7, 0, 4096)])


def test_closing_with_staged_work(tmp_path: Path) -> None:
    with two_ends(tmp_path, options=STAGING, CANN_SIM_DELAY_US="3000:5000") as ends:
        make(ends, ("plain", "plain"), 16 * MIB)
        numbers = [ends.a.submit("put", ends.peer, "a", "b", [(0, 0, 16 * MIB)]) for _ in range(4)]
        assert ends.a.close(grace=1.0) < 5.0
        for number in numbers:
            with pytest.raises((errors.ClosedError, errors.PeerLost, errors.TransferError)):
                ends.a.wait(number)
        assert ends.b.close(grace=1.0) < 5.0


def test_the_peer_dies_with_staged_work(tmp_path: Path) -> None:
    with two_ends(tmp_path, options=STAGING, CANN_SIM_DELAY_US="1000:3000") as ends:
        make(ends, ("plain", "plain"), 16 * MIB)
        number = ends.a.submit("put", ends.peer, "a", "b", [(0, 0, 16 * MIB)])
        ends.b.child.kill()
        with pytest.raises((errors.PeerLost, errors.TransferError)):
            ends.a.wait(number, timeout=10.0)
        assert ends.a.close(grace=1.0) < 5.0
