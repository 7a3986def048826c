"""For LMCache's own test files: kvlink's channels where they build NIXL's or their in-memory mock."""

from __future__ import annotations

import sys
import types
from typing import Any

from kvlink_lmcache import registration

# Its test files skip themselves without the package; no function of it is called with kvlink's channel in its place.
sys.modules.setdefault("nixl", types.ModuleType("nixl"))
registration.register()

built: list[str] = []


def pytest_configure() -> None:
    """Puts kvlink's channels in place before the test files import theirs."""
    from lmcache.v1 import transfer_channel

    original = transfer_channel.CreateTransferChannel

    def create(channel_type: str, *args: Any, **kwargs: Any) -> Any:
        built.append(channel_type)
        return original("host" if channel_type in ("mock_memory", "nixl") else channel_type, *args, **kwargs)

    transfer_channel.CreateTransferChannel = create
    for user in ("pd_backend", "pd_backend_async", "p2p_backend"):
        module = sys.modules.get(f"lmcache.v1.storage_backend.{user}")
        if module is not None:
            module.CreateTransferChannel = create
    try:
        from lmcache.v1.distributed.transfer_channel.impl import nixl_impl
    except ImportError:  # LMCache 0.4 has no such mode
        return
    from kvlink_lmcache.mp.context import KVLinkTransferChannelContext

    class Context(KVLinkTransferChannelContext):
        """NIXL's constructor, kvlink's host provider."""

        def __init__(self, desc: Any, listen_url: str, advertise_url: str, backends: Any = None) -> None:
            built.append("server")
            super().__init__(desc, listen_url, advertise_url, transfer_channel="host")

    nixl_impl.NixlTransferChannelContext = Context


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Says how many channels of kvlink's the tests have built."""
    terminalreporter.write_line(f"kvlink channels built: {len(built)}")
