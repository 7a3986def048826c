"""Host memory that cannot be registered moves through the staging area, over HIXL as over HCCL."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from kvlink import errors
from kvlink.testing.layouts import contiguous, mixed, scattered

from .simulated import MIB, Cell, Ends, two_processes

STAGING = {"options": {"host_staging": 8 * MIB}}


def _ready(ends: Ends, kinds: tuple[str, str], nbytes: int) -> None:
    ends.open(STAGING, STAGING)
    ends.a.memory("a", nbytes, 1, kind=kinds[0])
    ends.b.memory("b", nbytes, 2, kind=kinds[1])
    ends.connect()


@pytest.mark.parametrize("kinds", list(itertools.product(("plain", "device"), repeat=2))[:3], ids="-".join)
@pytest.mark.parametrize("link", ["roce", "hccs"])
def test_every_byte_arrives(kinds: tuple[str, str], link: str, tmp_path: Path) -> None:
    """Regions larger than the area, at any address, in one piece and in many; more batches than requests go at once."""
    with two_processes(Cell("hixl", "9.1", link=link), tmp_path, CANN_SIM_DELAY_US="5:20") as ends:
        nbytes = 20 * MIB
        _ready(ends, kinds, nbytes)
        for layout in (contiguous(nbytes, 1), scattered(4097, 300, shift=(3, 11)), mixed(60, seed=4)):
            for operation in ("put", "get"):
                ends.a.fill("a", 1)
                ends.b.fill("b", 2)
                ends.a.transfer(operation, ends.peers["a"], "a", "b", layout.blocks)
                end, name, own, other = (ends.b, "b", 2, 1) if operation == "put" else (ends.a, "a", 1, 2)
                end.verify(name, own, layout.patches(operation, other), what=layout.name)
        assert ends.a.call("provider_statistics")["staged_bytes"] > 0


def test_a_failure_ends_staged_transfers(tmp_path: Path) -> None:
    fault = {"CANN_SIM_FAULTS": "Hixl::TransferAsync@2=fail:503900"}
    with two_processes(Cell("hixl", "8.5.0"), tmp_path, a=fault) as ends:
        _ready(ends, ("plain", "plain"), 8 * MIB)
        with pytest.raises(errors.KvlinkError, match="503900"):
            ends.a.transfer("put", ends.peers["a"], "a", "b", [(0, 0, 8 * MIB)])
        ends.a.wait_peers(0)
        ends.b.wait_peers(0)
        ends.connect()
        ends.check_put()
