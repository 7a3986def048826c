"""What the tests of the LMCache adapter share: buffers with a channel, configurations, ports."""

from __future__ import annotations

import socket
from typing import Any

import torch

CHUNK = 16
LAYERS = 2
HEAD_SIZE = 8


def free_port() -> int:
    """Returns a TCP port of loopback that nobody used a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def paged_allocator() -> Any:
    """Returns LMCache's class, wherever this version has it."""
    try:
        from lmcache.v1.memory_allocators.paged_tensor_memory_allocator import PagedTensorMemoryAllocator
    except ImportError:
        from lmcache.v1.memory_management import PagedTensorMemoryAllocator
    return PagedTensorMemoryAllocator


class Pool:
    """LMCache's paged buffer and a kvlink channel on it, as LMCache's backends build them."""

    def __init__(self, pages: int, *, peer_init_url: str | None, role: str, heads: int = 2, **extra: Any) -> None:
        from lmcache.v1.memory_management import MemoryFormat

        from kvlink_lmcache.channel import create_transfer_channel

        self.shape = torch.Size((2, LAYERS, CHUNK, heads * HEAD_SIZE))
        self.page_bytes = self.shape.numel() * 4
        self.buffer = torch.zeros(pages * self.page_bytes, dtype=torch.uint8)
        self.fmt = MemoryFormat.KV_2LTD
        self.allocator = paged_allocator()(self.buffer, [self.shape], [torch.float32], self.fmt)
        self.url = peer_init_url
        self.held: list[Any] = []
        self.channel = create_transfer_channel(
            channel_type="host",
            async_mode=False,
            role=role,
            buffer_ptr=self.allocator.buffer_ptr,
            buffer_size=self.allocator.buffer_size,
            align_bytes=self.allocator.align_bytes,
            tp_rank=0,
            peer_init_url=peer_init_url,
            backends=None,
            device="cpu",
            **extra,
        )

    def filled(self, count: int, tokens: int = CHUNK) -> list[Any]:
        """Returns objects with random bytes."""
        shape = torch.Size((2, LAYERS, tokens, self.shape[3]))
        objects = [self.allocator.allocate([shape], [torch.float32], self.fmt) for _ in range(count)]
        for item in objects:
            item.raw_data.copy_(torch.randint(1, 255, item.raw_data.shape, dtype=torch.uint8))
        self.held += objects
        return objects

    def page(self, number: int) -> torch.Tensor:
        """Returns the bytes of one page."""
        return self.buffer[number * self.page_bytes : (number + 1) * self.page_bytes]

    def close(self) -> None:
        """Closes the channel and gives every object back."""
        self.channel.close()
        for item in self.held:
            item.ref_count_down()
        self.held = []
        for item in self.allocator.free_blocks:
            item.meta.ref_count = 0  # LMCache's free objects count 1 until they are used, and complain when they go
