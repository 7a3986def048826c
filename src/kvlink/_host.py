"""What the embedded default provider, ``host``, says about itself."""

from __future__ import annotations

from ._native import library_path
from .registry import Option, ProviderSpec

SPEC = ProviderSpec(
    name="host",
    library=lambda: library_path("host"),
    priority=10,
    devices=("cpu",),
    summary="host memory over shared memory, cross-memory attach or TCP; works on any Linux",
    options=(
        Option(
            "path",
            "str",
            "auto",
            "how bytes travel; auto takes the fastest that works between the two processes",
            choices=("auto", "shm", "cma", "tcp"),
        ),
        Option("streams", "int", 2, "TCP connections per peer"),
        Option("tcp_host", "str", None, "host that TCP data connections use; default: the control listener's"),
        Option("tcp_port", "int", None, "port of the TCP data listener; default: a free one"),
        Option("threads", "int", 0, "extra copy threads; 0 chooses"),
        Option("copy_slice", "size", None, "bytes copied at most in one go before other transfers get their turn"),
        Option("bind_host", "str", None, "set by the core: host of the control listener"),
        Option("advertise_host", "str", None, "set by the core: host that peers use"),
        Option("peer_timeout_ms", "int", None, "set by the core: silence of a peer's host that ends a TCP connection"),
    ),
)
