"""Every cell of the table flavour x SoC x link x memory pair in which bytes move: they do, both ways, and arrive.

The refusals of the other cells are in test_refusals.py, the whole kit for each cell in test_conformance.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from .ends import two_ends
from .simulated import COMM, PAIRS, Cell, cells

DEFAULT = {
    Cell("hccl", COMM, "A3", "roce", PAIRS[1]),
    Cell("hccl", "8.5.0", "A2", "hccs", PAIRS[0]),
    Cell("hcomm_onesided", "9.0", "A2", "roce", PAIRS[2]),
}


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, id=cell.id, marks=() if cell in DEFAULT else pytest.mark.slow)
        for cell in cells()
        if cell.works
    ],
)
def test_bytes_move(tmp_path: Path, cell: Cell) -> None:
    with two_ends(tmp_path, cell) as ends:
        ends.open()
        ends.connect()
        ends.round_trip()
        path = ends.put()["path"]
        assert path == cell.link
        assert all(one.call("violations") == 0 for one in (ends.a, ends.b))
