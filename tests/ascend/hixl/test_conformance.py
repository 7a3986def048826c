"""HIXL under the conformance kit, one class a cell of the table flavour x SoC x link x memory pair.

By default a subset runs that covers every value of every column; the rest is marked slow. Cells in which no bytes can
move show their refusal in test_refusals.py.
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

from .simulated import DEVICES, Cell, cells, on_host, works

PROFILE = os.environ.get("KVLINK_TEST_PROFILE", "quick")

SKIPS = (
    r"^the provider does not claim (LATE_MEMORY|LINK_CHECK|BUSY_POLL)",
    r"^\d+ cases of this profile did not run",
)
HCCS_SKIPS = (
    r"^the provider serves no plain memory",
    r"^(the provider serves only|only) memory that (it|the provider)",
)

# The vendor knows one registration for every byte, so a part of a region under another name is refused, with its owner.
OVERLAP = {"memory.one piece of memory under two names": r"bytes at 0x\w+ overlap \d+ bytes .* that hixl channel"}
HCCS = dict.fromkeys(
    (
        "data.* of plain memory",
        "data.* of allocated memory",
        "data.between kinds of memory",
        "memory.every kind registers, moves and closes",
    ),
    r"cannot be reached over HCCS|moves device memory only",
)

# What runs by default, and which groups of it. "faults" and "honesty" are left to the slow runs because one case
# of each does not pass every time: a vendor call that was given up keeps a descriptor until it returns ("a stopped peer
# does not hold up a close"), and keeps engine_close longer than the kit's second ("INTERRUPT ends a connect").
QUICK: dict[Cell, tuple[str, ...]] = {
    Cell("hixl", "8.5.0", "A2", "roce", ("allocated", "device")): tuple(
        group for group in GROUPS if group not in ("faults", "honesty")
    ),
    Cell("hixl", "9.1", "A3", "hccs", ("device", "device")): ("memory", "data", "closing"),
    Cell("hixl", "9.0", "A3", "roce", ("device", "allocated")): ("data",),
    Cell("hixl", "9.1", "A2", "roce", ("allocated", "allocated")): ("handshake",),
}


class CellSuite(ProviderSuite):
    cell: ClassVar[Cell]
    stream = "tests.ascend.hccl.acl_stream:make"
    devices = tuple(f"npu:{index}" for index in range(DEVICES))
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
    members = {"cell": cell, "provider": "hixl", "pair": cell.pair, "refusals": OVERLAP, "__module__": __name__}
    if cell.link == "hccs":
        members |= {"refusals": {**OVERLAP, **HCCS}, "skips": (*SKIPS, *HCCS_SKIPS)}
    if PROFILE == "quick":
        members["groups"] = QUICK.get(cell)
    suite = type(name, (CellSuite,), members)
    return suite if cell in QUICK else pytest.mark.slow(suite)


def _rest(cell: Cell, groups: tuple[str, ...]) -> type[CellSuite]:
    """The groups of a default cell that do not run by default."""
    rest = pytest.mark.slow(type("TestRest", (_suite(cell),), {"groups": tuple(set(GROUPS) - set(groups))}))
    rest.__name__ = "TestRest_" + cell.id.replace("-", "_").replace(".", "")
    return rest


for _cell in cells():
    if works(_cell):
        _made = _suite(_cell)
        globals()[_made.__name__] = _made
        if _groups := QUICK.get(_cell):
            _made = _rest(_cell, _groups)
            globals()[_made.__name__] = _made
