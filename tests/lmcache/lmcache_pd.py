"""Prefillers and decoders without an engine: kvlink's PD backend, driven as LMCache's engine drives it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import torch
import zmq
from lmcache_pools import CHUNK, HEAD_SIZE, LAYERS, free_port

HEADS = 2
CHUNK_BYTES = 2 * LAYERS * CHUNK * HEADS * HEAD_SIZE * 4


def until(condition: Callable[[], bool], what: str, timeout: float = 20.0) -> None:
    """Waits until a condition holds, and fails when it does not in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.002)


def metadata(rank: int = 0, ranks: int = 1, **changes: Any) -> Any:
    """Returns LMCache's metadata of a tiny model."""
    from lmcache.v1.metadata import LMCacheMetadata

    values: dict[str, Any] = {
        "model_name": "tiny",
        "world_size": ranks,
        "local_world_size": ranks,
        "worker_id": rank,
        "local_worker_id": rank,
        "kv_dtype": torch.float32,
        "kv_shape": (LAYERS, 2, CHUNK, HEADS, HEAD_SIZE),
        "chunk_size": CHUNK,
    }
    return LMCacheMetadata(**{**values, **changes})


def config(role: str, chunks: int, **changes: Any) -> Any:
    """Returns what the backend reads of LMCache's configuration."""
    extra = {"kvlink.lmcache.transfer_timeout": 5.0, **changes.pop("extra_config", {})}
    values: dict[str, Any] = {
        "enable_pd": True,
        "transfer_channel": "host",
        "pd_role": role,
        "pd_buffer_size": chunks * CHUNK_BYTES,
        "pd_buffer_device": "cpu",
        "pd_peer_host": "localhost" if role == "receiver" else None,
        "pd_peer_init_port": None,
        "pd_peer_alloc_port": None,
        "pd_proxy_host": "localhost",
        "pd_proxy_port": None,
        "pd_skip_proxy_notification": False,
        "pd_backend_mode": "async",
        "pd_allocation_timeout_sec": math.inf,
        "pd_shutdown_timeout_sec": 5.0,
        "pd_pull_mode": False,
        "pd_delay_pull": False,
        "pd_pull_done_port": None,
        "pd_use_cpu_offload": False,
        "pd_cpu_buffer_size": None,
        "pd_alloc_fail_backoff_ttl": 0.05,
        "pd_pull_pending_ttl": 360.0,
        "pd_pull_backpressure_reserve_pct": 0.0,
        "chunk_size": CHUNK,
        "extra_config": extra,
    }
    return SimpleNamespace(**{**values, **changes})


def key(prompt: int, number: int, meta: Any) -> Any:
    """Returns the key of one chunk of a prompt."""
    from lmcache.utils import CacheEngineKey

    names = set(getattr(CacheEngineKey, "__dataclass_fields__", {}))
    values = {
        "fmt": "vllm",
        "model_name": meta.model_name,
        "world_size": meta.world_size,
        "worker_id": meta.worker_id,
        "chunk_hash": prompt * 1_000_003 + number,
        "dtype": meta.kv_dtype,
    }
    return CacheEngineKey(**{name: value for name, value in values.items() if not names or name in names})


class Proxy:
    """What a proxy hears."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self.port = self._socket.bind_to_random_port("tcp://127.0.0.1")

    def hear(self, timeout: float = 20.0) -> dict[str, Any]:
        """Returns the next message; fails when none comes."""
        assert self._socket.poll(int(timeout * 1000)), f"the proxy heard nothing for {timeout} s"
        heard: dict[str, Any] = msgspec.msgpack.decode(self._socket.recv())
        return heard

    def silent(self, seconds: float = 0.2) -> bool:
        """Returns whether nothing comes for a while."""
        return not self._socket.poll(int(seconds * 1000))

    def close(self) -> None:
        self._socket.close(0)
        self._context.term()


class Decoder:
    """A receiver."""

    def __init__(self, chunks: int, *, meta: Any = None, port: int = 0, **changes: Any) -> None:
        from kvlink_lmcache.pd import create_pd_backend

        self.meta = meta or metadata()
        self.port = port or free_port()
        ports = [self.port] * self.meta.world_size
        changes = {"pd_peer_init_port": ports, "pd_peer_alloc_port": [free_port()] * self.meta.world_size, **changes}
        self.config = config("receiver", chunks, **changes)
        self.backend = create_pd_backend(self.config, self.meta)

    @property
    def free(self) -> int:
        """Free pages."""
        return int(self.backend.held()["free"])

    def lookup(self, prompt: int, chunks: int) -> int:
        """Returns the chunks of a prompt that the backend says it has."""
        return int(self.backend.batched_contains([key(prompt, index, self.meta) for index in range(chunks)]))

    def retrieve(self, prompt: int, chunks: int, skip: int = 0) -> list[torch.Tensor]:
        """Does what LMCache's engine does when it loads a prompt; returns the bytes of what it got."""
        keys = [key(prompt, index, self.meta) for index in range(skip, chunks)]
        got = []
        for name, item in zip(keys, self.backend.batched_get_blocking(keys), strict=True):
            if item is None:
                break
            got.append((name, item, item.raw_data.clone()))
        for name, item, _ in got:
            self.backend.remove(name)
            if self.config.pd_backend_mode == "sync":
                item.ref_count_down()
        return [data for _, _, data in got]

    def close(self) -> None:
        self.backend.close()


class Prefiller:
    """A sender."""

    def __init__(self, chunks: int, proxy: Proxy, *, meta: Any = None, **changes: Any) -> None:
        from kvlink_lmcache.pd import create_pd_backend

        self.meta = meta or metadata()
        self.total = chunks
        self.backend = create_pd_backend(
            config("sender", chunks, **{"pd_proxy_port": proxy.port, **changes}), self.meta
        )

    @property
    def free(self) -> int:
        """Free pages."""
        return int(self.backend.held()["free"])

    def spec(self, req_id: str, decoder: Decoder | int, total: int, last: bool) -> Any:
        """Returns LMCache's DisaggSpec."""
        port = decoder if isinstance(decoder, int) else decoder.port
        return SimpleNamespace(
            req_id=req_id,
            receiver_id=f"localhost{port}",
            receiver_host="localhost",
            receiver_init_port=[port] * self.meta.world_size,
            receiver_alloc_port=[1] * self.meta.world_size,
            is_last_prefill=last,
            num_transferred_tokens=0,
            total_chunks=total,
        )

    def store(
        self,
        req_id: str,
        decoder: Decoder | int,
        prompt: int,
        chunks: int,
        *,
        first: int = 0,
        total: int | None = None,
        tail: int = CHUNK,
        last: bool = True,
    ) -> tuple[list[torch.Tensor], Any]:
        """Does what LMCache's engine does with a step's chunks.

        Returns:
            The bytes stored, and the future.
        """
        spec = self.spec(req_id, decoder, first + chunks if total is None else total, last)
        keys, items, data = [], [], []
        for index in range(first, first + chunks):
            tokens = tail if last and index == first + chunks - 1 else CHUNK
            item = self.backend.allocate(self.meta.get_shapes(tokens), self.meta.get_dtypes())
            if item is None:
                break
            item.raw_data.copy_(torch.randint(0, 255, item.raw_data.shape, dtype=torch.uint8))
            keys.append(key(prompt, index, self.meta))
            items.append(item)
            data.append(item.raw_data.clone())
        futures = None
        if items:
            futures = self.backend.batched_submit_put_task(keys, items, transfer_spec=spec)
            for item in items:
                item.ref_count_down()
        self.backend.store_ended(spec)
        return data, futures[0] if futures else None

    def close(self) -> None:
        self.backend.close()
