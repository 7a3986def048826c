"""The factory: two names, and buffers as lists."""

from typing import Any


class HcclChannel:
    """Stands for the channel that LMCache-Ascend would build."""

    def __init__(self, channel_type: str) -> None:
        self.channel_type = channel_type

    def close(self) -> None:
        """Nothing."""


def CreateTransferChannel(
    channel_type: str,
    async_mode: bool,
    role: str,
    buffer_ptr: Any,
    buffer_size: Any,
    align_bytes: Any,
    tp_rank: int,
    peer_init_url: str,
    **kwargs: Any,
) -> Any:
    """Builds one of its own channels."""
    assert channel_type in ["hccl", "hixl", "host"], f"Unsupported channel type: {channel_type}"
    return HcclChannel(channel_type)
