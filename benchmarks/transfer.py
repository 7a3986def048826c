"""Transfers between two processes against the machine's own limits; ``kvlink bench`` once for every row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.checks import Check
from kvlink.bench import Plan, Result, run

KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Case:
    """A row.

    Attributes:
        path: "shm", "cma" or "tcp".
        block_size: Bytes.
        blocks: Their number.
        ratio: Least share of the machine's limit.
        contiguous: Blocks follow one another; for information.
    """

    path: str
    block_size: int
    blocks: int
    ratio: float | None
    contiguous: bool = False


CASES = (
    Case("shm", 4 * KIB, 8192, 0.7),
    Case("shm", 64 * KIB, 1024, 0.9),
    Case("shm", MIB, 128, 0.9),
    Case("shm", 64 * KIB, 1024, None, contiguous=True),
    Case("cma", 4 * KIB, 8192, 0.95),
    Case("cma", 64 * KIB, 1024, 0.95),
    Case("cma", MIB, 128, 0.95),
    Case("cma", 64 * KIB, 1024, None, contiguous=True),
    Case("tcp", 4 * KIB, 8192, None),
    Case("tcp", 64 * KIB, 1024, 0.9),
    Case("tcp", MIB, 128, 0.9),
    Case("tcp", 64 * KIB, 1024, None, contiguous=True),
)
SHM_P50_US = 15.0
TCP_P50_RATIO = 1.5


def _size(nbytes: int) -> str:
    return f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes // KIB} KiB"


def _checks(case: Case, result: Result) -> Iterator[Check]:
    kind = "contiguous" if case.contiguous else "scattered"
    name = f"{case.path} {result.op}, {case.blocks:,} x {_size(case.block_size)} {kind}"
    spread = f"{min(result.repeats_gb_per_s):.2f}-{max(result.repeats_gb_per_s):.2f}"
    yield Check(
        f"{name}: share of the limit",
        result.ratio_to_limit,
        at_least=case.ratio,
        note=f"{result.gb_per_s:.2f} GB/s ({spread}) of {result.limit_gb_per_s:.2f}: {result.limit_name}",
    )
    if case.block_size != 4 * KIB:
        return
    note = f"p99 {result.p99_us:.1f} us"
    name = f"{case.path} {result.op}, one block of 4 KiB"
    yield Check(f"{name}: p50", result.p50_us, "us", at_most=SHM_P50_US if case.path == "shm" else None, note=note)
    if result.limit_p50_us is not None:
        yield Check(
            f"{name}: p50 over a blocking exchange",
            result.p50_us / result.limit_p50_us,
            at_most=TCP_P50_RATIO,
            note=f"plain socket: {result.limit_p50_us:.1f} us",
        )


def measure(repeats: int) -> Iterator[tuple[Check, Result]]:
    """Run every case in both directions.

    Args:
        repeats: Of each case.

    Yields:
        Each figure with the result it stands in.
    """
    for case in CASES:
        for op in ("put", "get"):
            plan = Plan(case.path, op, case.block_size, case.blocks, contiguous=case.contiguous, repeats=repeats)
            result = run(plan)
            for check in _checks(case, result):
                yield check, result
