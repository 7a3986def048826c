"""A PD backend as far as it deals with its channel."""

from typing import Any

from lmcache_ascend.v1.transfer_channel import CreateTransferChannel


class AscendPDBackend:
    """Builds a channel over several buffers, and moves chunks by (buffer id, page)."""

    def __init__(self, config: Any, metadata: Any, buffers: Any, url: str, role: str) -> None:
        self.transfer_channel = CreateTransferChannel(
            channel_type=config.transfer_channel,
            async_mode=False,
            role=role,
            buffer_ptr=[item.data_ptr() for item in buffers],
            buffer_size=[item.numel() for item in buffers],
            buffer_type=["cpu"] * len(buffers),
            align_bytes=[4096] * len(buffers),
            tp_rank=metadata.worker_id,
            peer_init_url=url,
        )

    def allocate_and_put(self, objects: Any) -> tuple[list[str], list[int]]:
        """What the receiver answers to an allocation request."""
        refs: tuple[list[str], list[int]] = self.transfer_channel.get_local_buffer_refs(objects)
        return refs

    def push(self, receiver: str, url: str, objects: Any, refs: tuple[list[str], list[int]]) -> int:
        """What the sender does with it."""
        self.transfer_channel.lazy_init_peer_connection(local_id="p", peer_id=receiver, peer_init_url=url)
        uuids, pages = refs
        spec = {"receiver_id": receiver, "remote_buffer_uuids": uuids, "remote_mem_indexes": pages}
        count: int = self.transfer_channel.batched_write(objects=objects, transfer_spec=spec)
        return count

    def pull(self, sender: str, objects: Any, refs: tuple[list[str], list[int]]) -> Any:
        """What a pulling receiver does: submit, and wait for the event."""
        uuids, pages = refs
        spec = {"receiver_id": sender, "remote_buffer_uuids": uuids, "remote_mem_indexes": pages}
        event = self.transfer_channel.submit_batched_read(buffers=objects, transfer_spec=spec)
        event.synchronize()
        return event
