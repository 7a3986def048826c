"""What a descriptor costs, in instructions: counted by callgrind on the simulator with its data copies stubbed out."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from .simulated import Cell, host_environment, native

BUDGET = 100
"""Instructions per descriptor in submit."""
SLOPE = 0.05
COUNTS = (1024, 4096, 8192)


def run(command: list[str], environment: dict[str, str]) -> str:
    """Runs the counting program; returns what it printed on both streams."""
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def count(provider: str, ranges: int, environment: dict[str, str], folder: Path) -> tuple[int, int, int]:
    """Returns the instructions of one submit, and the provider's allocations in it and until the completion."""
    program = [str(native().parent / "bin" / "hccl_count"), str(native() / f"libkvlink_{provider}.so"), str(ranges)]
    out = folder / f"callgrind.{ranges}"
    valgrind = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", "--toggle-collect=measured_submit"]
    printed = run([*valgrind, *program], environment)
    found = re.search(r"Collected : (\d+)", printed)
    assert found is not None, printed
    in_submit, in_all = map(int, run(program, environment).split())
    return int(found[1]), in_submit, in_all


@pytest.mark.parametrize("provider", ["hcomm_onesided", pytest.param("hccl", marks=pytest.mark.slow)])
def test_instructions_per_descriptor(tmp_path: Path, provider: str) -> None:
    assert shutil.which("valgrind"), "valgrind is missing: apt-get install valgrind"
    cell = Cell(provider, "9.1")
    environment = host_environment(cell, tmp_path, CANN_SIM_COPY="off", CANN_SIM_DELAY_US="1:2")
    counted = {ranges: count(provider, ranges, environment, tmp_path) for ranges in COUNTS}
    for ranges, (instructions, in_submit, in_all) in counted.items():
        each = instructions / ranges
        print(
            f"{provider}: {each:.1f} instructions a descriptor in submit of {ranges}; {in_submit}, {in_all} allocations"
        )
        assert each <= BUDGET, f"{each:.1f} instructions a descriptor with {ranges}"
        assert in_submit <= 8, f"{in_submit} allocations in a submit of {ranges}"
        assert in_all < 64, f"{in_all} allocations for {ranges} descriptors until their completion"
    low, middle, high = (counted[ranges][0] for ranges in COUNTS)
    first, second = (middle - low) / (COUNTS[1] - COUNTS[0]), (high - middle) / (COUNTS[2] - COUNTS[1])
    assert abs(second / first - 1) < SLOPE, (
        f"{first:.2f} instructions a descriptor below {COUNTS[1]}, {second:.2f} above"
    )
