"""What is measured: sizes, and the seeded lists of blocks that both processes agree on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError

PATHS = ("shm", "cma", "tcp")
OPERATIONS = ("put", "get")
MIN_BUFFER = 256 << 20
_PAGE = 4096
_MAX_BUFFER = 8 << 30


@dataclass(frozen=True)
class Plan:
    """One measurement.

    Attributes:
        path: "shm", "cma" or "tcp".
        op: "put" or "get".
        block_size: Bytes of one block.
        blocks: Blocks in one transfer.
        contiguous: The blocks follow one another on both sides and coalesce; else they are scattered.
        repeats: Measurements, of which the median counts.
        seed: Of the block lists.
    """

    path: str
    op: str
    block_size: int
    blocks: int
    contiguous: bool = False
    repeats: int = 5
    seed: int = 1

    def __post_init__(self) -> None:
        if self.path not in PATHS:
            raise ConfigError(f"path is {self.path!r}; expected one of {', '.join(PATHS)}")
        if self.op not in OPERATIONS:
            raise ConfigError(f"op is {self.op!r}; expected put or get")
        for name in ("block_size", "blocks", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.blocks * self.stride > _MAX_BUFFER:
            raise ConfigError(f"{self.blocks} blocks of {self.block_size} bytes need more than {_MAX_BUFFER >> 30} GiB")

    @property
    def stride(self) -> int:
        """Bytes from the start of one place for a block to the next: with a gap, so that neighbours never join."""
        return self.block_size if self.contiguous else self.block_size + min(self.block_size, _PAGE)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the buffer on each side: at least 256 MiB, whole pages."""
        return -(-max(MIN_BUFFER, self.blocks * self.stride) // _PAGE) * _PAGE

    @property
    def transfer_bytes(self) -> int:
        """Bytes that one transfer moves."""
        return self.block_size * self.blocks

    def block_list(self, number: int) -> npt.NDArray[np.int64]:
        """Return a list of blocks: each side's places are a random choice in random order.

        Args:
            number: Which list; the same number gives the same list in every process.

        Returns:
            Array of shape (blocks, 3): local offset, remote offset, length, in bytes.
        """
        generator = np.random.default_rng((self.seed, number))
        places = self.buffer_bytes // self.stride
        table = np.empty((self.blocks, 3), dtype=np.int64)
        for side in range(2):
            if self.contiguous:
                first = int(generator.integers(places - self.blocks + 1))
                chosen = np.arange(first, first + self.blocks)
            else:
                chosen = generator.choice(places, self.blocks, replace=False)
            table[:, side] = chosen * self.stride
        table[:, 2] = self.block_size
        return table
