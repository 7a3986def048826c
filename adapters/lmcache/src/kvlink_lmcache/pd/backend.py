"""LMCache's storage backend for disaggregated prefill, on kvlink: push, pull and delayed pull."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.storage_backend.abstract_backend import AllocatorBackendInterface

import kvlink
from kvlink.errors import ConfigError
from kvlink.registry import device_for

from .. import settings
from ..buffer import PDBuffer
from ..endpoint import Endpoint
from ..log import get_logger
from . import options as pd_options
from .loop import LoopThread
from .notifier import ProxyNotifier
from .options import PUSH
from .receiver import Receiver
from .sender import Sender

_log = get_logger()


class KVLinkPDBackend(AllocatorBackendInterface):  # type: ignore[misc]
    """One rank of a prefiller or decoder; LMCache calls it from its engine's thread.

    Attributes:
        options: The configuration.
        pd_config: What LMCache's storage manager reads of a PD backend: ``role``.
        buffer: The PD buffer.
        endpoint: The channel.
    """

    def __init__(self, config: Any, metadata: Any) -> None:
        """Opens channel and buffer and starts.

        Args:
            config: LMCache's configuration.
            metadata: LMCache's metadata.

        Raises:
            ConfigError: A key is missing or wrong, an address cannot be bound, the buffer holds no chunk.
            ChannelUnavailableError: This host cannot use the provider.
        """
        self.options = pd_options.read(config, metadata)
        options = self.options
        super().__init__(dst_device=options.device)
        self.pd_config = SimpleNamespace(role=options.role)
        self.tp_rank = options.rank
        own = settings.identity(config, metadata)
        own["pd_mode"] = options.mode
        own[f"pd_{options.role}"] = options.role
        self._channel = kvlink.open_from_config(
            settings.channel_config(
                config.transfer_channel,
                listen=options.listen,
                device=device_for(config.transfer_channel, options.device, options.device_index),
                identity=own,
                config=config,
            )
        )
        try:
            self._build(metadata)
        except BaseException:
            self._channel.close()
            raise

    def _build(self, metadata: Any) -> None:
        options = self.options
        shape, dtype, fmt = _chunk(metadata)
        self.buffer = PDBuffer(self._channel, options.buffer_bytes, shape, dtype, fmt, options.device)
        self.endpoint = Endpoint(
            self._channel,
            self.buffer.region,
            self.buffer.page_bytes,
            connect_timeout=options.connect_timeout,
            transfer_timeout=options.transfer_timeout,
        )
        self._channel.on_peer = self._other_role
        self._freed = threading.Condition()
        self._closed = False
        self._unsent = 0  # pages that the engine took and has not handed over; its thread only
        self._short = False
        self._loop = LoopThread(f"kvlink-pd-{options.rank}")
        self._notifier = ProxyNotifier(
            options.proxy, options.rank, options.world_size, failures=options.failure_notification
        )
        self._sender: Sender | None = None
        self._receiver: Receiver | None = None
        if options.role == "sender":
            self.buffer.pages.freed = self._wake
            self._sender = Sender(self.endpoint, self.buffer, options, self._loop, self._notifier)
        else:
            self._receiver = Receiver(self.endpoint, self.buffer, options, self._loop)
        _log.info(
            "PD %s, %s, channel %s at %s: rank %d of %d, %d chunks of %d bytes on %s",
            options.role, options.mode, self._channel.name, self._channel.address, options.rank, options.world_size,
            self.buffer.total, self.buffer.page_bytes, options.device,
        )  # fmt: skip

    def _other_role(self, identity: dict[str, str | int]) -> bool:
        wanted = "receiver" if self.options.role == "sender" else "sender"
        if f"pd_{wanted}" not in identity:
            theirs = "sender" if "pd_sender" in identity else "receiver" if "pd_receiver" in identity else "none"
            raise ConfigError(
                f"pd_role here is {self.options.role!r} and the peer's is {theirs!r}; expected {wanted!r}"
            )
        return True

    def __str__(self) -> str:
        return "PDBackend"

    # ---- pages for LMCache's engine ----

    def initialize_allocator(self, config: Any, metadata: Any) -> PDBuffer:
        """Returns the buffer; it exists already."""
        return self.buffer

    def get_memory_allocator(self) -> PDBuffer:
        """Returns the buffer."""
        return self.buffer

    def get_allocator_backend(self) -> KVLinkPDBackend:
        """Returns this backend."""
        return self

    def allocate(self, shapes: Any, dtypes: Any, fmt: Any = None, eviction: bool = True, busy_loop: bool = True) -> Any:
        """Takes a page; a prefiller waits for one with a deadline while transfers hold them, and only then.

        Args:
            shapes: Shape of the memory object.
            dtypes: Its dtype.
            fmt: LMCache's format.
            eviction: Means nothing here.
            busy_loop: Means nothing here.

        Returns:
            The memory object, or None: then the hand-off fails and its proxy is told.
        """
        if self._unsent == 0:
            self._short = False  # a store begins
        item = None
        if self._may_offer():
            item = self.buffer.allocate(shapes, dtypes, fmt)
            if item is None and self._sender is not None:
                item = self._wait_for_page(shapes, dtypes, fmt)
        self._short |= item is None
        if item is not None:
            self._unsent += 1
        return item

    def _may_offer(self) -> bool:
        """A pulling prefiller keeps some pages back, so that it notices a decoder that does not read in time."""
        options = self.options
        if options.role != "sender" or options.mode == PUSH:
            return True
        return self._unsent > 0 or self.buffer.free_pages >= options.reserve * self.buffer.total

    def _wait_for_page(self, shapes: Any, dtypes: Any, fmt: Any) -> Any:
        deadline = time.monotonic() + self.options.alloc_timeout
        with self._freed:
            while not self._closed:
                item = self.buffer.allocate(shapes, dtypes, fmt)
                left = deadline - time.monotonic()
                # Where this very step holds all pages, none will come back while it waits.
                if item is not None or left <= 0 or self._unsent >= self.buffer.total:
                    return item
                self._freed.wait(left)
        return None

    def _wake(self) -> None:
        with self._freed:
            self._freed.notify_all()

    def batched_allocate(
        self,
        shapes: Any,
        dtypes: Any,
        batch_size: int,
        fmt: Any = None,
        eviction: bool = True,
        busy_loop: bool = True,
    ) -> Any:
        """Takes pages, all or None; waits as :meth:`allocate` does."""
        items: list[Any] = []
        for _ in range(batch_size):
            item = self.allocate(shapes, dtypes, fmt)
            if item is None:
                self._unsent -= len(items)
                self.buffer.batched_free(items)
                return None
            items.append(item)
        return items

    def calculate_chunk_budget(self) -> int:
        """Returns the pages of the buffer."""
        total: int = self.buffer.total
        return total

    # ---- a prefiller's chunks go ----

    def batched_submit_put_task(
        self,
        keys: Sequence[Any],
        memory_objs: Sequence[Any],
        transfer_spec: Any = None,
        on_complete_callback: Callable[[Any], None] | None = None,
    ) -> list[Any] | None:
        """Sends chunks on their way; returns at once.

        Args:
            keys: LMCache's keys.
            memory_objs: Its memory objects in this buffer.
            transfer_spec: LMCache's ``DisaggSpec``; without one the request goes nowhere and nothing is done.
            on_complete_callback: Called with each key once it is at the decoder.

        Returns:
            One future for all of them, or None without ``transfer_spec``.
        """
        self._unsent = 0
        if transfer_spec is None or self._sender is None:
            self._short = False
            return None
        short, self._short = self._short, False
        moved = self._sender.submit(keys, memory_objs, transfer_spec, on_complete_callback, short)
        return [moved]

    def store_ended(self, transfer_spec: Any) -> None:
        """Says that LMCache's engine has stored a step's chunks: one that got no page at all says nothing else.

        Args:
            transfer_spec: LMCache's ``DisaggSpec``, or None.
        """
        short, self._short, self._unsent = self._short, False, 0
        if short and transfer_spec is not None and self._sender is not None:
            self._sender.nothing_stored(transfer_spec)

    def cancel_request(self, req_id: str) -> None:
        """Gives up a request's hand-off.

        Args:
            req_id: The id that the proxy gave it.
        """
        if self._sender is not None:
            self._sender.cancel(req_id)

    # ---- a decoder's chunks come ----

    def contains(self, key: Any, pin: bool = False) -> bool:
        """Returns whether a chunk is here, or can be read from its prefiller.

        Args:
            key: LMCache's key.
            pin: Means nothing here: a chunk stays until it is taken, or its deadline passes.
        """
        return self._receiver is not None and self._receiver.ledger.contains(key)

    def exists_in_put_tasks(self, key: Any) -> bool:
        """Returns False: a chunk that is on its way is not here."""
        return False

    def get_blocking(self, key: Any) -> Any:
        """Lends one chunk, or returns None."""
        return self.batched_get_blocking([key])[0]

    def batched_get_blocking(self, keys: Sequence[Any]) -> list[Any]:
        """Lends chunks up to the first that is not there; the rest is None.

        Args:
            keys: LMCache's keys.
        """
        if self._receiver is None:
            return [None] * len(keys)
        return self._receiver.get(keys)

    def remove(self, key: Any, force: bool = True) -> bool:
        """Frees a chunk that was lent.

        Args:
            key: LMCache's key.
            force: Means nothing here.
        """
        return self._receiver is not None and self._receiver.ledger.remove(key)

    def pin(self, key: Any) -> bool:
        """Returns whether the chunk is here; nothing is ever evicted."""
        return self.contains(key)

    def unpin(self, key: Any) -> bool:
        """Returns whether the chunk is here; nothing is ever evicted."""
        return self.contains(key)

    def touch_cache(self) -> None:
        """Nothing: there is no eviction policy."""

    # ---- state and end ----

    def held(self) -> dict[str, int]:
        """Returns pages and hand-offs at this moment, for metrics and tests."""
        if self._receiver is not None:
            return self._receiver.ledger.held()
        assert self._sender is not None
        return {"free": self.buffer.free_pages, **self._sender.held()}

    def close(self) -> None:
        """Ends everything; idempotent."""
        with self._freed:
            if self._closed:
                return
            self._closed = True
            self._freed.notify_all()
        self._loop.close(self.options.shutdown_timeout)
        self.endpoint.close()
        self._notifier.close()
        self.buffer.close()


def _chunk(metadata: Any) -> tuple[torch.Size, torch.dtype, MemoryFormat]:
    """Returns shape, dtype and format of a full chunk's memory object."""
    tokens = int(metadata.kv_shape[2])
    shapes, dtypes = metadata.get_shapes(tokens), metadata.get_dtypes()
    if len(shapes) != 1:
        raise ConfigError(f"this model's KV has {len(shapes)} groups of layers; kvlink's PD backend takes one")
    fmt = MemoryFormat.KV_MLA_FMT if metadata.use_mla else MemoryFormat.KV_2LTD
    return torch.Size(shapes[0]), dtypes[0], fmt
