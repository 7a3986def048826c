"""The PD buffer: memory that the provider moves fastest, cut into LMCache's pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lmcache.v1.memory_management import MemoryAllocatorInterface, MemoryFormat

import kvlink
from kvlink.errors import ConfigError

from .endpoint import REGION
from .log import get_logger

try:
    from lmcache.v1.memory_allocators.paged_tensor_memory_allocator import PagedTensorMemoryAllocator
except ImportError:  # LMCache 0.4
    from lmcache.v1.memory_management import PagedTensorMemoryAllocator

_log = get_logger()
ALIGNMENT = 2 << 20


class Pages(PagedTensorMemoryAllocator):  # type: ignore[misc]
    """LMCache's paged allocator that says when a page comes back.

    Attributes:
        freed: Called after pages were freed, on whatever thread; quick and without locks of the caller's.
    """

    freed: Callable[[], None] | None = None

    def free(self, memory_obj: Any, allocator_type: str | None = None) -> None:
        """Takes one page back."""
        super().free(memory_obj, allocator_type)
        if self.freed is not None:
            self.freed()

    def batched_free(
        self, memory_objs: Sequence[Any], allocator_type: str | None = None, update_stats: bool = True
    ) -> None:
        """Takes pages back."""
        super().batched_free(memory_objs, allocator_type, update_stats)
        if self.freed is not None and memory_objs:
            self.freed()

    @property
    def free_pages(self) -> int:
        """Pages that nobody holds."""
        return len(self.free_blocks)


class PDBuffer(MemoryAllocatorInterface):  # type: ignore[misc]
    """One region, registered with a channel and handed out as LMCache's memory objects.

    Attributes:
        region: The registered memory.
        pages: LMCache's allocator over it.
        page_bytes: Bytes of a full chunk.
        total: Pages of the buffer.
    """

    def __init__(
        self,
        channel: kvlink.Channel,
        nbytes: int,
        shape: torch.Size,
        dtype: torch.dtype,
        fmt: MemoryFormat,
        device: str,
    ) -> None:
        """Allocates and registers.

        Args:
            channel: Allocates the memory where it can; else it is registered with it.
            nbytes: Size; a rest smaller than a chunk is not allocated.
            shape: Of a full chunk's memory object.
            dtype: Of its elements.
            fmt: LMCache's format.
            device: "cpu", "npu:0".

        Raises:
            ConfigError: Not one chunk fits.
        """
        self.page_bytes = shape.numel() * dtype.itemsize
        self.total = nbytes // self.page_bytes
        if self.total == 0:
            raise ConfigError(f"a PD buffer of {nbytes} bytes does not hold one chunk of {self.page_bytes} bytes")
        size = self.total * self.page_bytes
        if device == "cpu" and kvlink.Capability.ALLOCATE in channel.capabilities:
            self.region = channel.allocate(size, name=REGION, device="cpu")
            memory = torch.frombuffer(self.region.buffer(), dtype=torch.uint8)
        else:
            memory = _zeros(size, device)
            self.region = channel.register(memory, name=REGION)
        self.pages = Pages(memory, [shape], [dtype], fmt)
        self.shape, self.dtype, self.fmt = shape, dtype, fmt

    @property
    def free_pages(self) -> int:
        """Pages that nobody holds."""
        return self.pages.free_pages

    def chunk_shape(self, tokens: int) -> torch.Size:
        """Returns the shape of a chunk of fewer tokens."""
        shape = list(self.shape)
        shape[self.fmt.token_dim()] = tokens
        return torch.Size(shape)

    def take(self, tokens: Sequence[int]) -> list[Any] | None:
        """Takes a page for each chunk, or none at all.

        Args:
            tokens: Tokens of each chunk.

        Returns:
            The memory objects, or None when too few pages are free.
        """
        taken: list[Any] = []
        for count in tokens:
            item = self.pages.allocate([self.chunk_shape(count)], [self.dtype], self.fmt)
            if item is None:
                self.pages.batched_free(taken)
                return None
            taken.append(item)
        return taken

    # ---- LMCache's interface ----

    def allocate(self, shapes: Any, dtypes: Any, fmt: Any = None, allocator_type: str | None = None) -> Any:
        """Takes one page, or returns None when none is free."""
        return self.pages.allocate(shapes, dtypes, fmt or self.fmt)

    def batched_allocate(
        self, shapes: Any, dtypes: Any, batch_size: int, fmt: Any = None, allocator_type: str | None = None
    ) -> Any:
        """Takes several pages, or returns None when too few are free."""
        return self.pages.batched_allocate(shapes, dtypes, batch_size, fmt or self.fmt)

    def free(self, memory_obj: Any, allocator_type: str | None = None) -> None:
        """Takes one page back."""
        self.pages.free(memory_obj)

    def batched_free(
        self, memory_objs: Sequence[Any], allocator_type: str | None = None, update_stats: bool = True
    ) -> None:
        """Takes pages back."""
        self.pages.batched_free(memory_objs, update_stats=update_stats)

    def memcheck(self) -> bool:
        """Returns whether LMCache's own count adds up."""
        return bool(self.pages.memcheck())

    def close(self) -> None:
        """Ends the hand-outs; the memory goes with the channel."""
        self.pages.freed = None
        for item in self.pages.free_blocks:
            item.meta.ref_count = 0  # LMCache's free objects count 1 until first used, and complain when they go


def _zeros(nbytes: int, device: str) -> torch.Tensor:
    """Returns zeroed memory that starts where every device library is content."""
    try:
        memory = torch.zeros(nbytes + ALIGNMENT, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"pd_buffer_device {device}: {nbytes} bytes cannot be had there: {reason}") from error
    start = -memory.data_ptr() % ALIGNMENT
    return memory[start : start + nbytes]
