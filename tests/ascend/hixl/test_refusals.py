"""What HIXL cannot do in a cell of the table: refused by kvlink, with a reason, before a vendor call fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvlink import errors

from .simulated import MIB, Cell, cells, two_processes, works

QUICK = {("8.5.0", "A2", ("device", "allocated")), ("9.1", "A3", ("allocated", "device"))}


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, id=cell.id, marks=() if (cell.flavour, cell.soc, cell.pair) in QUICK else pytest.mark.slow)
        for cell in cells()
        if not works(cell)
    ],
)
def test_host_memory_over_hccs(cell: Cell, tmp_path: Path) -> None:
    """A peer's host memory is out of reach over HCCS; on A2 this side's is too. Device memory beside it works."""
    with two_processes(cell, tmp_path) as ends:
        ends.open()
        for end, name, kind, seed in ((ends.a, "a", cell.pair[0], 1), (ends.b, "b", cell.pair[1], 2)):
            end.memory(name, MIB, seed, kind=kind)
            end.memory(f"{name} too", MIB, seed, kind="device")
        ends.connect()
        blocks = [(0, 0, 4096)]
        sides = ((ends.a, "a", cell.pair[0], "b", cell.pair[1]), (ends.b, "b", cell.pair[1], "a", cell.pair[0]))
        for end, own, own_kind, theirs, their_kind in sides:
            peer = ends.peers[own]
            if their_kind == "allocated":
                with pytest.raises(
                    errors.UnsupportedError, match=r"cannot be reached over HCCS.*HCCL_INTRA_ROCE_ENABLE"
                ):
                    end.wait_region(peer, theirs, timeout=2.0)
            elif own_kind == "allocated":
                if cell.soc == "A2":
                    with pytest.raises(errors.KvlinkError, match=r"moves device memory only.*HCCL_INTRA_ROCE_ENABLE"):
                        end.transfer("put", peer, own, f"{theirs} too", blocks)
                else:
                    end.transfer("put", peer, own, f"{theirs} too", blocks)
            end.transfer("put", peer, f"{own} too", f"{theirs} too", blocks)
