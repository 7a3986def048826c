"""The machine's own limit for each path, measured over the same blocks as the transfer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from types import TracebackType
from typing import Any

from ..errors import KvlinkError
from . import _limits
from ._limits import COPY_MODES, Blocks, Memory
from ._plan import Plan

# Bytes of one send or recv; the best is the limit.
STREAM_CHUNKS = (64 << 10, 256 << 10, 1 << 20, 4 << 20)
_STREAM_BYTES = 128 << 20
# Moves the blocks (or a stream) and returns bytes a second; None when this machine lacks the way.
Yardstick = Callable[[Blocks], "float | None"]


class BenchError(KvlinkError):
    """A measurement failed: the other process ended, or bytes arrived wrong."""


class TargetProcess:
    """The passive process.

    Args:
        plan: What is measured.

    Raises:
        BenchError: It ended before it was ready.
    """

    def __init__(self, plan: Plan) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kvlink.bench._target", json.dumps(asdict(plan))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self.hello = self.answer()
        except BaseException:
            self.close()
            raise

    def send(self, do: str, **arguments: Any) -> None:
        """Gives a command; the answer is taken with :meth:`answer`.

        Raises:
            BenchError: The process ended.
        """
        assert self._process.stdin is not None
        try:
            print(json.dumps({"do": do, **arguments}), file=self._process.stdin, flush=True)
        except BrokenPipeError as error:
            raise BenchError("the target process ended", operation="bench") from error

    def answer(self) -> dict[str, Any]:
        """Waits for the answer to the last command.

        Raises:
            BenchError: The process failed or ended.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise BenchError(f"the target process ended with status {code}", operation="bench")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchError(f"the target process: {answer['error']}", operation="bench")
        return answer

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Gives a command and returns its answer.

        Raises:
            BenchError: The process ended.
        """
        self.send(do, **arguments)
        return self.answer()

    def close(self) -> None:
        """Ends the process and waits for it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> TargetProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def yardsticks(plan: Plan, local: Memory, twin: Memory, target: TargetProcess, descriptor: int) -> dict[str, Yardstick]:
    """Returns what to measure besides kvlink.

    Args:
        plan: What is measured.
        local: This process's buffer.
        twin: Another buffer of this process, like the target's: the far end of the copy limit.
        target: The other process.
        descriptor: A blocking socket to it.

    Returns:
        The ways by name.
    """

    def rate(blocks: Blocks, seconds: float | None) -> float | None:
        return None if seconds is None else float(blocks[:, 2].sum()) / seconds

    def copy(mode: int) -> Yardstick:
        return lambda blocks: rate(blocks, _limits.copy(local, twin, blocks, plan.op, mode))

    def process_vm(blocks: Blocks) -> float | None:
        hello = target.hello
        return rate(blocks, _limits.process_vm(hello["pid"], local, hello["memory"], blocks, plan.op))

    def stream(chunk: int) -> Yardstick:
        def measure(blocks: Blocks) -> float:
            nbytes = max(int(blocks[:, 2].sum()), _STREAM_BYTES)
            sending = plan.op == "put"
            target.send("stream", bytes=nbytes, chunk=chunk, send=not sending)
            here = _limits.stream(descriptor, local, nbytes, chunk, send=sending)
            there = float(target.answer()["seconds"])
            return nbytes / (here if sending else there)  # the sender's clock, up to the acknowledgement

        return measure

    if plan.path == "shm":
        return {f"{name}, one thread": copy(mode) for mode, name in enumerate(COPY_MODES)}
    if plan.path == "cma":
        return {"process_vm_writev" if plan.op == "put" else "process_vm_readv": process_vm}
    return {f"socket stream, {chunk >> 10} KiB a call": stream(chunk) for chunk in STREAM_CHUNKS}
