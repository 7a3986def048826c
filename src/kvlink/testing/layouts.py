"""Shapes of work: where the blocks of a batch lie on both sides."""

from __future__ import annotations

import random
from typing import NamedTuple

from .patterns import Patch

Block = tuple[int, int, int]
"""Local offset, remote offset, length; bytes."""


class Layout(NamedTuple):
    """A batch between two regions.

    Attributes:
        name: For people.
        blocks: Local offset, remote offset and length of each.
        nbytes: Bytes that each of the two regions must have.
    """

    name: str
    blocks: list[Block]
    nbytes: int

    def patches(self, operation: str, seed: int) -> list[Patch]:
        """Returns what the batch writes: into the remote region for a put, into the local one for a get.

        Args:
            operation: "put" or "get".
            seed: Pattern of the region that is read.
        """
        if operation == "put":
            return [Patch(remote, seed, local, length) for local, remote, length in self.blocks]
        return [Patch(local, seed, remote, length) for local, remote, length in self.blocks]


def round_up(number: int, unit: int) -> int:
    """Rounds up to a multiple of ``unit``."""
    return -(-number // unit) * unit


def scattered(size: int, count: int, *, alignment: int = 1, shift: tuple[int, int] = (0, 0), seed: int = 0) -> Layout:
    """Blocks of one size in random order with gaps on both sides, so that nothing coalesces.

    Args:
        size: Bytes of a block; rounded up to the alignment.
        count: Blocks.
        alignment: Offsets and sizes are multiples of this.
        shift: Bytes added to every local and every remote offset; rounded up to the alignment.
        seed: Of the order.
    """
    size = round_up(size, alignment)
    gap = round_up(max(1, min(size // 4, 64)), alignment)
    pitch = size + gap
    local_shift, remote_shift = (round_up(value, alignment) for value in shift)
    order = random.Random(seed)
    places = list(range(count))
    order.shuffle(places)
    blocks = [
        (local_shift + place * pitch, remote_shift + index * pitch, size)
        for index, place in zip(order.sample(range(count), count), places, strict=True)
    ]
    name = f"{count} x {size} B" + (f" at +{local_shift}/+{remote_shift}" if local_shift or remote_shift else "")
    return Layout(name, blocks, count * pitch + max(local_shift, remote_shift) + gap)


def contiguous(size: int, count: int, *, alignment: int = 1) -> Layout:
    """Neighbouring blocks in order: an engine may make them one."""
    size = round_up(size, alignment)
    return Layout(f"{count} x {size} B contiguous", [(i * size, i * size, size) for i in range(count)], size * count)


def mixed(count: int, *, alignment: int = 1, seed: int = 0) -> Layout:
    """Blocks of very different sizes, some neighbours, some apart, with different gaps on the two sides."""
    order = random.Random(seed)
    local = remote = 0
    blocks: list[Block] = []
    for _ in range(count):
        size = round_up(order.choice((1, 3, 64, 511, 4096, 5000, 65537)), alignment)
        blocks.append((local, remote, size))
        local += size + round_up(order.choice((0, 0, 1, 100)), alignment)
        remote += size + round_up(order.choice((0, 0, 13, 4096)), alignment)
    order.shuffle(blocks)
    return Layout(f"{count} blocks of mixed sizes", blocks, max(local, remote) + alignment)
