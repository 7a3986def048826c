"""Two connected processes with their buffers, and what can be done with them."""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack

import numpy as np
import numpy.typing as npt

import kvlink

from . import _limits
from ._limits import LOCAL, Blocks, Memory
from ._memory import REGION, Buffer, make_buffer
from ._plan import Plan
from ._yardsticks import BenchError, TargetProcess

KVLINK = "kvlink"
_LATENCY_BYTES = 256 << 20
_MAX_LATENCY_SAMPLES = 2000
_MIN_LATENCY_SAMPLES = 200
_LATENCY_BATCHES = 5
_WARM_UP = 100
_TIMEOUT = 60.0


class Session:
    """A measurement's two processes.

    Args:
        plan: What is measured.
        stack: Closes everything at its end.

    Attributes:
        channel: This process's channel.
        local: This process's buffer.
        twin: Where shm is measured, another one, like the target's: the far end of the copy limit.
        target: The other process.
        socket: A plain connection to it.
        peer: The kvlink connection to it.
        remote: Its published region.
        checked: Blocks compared so far.

    Raises:
        BenchError: The other process failed.
        KvlinkError: This machine lacks the path.
    """

    def __init__(self, plan: Plan, stack: ExitStack) -> None:
        self.plan = plan
        self.target = stack.enter_context(TargetProcess(plan))
        self.channel = channel = stack.enter_context(kvlink.open("host", options={"path": plan.path}))
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
        """Returns the ranges of a list of blocks."""
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
