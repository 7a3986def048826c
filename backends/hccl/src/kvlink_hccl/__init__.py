"""kvlink's channel ``hccl``: HCCL's one-sided service on Ascend NPUs, CANN 8.3 and later."""

from __future__ import annotations

import os
from pathlib import Path

from kvlink.registry import Option, ProviderSpec


def _library() -> Path:
    """The provider's library: in ``$KVLINK_NATIVE_DIR`` when it is there (a checkout), else in this package."""
    name = "libkvlink_hccl.so"
    override = Path(os.environ.get("KVLINK_NATIVE_DIR", ""), name)
    return override if override.is_file() else Path(__file__).resolve().parent / "_native" / name


SPEC = ProviderSpec(
    name="hccl",
    library=_library,
    priority=60,
    devices=("npu",),
    exclusion_group="ascend",
    summary="Ascend NPUs over HCCL's one-sided service (CANN 8.3 and later)",
    options=(
        Option(
            "link",
            "str",
            "auto",
            "what the link between two devices has to be; auto takes what HCCL makes of it",
            choices=("auto", "roce", "hccs"),
        ),
        Option("device_port", "int", None, "port of the device's NIC, when 16666 is taken (by torch.distributed)"),
        Option("device_ip", "str", None, "address of the device's NIC; default: /etc/hccn.conf, then hccn_tool"),
        Option("server_id", "str", None, "name of this server; peers with the same one count as one server"),
        Option("streams", "int", None, "transfers of one peer on the device at once; default 2"),
        Option("super_device_id", "int", None, "SDID of an A3 in a super-pod, where CANN does not tell it"),
        Option("super_pod_id", "int", None, "super-pod of an A3, where CANN does not tell it"),
        Option("max_in_flight", "int", None, "transfers of one peer accepted at once; default 64"),
        Option("host_staging", "size", None, "bytes of pinned memory through which other host memory moves; 0 = off"),
        Option("host_staging_links", "int", None, "peers that the staging area serves at once; default 8"),
        Option("bind_host", "str", None, "set by the core: host of the control listener"),
        Option("advertise_host", "str", None, "set by the core: host that peers use"),
        Option("peer_timeout_ms", "int", None, "set by the core: silence of a peer's host that ends a connection"),
    ),
)

__all__ = ["SPEC"]
