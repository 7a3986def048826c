"""LMCache's peer-to-peer backend on kvlink's channel: getting, moving, and a holder that was restarted."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lmcache")

from lmcache_pd import HEADS, key, metadata, until  # noqa: E402
from lmcache_pools import CHUNK, HEAD_SIZE, LAYERS, free_port  # noqa: E402

from kvlink_lmcache import registration  # noqa: E402

SHAPE = (2, LAYERS, CHUNK, HEADS * HEAD_SIZE)


class Controller:
    """Knows one answer: who holds the chunks that are asked for."""

    def __init__(self, holder: str) -> None:
        self.holder = holder

    async def async_put_and_wait_msg(self, message: Any) -> Any:
        from lmcache.v1.cache_controller.message import BatchedP2PLookupRetMsg

        return BatchedP2PLookupRetMsg(layout_info=[("instance", "cpu", len(message.hashes), self.holder)])

    def put_msg(self, message: Any) -> None:
        """Takes news of the cache; nobody asks."""


class Instance:
    """One LMCache instance's CPU cache and P2P backend."""

    def __init__(self, loop: asyncio.AbstractEventLoop, holder: str, port: int = 0) -> None:
        registration.register()
        from lmcache.v1.config import LMCacheEngineConfig
        from lmcache.v1.memory_management import MemoryFormat
        from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
        from lmcache.v1.storage_backend.p2p_backend import P2PBackend

        try:
            from lmcache.v1.memory_allocators.paged_cpu_gpu_memory_allocator import PagedCpuGpuMemoryAllocator
        except ImportError:
            from lmcache.v1.memory_management import PagedCpuGpuMemoryAllocator

        self._loop = loop
        self.meta = metadata()
        self.port = port or free_port()
        config = LMCacheEngineConfig.from_defaults(
            chunk_size=CHUNK,
            local_cpu=True,
            max_local_cpu_size=0.01,
            p2p_host="localhost",
            p2p_init_ports=[self.port],
            p2p_lookup_ports=[free_port()],
            transfer_channel="host",
            lmcache_instance_id="instance",
        )
        # LMCache's engine makes this one first; pinning an object needs it.
        from lmcache.v1.pin_monitor import PinMonitor

        PinMonitor.GetOrCreate(config)
        self.allocator = PagedCpuGpuMemoryAllocator()
        shape = torch.Size(SHAPE)
        size = 16 * shape.numel() * 4
        self.allocator.init_cpu_memory_allocator(size, [shape], [torch.float32], MemoryFormat.KV_2LTD)
        self.cache = LocalCPUBackend(config=config, memory_allocator=self.allocator)
        self.backend = P2PBackend(config, self.meta, loop, self.cache, Controller(holder))
        self.url = f"localhost:{self.port}"
        until(lambda: self.backend.async_peer_socket is not None, "it serves lookups")

    def put(self, prompt: int, chunks: int) -> list[Any]:
        """Caches chunks with random bytes; returns their bytes."""
        from lmcache.v1.memory_management import MemoryFormat

        data = []
        for index in range(chunks):
            item = self.cache.allocate(torch.Size(SHAPE), torch.float32, MemoryFormat.KV_2LTD)
            item.raw_data.copy_(torch.randint(0, 255, item.raw_data.shape, dtype=torch.uint8))
            data.append(item.raw_data.clone())
            self.cache.submit_put_task(key(prompt, index, self.meta), item)
            item.ref_count_down()
        return data

    def run(self, call: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result(30)

    def get(self, prompt: int, chunks: int) -> list[Any]:
        """Does what LMCache's storage manager does with a remote hit; returns the bytes it got."""
        keys = [key(prompt, index, self.meta) for index in range(chunks)]

        async def both() -> list[Any]:
            hits = await self.backend.batched_async_contains("lookup", keys)
            lengths = [CHUNK * index for index in range(chunks + 1)]
            spec = {"cum_chunk_lengths": lengths}
            got = await self.backend.batched_get_non_blocking("lookup", keys[:hits], transfer_spec=spec)
            return list(got)

        got = self.run(both())
        data = [item.raw_data.clone() for item in got]
        for item in got:
            item.unpin()
            item.ref_count_down()
        return data

    def close(self) -> None:
        self.backend.close()
        for item in self.allocator.cpu_allocator.free_blocks:
            item.meta.ref_count = 0


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield loop

    async def cancel() -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run_coroutine_threadsafe(cancel(), loop).result(20)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(20)
    loop.close()


def same(got: list[Any], data: list[Any]) -> bool:
    return len(got) == len(data) and all(torch.equal(a, b) for a, b in zip(got, data, strict=True))


def test_a_peers_chunks_are_fetched(loop: asyncio.AbstractEventLoop) -> None:
    holder = Instance(loop, "")
    getter = Instance(loop, holder.url)
    try:
        data = holder.put(1, 5)
        assert same(getter.get(1, 5), data)
        assert same(getter.get(1, 3), data[:3])
        assert getter.backend.transfer_channel.remote_xfer_handler_exists(holder.url)
        assert holder.backend.transfer_channel.remote_xfer_handler_exists(getter.url)
    finally:
        getter.close()
        holder.close()


def test_chunks_are_moved_to_a_peer(loop: asyncio.AbstractEventLoop) -> None:
    source, target = Instance(loop, ""), Instance(loop, "")
    try:
        data = source.put(2, 4)
        keys = [key(2, index, source.meta) for index in range(4)]
        items = [source.cache.get_blocking(name) for name in keys]
        spec = {"target_peer_init_url": target.url, "offsets": [CHUNK] * 4}
        assert source.run(source.backend.async_batched_submit_put_task(keys, items, transfer_spec=spec)) == 4
        moved = [target.cache.get_blocking(name) for name in keys]
        assert same([item.raw_data for item in moved], data)
        for item in [*items, *moved]:
            item.ref_count_down()
    finally:
        source.close()
        target.close()


def test_a_holder_that_was_restarted_is_connected_again(loop: asyncio.AbstractEventLoop) -> None:
    first = Instance(loop, "")
    getter = Instance(loop, first.url)
    try:
        data = first.put(3, 2)
        assert same(getter.get(3, 2), data)
        port = first.port
        first.close()
        until(lambda: not getter.backend.transfer_channel.remote_xfer_handler_exists(first.url), "the loss is noticed")
        second = Instance(loop, "", port)
        try:
            data = second.put(4, 2)
            getter.run(getter.backend._ensure_peer_connection(second.url, True))
            assert same(getter.get(4, 2), data)
        finally:
            second.close()
    finally:
        getter.close()
