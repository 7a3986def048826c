"""Run under callgrind by test_instructions.py: connects to an address and puts batches of the sizes given."""

from __future__ import annotations

import sys

import numpy as np

import kvlink

PIECE = 64


def main(address: str, *sizes: str) -> int:
    """Puts each batch and waits for it."""
    with kvlink.open("hixl", device="npu:0", listen="tcp://127.0.0.1:0") as channel:
        most = max(map(int, sizes))
        region = channel.allocate(2 * PIECE * most, name="a")
        peer = channel.connect(address, timeout=120.0)
        remote = peer.regions["b"]
        for size in map(int, sizes):
            # Every second piece: nothing is adjacent, so nothing is coalesced.
            offsets = np.arange(size, dtype=np.int64) * 2 * PIECE
            blocks = np.stack([offsets, offsets, np.full_like(offsets, PIECE)], axis=1)
            peer.put(kvlink.ranges(region, remote, blocks), timeout=300.0).wait(timeout=300.0)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
