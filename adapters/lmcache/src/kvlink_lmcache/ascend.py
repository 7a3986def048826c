"""LMCache-Ascend's channel contract on kvlink: buffers by id and page, and reads that return an event.

LMCache-Ascend's own backends stay; only the channel that its factory builds is kvlink's, for every name that kvlink
offers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

import kvlink
from kvlink.errors import ConfigError
from kvlink.registry import device_for

from . import context, settings
from .channel import KVLinkChannel, settled
from .endpoint import REGION, Endpoint
from .log import get_logger

_log = get_logger()


@dataclass(frozen=True)
class Buffer:
    """One registered buffer.

    Attributes:
        id: What peers call it; unique in this channel, and tells its page size.
        address: Where it starts.
        nbytes: Its bytes.
        page_bytes: Bytes of a page.
        region: The registered memory.
    """

    id: str
    address: int
    nbytes: int
    page_bytes: int
    region: kvlink.Region


class TransferEvent:
    """Stands for a device event: recorded when a read was submitted, reached when it has ended."""

    def __init__(self, transfer: kvlink.Transfer | None) -> None:
        self._transfer = transfer

    def query(self) -> bool:
        """Returns whether the read has ended."""
        return self._transfer is None or self._transfer.done()

    def synchronize(self) -> None:
        """Waits for the end.

        Raises:
            KvlinkError: It failed.
        """
        if self._transfer is not None:
            self._transfer.wait()

    def wait(self, stream: Any = None) -> None:
        """Makes a stream wait: the host waits, which is no later for what is put on the stream afterwards."""
        self.synchronize()


class AscendChannel(KVLinkChannel):
    """A channel for ``AscendPDBackend`` and ``AscendP2PBackend``.

    Attributes:
        handle_device: The device index that LMCache-Ascend sets in its threads.
        page_size: Bytes of a page of the first buffer.
    """

    def __init__(
        self,
        *,
        channel_type: str,
        role: str,
        tp_rank: int,
        peer_init_url: str | None,
        buffer_ptr: Any = None,
        buffer_size: Any = None,
        align_bytes: Any = None,
        buffer_type: Any = None,
        buffers: Sequence[Any] | None = None,
        async_mode: bool = False,
        **extra: Any,
    ) -> None:
        """Opens the channel and registers every buffer.

        Args:
            channel_type: A provider's name, or "auto".
            role: "sender", "receiver" or "both".
            tp_rank: This rank.
            peer_init_url: "host:port" to listen on, or None.
            buffer_ptr: Where the buffer starts, or a list.
            buffer_size: Its bytes, or a list.
            align_bytes: Bytes of a page, or a list.
            buffer_type: "cpu" or "npu", LMCache-Ascend's ``BufferType``, or a list; None for "cpu".
            buffers: Instead of these four, LMCache-Ascend's ``BufferConfig`` objects.
            async_mode: Both call forms work.
            extra: ``peer_lookup_url``; the rest means nothing here.

        Raises:
            ConfigError: The lists differ in length, or a buffer holds no page.
        """
        wanted = _buffers(buffers, buffer_ptr, buffer_size, align_bytes, buffer_type)
        known = context.current()
        config = known.config if known is not None else None
        own = settings.adapter_settings(config)
        self.handle_device = _current_device(tp_rank)
        memory = f"npu:{self.handle_device}" if any(kind == "npu" for *_, kind in wanted) else "cpu"
        device = device_for(channel_type, memory, self.handle_device)
        channel = kvlink.open_from_config(
            settings.channel_config(
                channel_type,
                listen=peer_init_url,
                device=device,
                identity=settings.identity(config, known.metadata) if known is not None else {},
            )
        )
        try:
            self._buffers: list[Buffer] = []
            for number, (address, nbytes, page_bytes, kind) in enumerate(wanted):
                name = REGION if number == 0 else f"{REGION}-{number}:{page_bytes}"
                where = "cpu" if kind == "cpu" else memory
                region = channel.register((address, nbytes, where), name=name)
                self._buffers.append(Buffer(name, address, nbytes, page_bytes, region))
            self.endpoint = Endpoint(
                channel,
                self._buffers[0].region,
                self._buffers[0].page_bytes,
                connect_timeout=own.connect_timeout,
                transfer_timeout=own.transfer_timeout,
            )
        except BaseException:
            channel.close()
            raise
        self.page_size = self._buffers[0].page_bytes
        self.endpoint.answer_side = self._answer_side
        self.peer_lookup_url = extra.get("peer_lookup_url")
        sizes = ", ".join(str(buffer.nbytes) for buffer in self._buffers)
        _log.info("channel %s for LMCache-Ascend: %s, rank %d, buffers of %s bytes", channel.name, role, tp_rank, sizes)

    def get_local_buffer_refs(self, objects: Sequence[Any]) -> tuple[list[str], list[int]]:
        """Returns buffer id and page of memory objects, for a peer to use.

        Args:
            objects: LMCache's memory objects in one of the buffers.

        Raises:
            ValueError: One is in none of them.
        """
        found = [self._local(item) for item in objects]
        return [buffer.id for buffer, _ in found], [offset // buffer.page_bytes for buffer, offset in found]

    def submit_batched_read(self, buffers: Sequence[Any], transfer_spec: dict[str, Any] | None = None) -> TransferEvent:
        """Starts to read and returns at once.

        Args:
            buffers: Memory objects to read into.
            transfer_spec: As for ``batched_read``.

        Returns:
            An event for the end.

        Raises:
            KvlinkError: It could not be started.
        """
        peer_id = _peer_id(transfer_spec)
        if not buffers:
            return TransferEvent(None)
        return TransferEvent(self._submit("get", self.endpoint.peer(peer_id), buffers, transfer_spec or {}))

    # ---- LMCache's own calls, with LMCache-Ascend's addresses ----

    def _wait(self, what: str, objects: Sequence[Any], spec: dict[str, Any] | None) -> int:
        peer_id = _peer_id(spec)
        if objects:
            peer = self.endpoint.peer(peer_id)
            transfer = self._submit(what, peer, objects, spec or {})
            self._drained(transfer)
            self.endpoint.trace(what, peer, transfer)
        return len(objects)

    async def _await(self, what: str, objects: Sequence[Any], spec: dict[str, Any] | None) -> int:
        peer_id = _peer_id(spec)
        if objects:
            peer = await self.endpoint.peer_async(peer_id)
            transfer = self._submit(what, peer, objects, spec or {})
            await settled(transfer)
            self.endpoint.trace(what, peer, transfer)
        return len(objects)

    def _submit(self, what: str, peer: kvlink.Peer, objects: Sequence[Any], spec: dict[str, Any]) -> kvlink.Transfer:
        blocks = self._ranges(peer, objects, spec)
        start = peer.put if what == "put" else peer.get
        return start(blocks, stream=self._stream(spec.get("stream")), timeout=self.endpoint.transfer_timeout)

    def _stream(self, stream: Any) -> int | None:
        """Returns the stream for the provider, or waits for it where the provider takes none."""
        if stream is None:
            return None
        if kvlink.Capability.STREAM in self.endpoint.channel.capabilities:
            return int(stream if isinstance(stream, int) else stream.npu_stream)
        if hasattr(stream, "synchronize"):
            stream.synchronize()
        return None

    def _ranges(self, peer: kvlink.Peer, objects: Sequence[Any], spec: dict[str, Any]) -> npt.NDArray[np.void]:
        names, pages = _remote(spec)
        if len(names) != len(objects) or len(pages) != len(objects):
            raise ConfigError(f"{len(objects)} objects here do not pair with {len(pages)} pages there")
        out = np.empty(len(objects), dtype=kvlink.RANGE)
        regions = peer.regions
        for index, item in enumerate(objects):
            buffer, offset = self._local(item)
            if names[index] not in regions:
                raise ValueError(f"buffer {names[index]!r} is none of the peer's: {', '.join(sorted(regions))}")
            page_bytes = _page_bytes(names[index], self.page_size)
            length = min(int(item.raw_data.nbytes), buffer.page_bytes)
            if length > page_bytes:
                raise ConfigError(f"an object of {length} bytes exceeds the peer's page of {page_bytes} bytes")
            if pages[index] < 0 or (pages[index] + 1) * page_bytes > regions[names[index]].nbytes:
                raise IndexError(f"page {pages[index]} is outside buffer {names[index]!r} of the peer")
            handles = (buffer.region.handle, regions[names[index]].handle)
            out[index] = (*handles, offset, pages[index] * page_bytes, length)
        return out

    def _local(self, item: Any) -> tuple[Buffer, int]:
        address = int(item.data_ptr)
        for buffer in self._buffers:
            if buffer.address <= address < buffer.address + buffer.nbytes:
                return buffer, address - buffer.address
        raise ValueError(f"the object at {address:#x} is in none of the {len(self._buffers)} registered buffers")


def create_transfer_channel(channel_type: str, *arguments: Any, **keywords: Any) -> AscendChannel:
    """LMCache-Ascend's ``CreateTransferChannel`` for kvlink's names.

    Args:
        channel_type: A provider's name, or "auto".
        arguments: async_mode, role, buffer_ptr, buffer_size, align_bytes, tp_rank, peer_init_url, in this order.
        keywords: The same by name, and ``buffer_type``, ``buffers``, ``peer_lookup_url``, ...

    Raises:
        ConfigError: See :class:`AscendChannel`.
    """
    order = ("async_mode", "role", "buffer_ptr", "buffer_size", "align_bytes", "tp_rank", "peer_init_url")
    return AscendChannel(channel_type=channel_type, **dict(zip(order, arguments, strict=False)), **keywords)


def wanted(channel_type: Any) -> bool:
    """Tells whether kvlink builds the channel of a name that LMCache-Ascend may offer too.

    Args:
        channel_type: The value of ``transfer_channel``.
    """
    from kvlink import registry

    known = context.current()
    if settings.adapter_settings(known.config if known is not None else None).ascend == "lmcache_ascend":
        return False
    return channel_type == "auto" or channel_type in {info.name for info in registry.channels()}


def _buffers(
    buffers: Sequence[Any] | None, pointer: Any, size: Any, align: Any, kind: Any
) -> list[tuple[int, int, int, str]]:
    """Returns address, bytes, page bytes and "cpu" or "npu" of every buffer."""
    if buffers is not None:
        found = [(int(item.ptr), int(item.size), int(item.align_bytes), _kind(item.device_type)) for item in buffers]
    else:
        pointers, sizes, aligns = _list(pointer), _list(size), _list(align)
        kinds = _list(kind) if kind is not None else ["cpu"] * len(pointers)
        lengths = {len(pointers), len(sizes), len(aligns), len(kinds)}
        if len(lengths) != 1:
            raise ConfigError(
                f"{len(pointers)} buffer pointers, {len(sizes)} sizes, {len(aligns)} alignments, {len(kinds)} types; "
                "there must be as many of each"
            )
        found = [
            (int(where), int(nbytes), int(page), _kind(name))
            for where, nbytes, page, name in zip(pointers, sizes, aligns, kinds, strict=True)
        ]
    if not found:
        raise ConfigError("a channel needs at least one buffer")
    return found


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _kind(value: Any) -> str:
    text = str(getattr(value, "name", value)).lower().split(":")[0]
    if text not in ("cpu", "npu"):
        raise ConfigError(f"buffer_type is {value!r}; expected cpu or npu")
    return text


def _page_bytes(name: str, first: int) -> int:
    """Returns the page size of a peer's buffer; that of the first one was compared at the greeting."""
    _, colon, text = name.rpartition(":")
    return int(text) if colon else first


def _remote(spec: dict[str, Any]) -> tuple[Sequence[str], Sequence[int]]:
    """Reads where the peer's pages are."""
    names = spec.get("remote_buffer_uuids")
    pages = spec.get("remote_mem_indexes", spec.get("remote_indexes"))
    if pages is None:
        keys = ", ".join(sorted(spec))
        raise ConfigError(f"transfer_spec has {keys}; expected remote_mem_indexes or remote_indexes")
    return (names if names is not None else [REGION] * len(pages)), pages


def _peer_id(spec: dict[str, Any] | None) -> str:
    found = (spec or {}).get("receiver_id") or (spec or {}).get("sender_id")
    if not found:
        raise ConfigError(f"transfer_spec is {spec!r}; expected a receiver_id or sender_id")
    return str(found)


def _current_device(rank: int) -> int:
    """Returns the NPU of this thread, or the rank where there is none."""
    import torch

    npu = getattr(torch, "npu", None)
    return int(npu.current_device()) if npu is not None and npu.is_available() else rank
