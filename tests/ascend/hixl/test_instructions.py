"""What a descriptor costs inside submit, in instructions: a machine without an NPU can count, not time."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvlink.testing import resources

from .simulated import Cell, two_processes

BUDGET = 150
SIZES = (1024, 1024, 2048, 4096, 8192)  # the first one makes what is made once


def _count(path: Path) -> tuple[int, int]:
    """Returns instructions and calls of an allocator in a dump of one call of kve_submit."""
    text = path.read_text()
    total = re.search(r"^(?:totals|summary): (\d+)", text, re.M)
    assert total is not None, f"{path} has no total"
    names = dict(re.findall(r"^c?fn=\((\d+)\) (\S+)", text, re.M))
    allocators = {number for number, name in names.items() if re.fullmatch(r"(malloc|calloc|realloc|_Znwm)('2)?", name)}
    calls = re.findall(r"^cfn=\((\d+)\).*\ncalls=(\d+)", text, re.M)
    return int(total[1]), sum(int(count) for number, count in calls if number in allocators)


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_submit(tmp_path: Path) -> None:
    """At most 150 instructions a descriptor, the same for few and many, and no allocation for one."""
    if "libasan" in os.environ.get("LD_PRELOAD", "") or resources.sanitized():
        pytest.skip("instructions of a sanitizer say nothing")
    cell = Cell("hixl", "9.1")
    with two_processes(cell, tmp_path, CANN_SIM_COPY="off", CANN_SIM_DELAY_US="1:1") as ends:
        address = ends.b.open()
        ends.b.memory("b", 128 * max(SIZES), 2, kind="device")
        command = [
            "valgrind",
            "--tool=callgrind",
            "--collect-atstart=no",
            "--toggle-collect=kve_submit",
            "--dump-after=kve_submit",
            f"--callgrind-out-file={tmp_path}/out",
            sys.executable,
            "-m",
            "tests.ascend.hixl.submitting",
            address,
            *map(str, SIZES),
        ]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    counted = [_count(tmp_path / f"out.{number}") for number in range(1, len(SIZES) + 1)]
    cost = dict(zip(SIZES[1:], counted[1:], strict=True))
    slopes = [(cost[many][0] - cost[few][0]) / (many - few) for few, many in ((1024, 2048), (2048, 4096), (4096, 8192))]
    print(f"instructions: { {size: found[0] for size, found in cost.items()} }, slopes {[round(s, 1) for s in slopes]}")
    assert max(slopes) <= BUDGET
    assert cost[1024][0] / 1024 <= BUDGET
    whole = (cost[8192][0] - cost[1024][0]) / (8192 - 1024)
    assert all(abs(slope - whole) <= 0.05 * whole for slope in slopes)
    assert len({found[1] for found in cost.values()}) == 1, "the number of allocations depends on the descriptors"
