"""Both HCCL providers under the conformance kit, one class a cell of the table flavour x SoC x link x memory pair.

By default a subset runs that covers every value of every column, and every pair of provider and flavour; the rest is
marked slow.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from kvlink.testing.pytest_suite import ProviderSuite
from kvlink.testing.runner import Runner
from kvlink.testing.suite import GROUPS

from .simulated import COMM, Cell, cells, on_host

PROFILE = os.environ.get("KVLINK_TEST_PROFILE", "quick")

# What HCCL does not do, and how the refusal is worded.
OVERLAP = {"memory.one piece of memory under two names": "overlap .* registered: register the whole buffer once"}
HCCS = dict.fromkeys(
    (
        "data.* of plain memory",
        "data.* of allocated memory",
        "data.between kinds of memory",
        "memory.every kind registers, moves and closes",
    ),
    "over which HCCL reaches device memory only|moves device memory to device memory",
)

SKIPS = (
    r"^the provider does not claim (LATE_MEMORY|LINK_CHECK|BUSY_POLL)",
    r"^memory registered late works at once",
    r"^\d+ cases of this profile did not run",
    r"^(the provider serves only|only) memory that (it|the provider) allocates",
)

# What runs by default, and which groups of it; None = all.
QUICK: dict[Cell, tuple[str, ...] | None] = {
    Cell("hccl", "8.3", "A2", "roce", ("allocated", "device")): None,
    Cell("hcomm_onesided", "9.1", "A3", "hccs", ("device", "device")): ("memory", "data", "closing"),
    Cell("hcomm_onesided", "8.5.0", "A2", "roce", ("device", "allocated")): ("handshake", "faults"),
    Cell("hccl", "9.0", "A3", "roce", ("allocated", "allocated")): ("data",),
    Cell("hccl", COMM, "A2", "hccs", ("device", "device")): ("data",),
}


class CellSuite(ProviderSuite):
    cell: ClassVar[Cell]
    stream = "tests.ascend.hccl.acl_stream:make"
    devices = ("npu:0", "npu:1", "npu:2", "npu:3", "npu:4", "npu:5")
    plain_alignment = 4096
    profile = PROFILE
    skips = SKIPS

    @pytest.fixture(scope="class")
    def conformance_runner(
        self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[Runner]:
        request.cls._results = []
        folder: Path = tmp_path_factory.mktemp("cell")
        with on_host(self.cell, folder), Runner(request.cls.settings()) as runner:
            yield runner


def _suite(cell: Cell) -> type[CellSuite]:
    name = "Test_" + cell.id.replace("-", "_").replace(".", "")
    members = {"cell": cell, "provider": cell.provider, "pair": cell.pair, "refusals": OVERLAP}
    if cell.link == "hccs":
        members |= {"refusals": {**OVERLAP, **HCCS}, "skips": (*SKIPS, r"^the provider serves no plain memory")}
    members["__module__"] = __name__
    suite = type(name, (CellSuite,), members)
    if cell not in QUICK:
        return pytest.mark.slow(suite)
    suite.groups = QUICK[cell]
    return suite


def _rest(cell: Cell, groups: tuple[str, ...]) -> type[CellSuite]:
    """The groups of a default cell that do not run by default."""
    rest = pytest.mark.slow(type("TestRest", (_suite(cell),), {"groups": tuple(set(GROUPS) - set(groups))}))
    rest.__name__ = "TestRest_" + cell.id.replace("-", "_").replace(".", "")
    return rest


for _cell in cells():
    if _cell.works:
        _made = _suite(_cell)
        globals()[_made.__name__] = _made
        if _groups := QUICK.get(_cell):
            _made = _rest(_cell, _groups)
            globals()[_made.__name__] = _made
