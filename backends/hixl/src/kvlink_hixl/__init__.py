"""kvlink's channel ``hixl``: HIXL on Ascend NPUs, CANN 8.5 and later."""

from __future__ import annotations

import os
from pathlib import Path

from kvlink.registry import Option, ProviderSpec


def _library() -> Path:
    """The provider's library: in ``$KVLINK_NATIVE_DIR`` when it is there (a checkout), else in this package."""
    name = "libkvlink_hixl.so"
    override = Path(os.environ.get("KVLINK_NATIVE_DIR", ""), name)
    return override if override.is_file() else Path(__file__).resolve().parent / "_native" / name


SPEC = ProviderSpec(
    name="hixl",
    library=_library,
    priority=50,
    devices=("npu",),
    exclusion_group="ascend",
    summary="Ascend NPUs over HIXL (CANN 8.5 and later; experimental)",
    options=(
        Option(
            "link",
            "str",
            "auto",
            "what the link between two devices has to be; auto takes what HCCL makes of it",
            choices=("auto", "roce", "hccs"),
        ),
        Option("engine_host", "str", None, "IP address HIXL serves at and is known by; default: the advertised host's"),
        Option("engine_port", "int", None, "port HIXL serves at; default: a free one"),
        Option("rdma_traffic_class", "int", None, "RoCE traffic class, a multiple of 4; default: HCCL_RDMA_TC"),
        Option("rdma_service_level", "int", None, "RoCE service level, 0 to 7; default: HCCL_RDMA_SL"),
        Option("host_limit", "size", None, "host memory that may be registered; default: what the driver is known for"),
        Option("max_in_flight", "int", None, "transfers of one peer accepted at once; default 64"),
        Option("host_staging", "size", None, "bytes of pinned memory through which other host memory moves; 0 = off"),
        Option("host_staging_links", "int", None, "peers that the staging area serves at once; default 8"),
        Option("bind_host", "str", None, "set by the core: host of the control listener"),
        Option("advertise_host", "str", None, "set by the core: host that peers use"),
        Option("peer_timeout_ms", "int", None, "set by the core: silence of a peer's host that ends a connection"),
    ),
)

__all__ = ["SPEC"]
