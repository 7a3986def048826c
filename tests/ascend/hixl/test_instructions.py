"""What a descriptor costs, in instructions; counted as for the HCCL providers (one program serves every provider)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.ascend.hccl.test_instructions import COUNTS, SLOPE, count

from .simulated import Cell, host_environment

BUDGET = 150
"""Instructions per descriptor in submit."""


@pytest.mark.parametrize("flavour", ["9.1", pytest.param("9.0", marks=pytest.mark.slow)])
def test_instructions_per_descriptor(flavour: str, tmp_path: Path) -> None:
    """At most 150 a descriptor, as many for the last as for the first, and no allocation for one."""
    assert shutil.which("valgrind"), "valgrind is missing: apt-get install valgrind"
    environment = host_environment(Cell("hixl", flavour), tmp_path, CANN_SIM_COPY="off", CANN_SIM_DELAY_US="1:2")
    counted = {ranges: count("hixl", ranges, environment, tmp_path) for ranges in COUNTS}
    for ranges, (instructions, in_submit, in_all) in counted.items():
        each = instructions / ranges
        print(f"hixl: {each:.1f} instructions a descriptor in submit of {ranges}; {in_submit}, {in_all} allocations")
        assert each <= BUDGET, f"{each:.1f} instructions a descriptor with {ranges}"
        assert in_submit <= 8, f"{in_submit} allocations in a submit of {ranges}"
        assert in_all < 64, f"{in_all} allocations for {ranges} descriptors until their completion"
    low, middle, high = (counted[ranges][0] for ranges in COUNTS)
    first, second = (middle - low) / (COUNTS[1] - COUNTS[0]), (high - middle) / (COUNTS[2] - COUNTS[1])
    assert abs(second / first - 1) < SLOPE, (
        f"{first:.2f} instructions a descriptor below {COUNTS[1]}, {second:.2f} above"
    )
