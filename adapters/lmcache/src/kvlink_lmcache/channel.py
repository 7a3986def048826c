"""LMCache's transfer channel on a kvlink channel, for its own PD and P2P backends."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
from lmcache.v1.transfer_channel.abstract import BaseTransferChannel
from lmcache.v1.transfer_channel.transfer_utils import SideMsg

import kvlink
from kvlink.errors import ConfigError
from kvlink.registry import device_for

from . import context, settings
from .endpoint import REGION, Endpoint, page_table
from .log import get_logger

_log = get_logger()


class KVLinkChannel(BaseTransferChannel):  # type: ignore[misc]
    """What LMCache's backends call. The buffer is one region, a chunk is a page, a batch is one kvlink transfer.

    The handshake is kvlink's; both sides can use the connection whichever made it, and a lost one is made again where
    this side made it. Errors are raised, not returned as a smaller number, which LMCache's async backend ignores.

    Attributes:
        endpoint: The channel beneath.
        peer_lookup_url: What LMCache's ``handle_init_side_msg`` tells peers (P2P only).
    """

    def __init__(
        self,
        *,
        channel_type: str,
        role: str,
        buffer_ptr: int,
        buffer_size: int,
        align_bytes: int,
        tp_rank: int,
        peer_init_url: str | None,
        device: str | None = None,
        async_mode: bool = False,
        **extra: Any,
    ) -> None:
        """Opens the channel and registers the whole buffer.

        Args:
            channel_type: A provider's name, or "auto".
            role: "sender", "receiver" or "both"; only said in the log.
            buffer_ptr: Where the buffer starts.
            buffer_size: Its bytes.
            align_bytes: Bytes of a page: one full chunk.
            tp_rank: This rank.
            peer_init_url: "host:port" to listen on, or None for any free port on loopback or ``kvlink.listen``.
            device: LMCache's device of the buffer.
            async_mode: Which of the two call forms LMCache will use; both work.
            extra: ``peer_lookup_url`` for P2P; LMCache's ``backends`` and ``event_loop`` mean nothing here.

        Raises:
            ConfigError: A wrong key, an address that cannot be bound, no secret beyond loopback.
            ChannelUnavailableError: This host cannot use the provider.
        """
        known = context.current()
        config = known.config if known is not None else None
        adapter = settings.adapter_settings(config)
        identity = settings.identity(config, known.metadata) if known is not None else {}
        memory = device or "cpu"
        where = device_for(channel_type, memory, tp_rank)
        channel = kvlink.open_from_config(
            settings.channel_config(channel_type, listen=peer_init_url, device=where, identity=identity)
        )
        try:
            region = channel.register((buffer_ptr, buffer_size, memory), name=REGION)
            self.endpoint = Endpoint(
                channel,
                region,
                align_bytes,
                connect_timeout=adapter.connect_timeout,
                transfer_timeout=adapter.transfer_timeout,
            )
        except BaseException:
            channel.close()
            raise
        self.endpoint.answer_side = self._answer_side
        self.peer_lookup_url = extra.get("peer_lookup_url")
        _log.info(
            "channel %s for LMCache: %s, rank %d, %s, %d pages of %d bytes",
            channel.name,
            role,
            tp_rank,
            channel.address,
            self.endpoint.pages,
            align_bytes,
        )

    # ---- the handshake ----

    def lazy_init_peer_connection(
        self, local_id: str, peer_id: str, peer_init_url: str, init_side_msg: Any = None
    ) -> Any:
        """Connects to a peer unless that was done, and exchanges LMCache's side messages.

        Args:
            local_id: The id under which the peer shall know this side.
            peer_id: The id under which this side knows the peer.
            peer_init_url: "host:port".
            init_side_msg: LMCache's message, or None.

        Returns:
            LMCache's answer to it, or None.

        Raises:
            ConnectError: It cannot be reached in time, or the two sides do not fit together; says which value differs.
        """
        side = b"" if init_side_msg is None else msgspec.msgpack.encode(init_side_msg)
        return _side(self.endpoint.connect(local_id, peer_id, peer_init_url, side))

    async def async_lazy_init_peer_connection(
        self, local_id: str, peer_id: str, peer_init_url: str, init_side_msg: Any = None
    ) -> Any:
        """As :meth:`lazy_init_peer_connection`, without blocking the running loop."""
        side = b"" if init_side_msg is None else msgspec.msgpack.encode(init_side_msg)
        return _side(await self.endpoint.connect_async(local_id, peer_id, peer_init_url, side))

    def remote_xfer_handler_exists(self, receiver_or_sender_id: str) -> bool:
        """Returns whether transfers with that id are possible now."""
        return self.endpoint.knows(receiver_or_sender_id)

    def _answer_side(self, body: bytes) -> bytes:
        message = msgspec.msgpack.decode(body, type=SideMsg)
        return msgspec.msgpack.encode(self.handle_init_side_msg(message))

    # ---- transfers ----

    def get_local_mem_indices(self, objects: Sequence[Any]) -> list[int]:
        """Returns the page numbers of memory objects."""
        if not objects:
            return []
        pages: list[int] = page_table(objects, self.endpoint.page_bytes)[0].tolist()
        return pages

    def batched_write(self, objects: Sequence[Any], transfer_spec: dict[str, Any] | None = None) -> int:
        """Writes memory objects into a peer's pages and waits for the end.

        Args:
            objects: Memory objects of the registered buffer.
            transfer_spec: ``receiver_id`` and ``remote_indexes``, one page for each object.

        Returns:
            The number of objects.

        Raises:
            KvlinkError: It failed; nothing of it moves any more.
        """
        return self._wait("put", objects, transfer_spec)

    def batched_read(self, buffers: Sequence[Any], transfer_spec: dict[str, Any] | None = None) -> int:
        """Reads a peer's pages into memory objects and waits for the end.

        Args:
            buffers: Memory objects of the registered buffer.
            transfer_spec: ``sender_id`` and ``remote_indexes``, one page for each object.

        Returns:
            The number of objects.

        Raises:
            KvlinkError: It failed; nothing of it moves any more.
        """
        return self._wait("get", buffers, transfer_spec)

    async def async_batched_write(self, objects: Sequence[Any], transfer_spec: dict[str, Any] | None = None) -> int:
        """As :meth:`batched_write`, awaited; a cancelled call returns only when no byte moves any more."""
        return await self._await("put", objects, transfer_spec)

    async def async_batched_read(self, buffers: Sequence[Any], transfer_spec: dict[str, Any] | None = None) -> int:
        """As :meth:`batched_read`, awaited; a cancelled call returns only when no byte moves any more."""
        return await self._await("get", buffers, transfer_spec)

    def _wait(self, what: str, objects: Sequence[Any], spec: dict[str, Any] | None) -> int:
        peer_id, remote = _spec(what, spec)
        if not objects and not remote:
            return 0
        peer = self.endpoint.peer(peer_id)
        transfer = self._start(what, peer, objects, remote)
        self._drained(transfer)
        self.endpoint.trace(what, peer, transfer)
        return len(objects)

    async def _await(self, what: str, objects: Sequence[Any], spec: dict[str, Any] | None) -> int:
        peer_id, remote = _spec(what, spec)
        if not objects and not remote:
            return 0
        peer = await self.endpoint.peer_async(peer_id)
        transfer = self._start(what, peer, objects, remote)
        await settled(transfer)
        self.endpoint.trace(what, peer, transfer)
        return len(objects)

    @staticmethod
    def _drained(transfer: kvlink.Transfer) -> None:
        """Waits for a transfer; whatever interrupts that, no byte moves any more when this returns or raises."""
        try:
            transfer.wait()
        except BaseException:  # Ctrl-C too: the caller frees the pages next
            transfer.cancel()
            _drain(transfer)
            raise

    def _start(self, what: str, peer: kvlink.Peer, objects: Sequence[Any], remote: Sequence[int]) -> kvlink.Transfer:
        pages, sizes = page_table(objects, self.endpoint.page_bytes)
        blocks = self.endpoint.blocks(peer, pages, remote, sizes)
        start = peer.put if what == "put" else peer.get
        return start(blocks, timeout=self.endpoint.transfer_timeout)

    # ---- what no backend calls ----

    def batched_send(self, objects: Sequence[Any], transfer_spec: dict[str, Any] | None = None) -> int:
        """Not offered: kvlink is one-sided."""
        raise NotImplementedError("kvlink channels read and write; they have no paired send and receive")

    def batched_recv(self, buffers: Sequence[Any], transfer_spec: dict[str, Any] | None = None) -> int:
        """Not offered: kvlink is one-sided."""
        raise NotImplementedError("kvlink channels read and write; they have no paired send and receive")

    async def async_batched_send(self, objects: Sequence[Any], transfer_spec: dict[str, Any] | None = None) -> int:
        """Not offered: kvlink is one-sided."""
        raise NotImplementedError("kvlink channels read and write; they have no paired send and receive")

    async def async_batched_recv(self, buffers: Sequence[Any], transfer_spec: dict[str, Any] | None = None) -> int:
        """Not offered: kvlink is one-sided."""
        raise NotImplementedError("kvlink channels read and write; they have no paired send and receive")

    def close(self) -> None:
        """Ends every connection and transfer; the buffer may be freed afterwards. Idempotent."""
        self.endpoint.close()


def create_transfer_channel(
    channel_type: str,
    async_mode: bool,
    role: str,
    buffer_ptr: int,
    buffer_size: int,
    align_bytes: int,
    tp_rank: int,
    peer_init_url: str | None,
    device: str | None = None,
    **extra: Any,
) -> KVLinkChannel:
    """LMCache's ``CreateTransferChannel`` for kvlink's names; the same arguments.

    Args:
        channel_type: A provider's name, or "auto".
        async_mode: See :class:`KVLinkChannel`, also for the others.
        role: "sender", "receiver" or "both".
        buffer_ptr: Where the buffer starts.
        buffer_size: Its bytes.
        align_bytes: Bytes of a page.
        tp_rank: This rank.
        peer_init_url: "host:port" to listen on, or None.
        device: LMCache's device of the buffer.
        extra: Further keywords of LMCache.

    Returns:
        The channel.

    Raises:
        ConfigError: See :class:`KVLinkChannel`.
    """
    return KVLinkChannel(
        channel_type=channel_type,
        async_mode=async_mode,
        role=role,
        buffer_ptr=buffer_ptr,
        buffer_size=buffer_size,
        align_bytes=align_bytes,
        tp_rank=tp_rank,
        peer_init_url=peer_init_url,
        device=device,
        **extra,
    )


async def settled(transfer: kvlink.Transfer) -> None:
    """Awaits a transfer; when the task is cancelled, stops the transfer and returns only after its end.

    Args:
        transfer: The transfer.

    Raises:
        KvlinkError: It failed.
        asyncio.CancelledError: The task was cancelled; the transfer has ended.
    """
    try:
        await transfer
    except asyncio.CancelledError:
        transfer.cancel()
        loop = asyncio.get_running_loop()
        await asyncio.shield(loop.run_in_executor(None, _drain, transfer))
        raise


def _drain(transfer: kvlink.Transfer) -> None:
    """Waits for the end of a transfer that was told to stop; how it ended does not matter."""
    try:
        transfer.wait()
    except Exception as error:
        _log.debug("a stopped transfer ended: %s", error)


def _spec(what: str, spec: dict[str, Any] | None) -> tuple[str, Sequence[int]]:
    """Reads LMCache's transfer_spec."""
    key = "receiver_id" if what == "put" else "sender_id"
    if not spec or key not in spec or "remote_indexes" not in spec:
        raise ConfigError(f"transfer_spec is {spec!r}; expected the keys {key!r} and 'remote_indexes'")
    return str(spec[key]), spec["remote_indexes"]


def _side(answer: bytes) -> Any:
    """Decodes LMCache's answer to a side message."""
    return msgspec.msgpack.decode(answer, type=SideMsg) if answer else None
