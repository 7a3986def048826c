"""The active process of a measurement."""

from __future__ import annotations

import math
import socket
import statistics
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

import kvlink

from . import _limits
from ._limits import LOCAL, Blocks, Memory
from ._memory import Buffer, make_buffer
from ._plan import Plan
from ._target import REGION
from ._yardsticks import BenchError, TargetProcess, Yardstick, yardsticks

# A repeat moves at least this much, with another list of blocks for every transfer.
_REPEAT_BYTES = 64 << 20
_LATENCY_BYTES = 256 << 20
_MAX_LATENCY_SAMPLES = 2000
_MIN_LATENCY_SAMPLES = 200
_LATENCY_BATCHES = 5
_WARM_UP = 100
_TIMEOUT = 60.0
KVLINK = "kvlink"


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


class _Session:
    """Two connected processes with their buffers."""

    def __init__(self, plan: Plan, stack: ExitStack) -> None:
        self.plan = plan
        self.target = stack.enter_context(TargetProcess(plan))
        channel = stack.enter_context(kvlink.open("host", options={"path": plan.path}))
        self.local: Buffer = make_buffer(channel, plan.path, plan.buffer_bytes, "local")
        # Only the copy limit needs a far end in this process.
        self.twin: Memory = (
            make_buffer(channel, plan.path, plan.buffer_bytes, "twin").memory
            if plan.path == "shm"
            else Memory(self.local.memory.address, 0)
        )
        self.socket = stack.enter_context(socket.create_connection(("127.0.0.1", self.target.hello["port"])))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.peer = channel.connect(self.target.hello["address"])
        self.remote = self.peer.wait_region(REGION, timeout=_TIMEOUT)
        self.checked = 0
        # Source bytes: ours for a put, the target's (and the twin's) for a get.
        if plan.op == "put":
            _limits.fill(self.local.memory, plan.seed)
        else:
            self.target.ask("fill", seed=plan.seed)
            _limits.fill(self.twin, plan.seed)

    def ranges(self, blocks: Blocks) -> npt.NDArray[np.void]:
        return kvlink.ranges(self.local.region, self.remote, blocks)

    def transfer(self, ranges: npt.NDArray[np.void]) -> float:
        """Moves the ranges; returns seconds from the call to the completion."""
        submit = self.peer.put if self.plan.op == "put" else self.peer.get
        begun = time.perf_counter()
        transfer = submit(ranges)
        finished = transfer.wait(_TIMEOUT)
        seconds = time.perf_counter() - begun
        if not finished:
            raise BenchError(f"a transfer did not finish within {_TIMEOUT:.0f} s", operation="bench")
        if (path := transfer.result().path) != self.plan.path:
            raise BenchError(f"the bytes went over {path}, not {self.plan.path}", operation="bench")
        return seconds

    def check(self, number: int, blocks: Blocks) -> None:
        """Compares the destination with the source, and sees that nothing was written beside the blocks."""
        if self.plan.op == "put":
            answer = self.target.ask("check", list=number, seed=self.plan.seed)
            wrong, clean = answer["wrong"], answer["clean"]
        else:
            wrong = _limits.wrong_blocks(self.local.memory, blocks, self.plan.seed, LOCAL)
            clean = _limits.clear_and_check(self.local.memory, blocks, LOCAL)
        if wrong or not clean:
            raise BenchError(
                f"{wrong} of {len(blocks)} blocks hold wrong bytes"
                + ("" if clean else "; bytes were written beside the blocks"),
                operation="bench",
            )
        self.checked += len(blocks)

    def reset(self, name: str) -> None:
        """Clears the whole destination, so that every measurement finds the same state in memory and caches.

        Args:
            name: What comes next: KVLINK, or a yardstick.
        """
        if self.plan.op == "get":
            _limits.clear(self.local.memory)
        elif self.plan.path == "shm" and name != KVLINK:
            _limits.clear(self.twin)
        else:
            self.target.ask("clear")

    def latency(self, blocks: Blocks) -> tuple[list[float], list[float]]:
        """Times transfers of one block, and for tcp exchanges over a plain socket, in alternating batches.

        Returns:
            Seconds of each transfer, and of each exchange (none for other paths).
        """
        samples = max(_MIN_LATENCY_SAMPLES, min(_MAX_LATENCY_SAMPLES, _LATENCY_BYTES // self.plan.block_size))
        batch = samples // _LATENCY_BATCHES
        ours: list[float] = []
        plain: list[float] = []
        chosen = np.ascontiguousarray(blocks[np.arange(batch) % len(blocks)])
        single = [self.ranges(chosen[i : i + 1]) for i in range(batch)]
        for ranges in single[:_WARM_UP]:
            self.transfer(ranges)
        for _ in range(_LATENCY_BATCHES):
            ours += [self.transfer(ranges) for ranges in single]
            if self.plan.path == "tcp":
                self.target.send("exchange", count=batch)
                plain += _limits.exchange_client(self.socket.fileno(), self.local.memory, chosen, self.plan.op).tolist()
                self.target.answer()
        return ours, plain


def _shares(session: _Session) -> dict[str, list[float]]:
    """Measures kvlink and every yardstick in turn; returns bytes a second of every repeat by name."""
    plan = session.plan
    ways: dict[str, Yardstick] = {
        KVLINK: lambda blocks: plan.transfer_bytes / session.transfer(session.ranges(blocks)),
        **yardsticks(plan, session.local.memory, session.twin, session.target, session.socket.fileno()),
    }
    rounds = math.ceil(_REPEAT_BYTES / plan.transfer_bytes)
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
        session = _Session(plan, stack)
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
