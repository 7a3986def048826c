"""Measures kvlink between two processes, next to what the machine can do at best over the same bytes.

``kvlink bench --path shm --op put --block-size 65536 --blocks 1024``; from Python::

    from kvlink.bench import Plan, run
    print(run(Plan(path="shm", op="put", block_size=65536, blocks=1024)).gb_per_s)
"""

from __future__ import annotations

from ._plan import Plan
from ._runner import Result, run
from ._yardsticks import BenchError

__all__ = ["BenchError", "Plan", "Result", "run"]
