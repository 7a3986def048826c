"""The active process of a measurement."""

from __future__ import annotations

import math
import statistics
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ._plan import Plan
from ._session import KVLINK, Session
from ._yardsticks import Yardstick, yardsticks

# A repeat moves about this much, with another list of blocks for every transfer, but in few transfers.
_REPEAT_BYTES = 64 << 20
_MAX_ROUNDS = 4


@dataclass(frozen=True)
class Result:
    """What was measured.

    Attributes:
        path: The way the bytes took.
        op: "put" or "get".
        block_size: Bytes of one block.
        blocks: Blocks in one transfer.
        contiguous: Whether the blocks followed one another.
        gb_per_s: 10^9 bytes a second, of the median repeat.
        blocks_per_s: Blocks a second, of the median repeat.
        p50_us: Median time of a transfer of one block, from the Python call to its completion, microseconds.
        p99_us: 99th percentile of the same.
        limit_gb_per_s: What the machine can do over the same blocks, median repeat of its best way.
        limit_name: That way.
        ratio_to_limit: gb_per_s / limit_gb_per_s.
        limit_p50_us: tcp only: median of a blocking-socket put and acknowledgement (or get and answer) of one block.
        repeats_gb_per_s: Every repeat, for the spread.
        limit_repeats_gb_per_s: Every repeat of the limit.
        buffer_bytes: Size of the buffer on each side.
        checked_blocks: Blocks whose bytes were compared after a transfer.
    """

    path: str
    op: str
    block_size: int
    blocks: int
    contiguous: bool
    gb_per_s: float
    blocks_per_s: float
    p50_us: float
    p99_us: float
    limit_gb_per_s: float
    limit_name: str
    ratio_to_limit: float
    limit_p50_us: float | None
    repeats_gb_per_s: list[float]
    limit_repeats_gb_per_s: list[float]
    buffer_bytes: int
    checked_blocks: int

    def as_dict(self) -> dict[str, Any]:
        """Returns the result as JSON would hold it, figures rounded to four digits."""

        def short(value: Any) -> Any:
            if isinstance(value, list):
                return [short(item) for item in value]
            return float(f"{value:.4g}") if isinstance(value, float) else value

        return {key: short(value) for key, value in asdict(self).items()}


def _shares(session: Session) -> dict[str, list[float]]:
    """Measures kvlink and every yardstick in turn; returns bytes a second of every repeat by name."""
    plan = session.plan
    ways: dict[str, Yardstick] = {
        KVLINK: lambda blocks: plan.transfer_bytes / session.transfer(session.ranges(blocks)),
        **yardsticks(plan, session.local.memory, session.twin, session.target, session.socket.fileno()),
    }
    rounds = min(_MAX_ROUNDS, math.ceil(_REPEAT_BYTES / plan.transfer_bytes))
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(-1, plan.repeats):  # the first warms up and is dropped
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(rounds if repeat >= 0 else 1):
            number = (repeat + 1) * rounds + turn
            blocks = plan.block_list(number)
            order = list(ways)
            order = order[number % len(order) :] + order[: number % len(order)]
            for name in order:
                session.reset(name)
                if (rate := ways[name](blocks)) is not None:
                    times[name].append(1 / rate)
                if name == KVLINK:
                    session.check(number, blocks)
        if repeat >= 0:
            for name, values in times.items():
                if values:
                    rates[name].append(len(values) / sum(values))
    return rates


def run(plan: Plan) -> Result:
    """Measures.

    Args:
        plan: What to measure.

    Returns:
        The figures.

    Raises:
        BenchError: The other process ended, bytes arrived wrong, or they took another way.
        KvlinkError: This machine lacks the path.
    """
    with ExitStack() as stack:
        session = Session(plan, stack)
        rates = _shares(session)
        ours, plain = session.latency(plan.block_list(0))
        mine = rates.pop(KVLINK)
        limit_name, limit = max(
            ((name, values) for name, values in rates.items() if values), key=lambda item: statistics.median(item[1])
        )
        rate, best = statistics.median(mine), statistics.median(limit)
        return Result(
            path=plan.path,
            op=plan.op,
            block_size=plan.block_size,
            blocks=plan.blocks,
            contiguous=plan.contiguous,
            gb_per_s=rate / 1e9,
            blocks_per_s=rate / plan.block_size,
            p50_us=float(np.percentile(ours, 50)) * 1e6,
            p99_us=float(np.percentile(ours, 99)) * 1e6,
            limit_gb_per_s=best / 1e9,
            limit_name=limit_name,
            ratio_to_limit=rate / best,
            limit_p50_us=float(np.percentile(plain, 50)) * 1e6 if plain else None,
            repeats_gb_per_s=[value / 1e9 for value in mine],
            limit_repeats_gb_per_s=[value / 1e9 for value in limit],
            buffer_bytes=plan.buffer_bytes,
            checked_blocks=session.checked,
        )
