"""The benchmark of a hardware test: puts and gets between two devices, one process each.

``python -m kvlink.testing.hardware_bench --channel NAME --devices npu:0,npu:1`` prints one line a measurement. The
first transfer of each kind is compared byte by byte at the other side.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import KvlinkError
from ..registry import kvlink_version
from .agent import Agent
from .cli import parse_pairs
from .endpoint import RemoteEndpoint
from .suite import ConformanceFailure, check
from .wire import ChildProcess

MAIN = "main"
REGION = 64 << 20
SIZES = ((4 << 10, 1024), (64 << 10, 512), (1 << 20, 32), (32 << 20, 1))
"""Bytes of a block, and blocks in a transfer."""
_ROUNDS = 5
_TRANSFER_SECONDS = 60.0


class BenchAgent(Agent):
    """The active side, in this process."""

    def measure(self, operation: str, peer: str, blocks: list[list[int]]) -> float:
        """Moves blocks between the regions "a" here and "b" there; returns seconds from the call to the completion."""
        ranges = self._ranges(peer, "a", "b", blocks, MAIN)
        found = self._peer(peer, MAIN)
        start = time.perf_counter()
        transfer = (
            found.put(ranges, timeout=_TRANSFER_SECONDS)
            if operation == "put"
            else found.get(ranges, timeout=_TRANSFER_SECONDS)
        )
        transfer.wait(_TRANSFER_SECONDS + 10)
        seconds = time.perf_counter() - start
        transfer.result()  # raises what went wrong
        return seconds


def scattered(size: int, count: int, generator: np.random.Generator) -> list[list[int]]:
    """Returns ``count`` blocks of ``size`` bytes at places in random order on both sides, none overlapping another."""
    places = REGION // size
    local = generator.permutation(places)[:count] * size
    remote = generator.permutation(places)[:count] * size
    return [[int(a), int(b), size] for a, b in zip(local, remote, strict=True)]


def _check_bytes(agent: BenchAgent, other: RemoteEndpoint, operation: str, peer: str, blocks: list[list[int]]) -> None:
    agent.do_fill(name="a", seed=1)
    other.fill("b", 2)
    agent.measure(operation, peer, blocks)
    if operation == "put":
        other.verify("b", 2, [(b, 1, a, size) for a, b, size in blocks], what="after a put")
        return
    difference = agent.do_compare(name="a", seed=1, patches=[[a, 2, b, size] for a, b, size in blocks])
    check(difference is None, f"after a get: {difference}")


def run(channel: str, devices: Sequence[str], options: dict[str, object]) -> None:
    """Measures and prints.

    Args:
        channel: The provider.
        devices: The active and the passive side's.
        options: Of the provider.

    Raises:
        KvlinkError: The provider failed.
        ConformanceFailure: Bytes differ, or the other process failed.
    """
    agent = BenchAgent()
    child = ChildProcess("kvlink.testing.agent")
    other = RemoteEndpoint("b", {"provider": channel, "options": options, "device": devices[1]}, child)
    generator = np.random.default_rng(1)
    try:
        agent.do_open(provider=channel, options=options, device=devices[0])
        address = other.open()
        agent.do_memory(name="a", nbytes=REGION, seed=1, kind="device")
        other.memory("b", REGION, 2, kind="device")
        joined: dict[str, Any] = agent.do_connect(address=address, timeout=120)
        peer = joined["peer"]
        agent.do_wait_region(peer=peer, name="b", timeout=60)
        print(f"{kvlink_version()} {channel} {devices[0]} to {devices[1]}: connected in {joined['seconds']:.2f} s")
        for operation in ("put", "get"):
            for size, count in SIZES:
                _check_bytes(agent, other, operation, peer, scattered(size, count, generator))
                times = [agent.measure(operation, peer, scattered(size, count, generator)) for _ in range(_ROUNDS)]
                one = [agent.measure(operation, peer, scattered(size, 1, generator)) for _ in range(20)]
                rates = [size * count / seconds / 1e9 for seconds in times]
                print(
                    f"{operation} {count:5} scattered blocks of {size:9} bytes: {statistics.median(rates):8.2f} GB/s "
                    f"({min(rates):.2f} to {max(rates):.2f}), one block {statistics.median(one) * 1e6:9.1f} us",
                    flush=True,
                )
        print(f"statistics {agent.do_provider_statistics()}")
        problems = agent.do_reset()
        check(not problems, f"closing failed: {'; '.join(problems)}")
        other.call("reset")
    finally:
        child.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark.

    Returns:
        0, or 1 when something failed.
    """
    parser = argparse.ArgumentParser(prog="python -m kvlink.testing.hardware_bench")
    parser.add_argument("--channel", required=True)
    parser.add_argument("--devices", required=True)
    parser.add_argument("--option", action="append", default=[])
    parsed = parser.parse_args(arguments)
    try:
        run(parsed.channel, parsed.devices.split(","), parse_pairs(parsed.option))
    except (KvlinkError, ConformanceFailure) as error:
        print(f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
