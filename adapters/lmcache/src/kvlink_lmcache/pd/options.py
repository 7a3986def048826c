"""What LMCache's and LMCache-Ascend's ``pd_*`` keys say, checked at start."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvlink.errors import ConfigError

from .. import settings

PUSH, PULL, DELAYED = "push", "pull", "delayed pull"


@dataclass(frozen=True)
class PDOptions:
    """One rank's part of a PD configuration.

    Attributes:
        role: "sender" or "receiver".
        mode: "push", "pull" or "delayed pull".
        rank: This rank.
        world_size: Ranks of the engine.
        listen: "host:port" of this rank's channel, or None for any.
        buffer_bytes: Size of the PD buffer.
        device: Where it is: "cpu", "npu:0".
        device_index: This rank's NPU among those that the process sees.
        proxy: "host:port" of the proxy, or None where nobody is told.
        pending_ttl: Seconds that chunks wait for whoever needs them.
        backoff: Seconds for which a decoder that failed is not tried again.
        reserve: Free share of the buffer below which a pulling prefiller offers nothing more.
        connect_timeout: Seconds to connect.
        transfer_timeout: Seconds for one batch.
        alloc_timeout: Seconds to wait for room.
        idle_timeout: Seconds after which a hand-off is given up that neither goes on nor ends.
        shutdown_timeout: Seconds to end.
        failure_notification: Tell the proxy of failures.
        engine_counts: LMCache's engine drops a reference of its own after ``remove``.
    """

    role: str
    mode: str
    rank: int
    world_size: int
    listen: str | None
    buffer_bytes: int
    device: str
    device_index: int
    proxy: str | None
    pending_ttl: float
    backoff: float
    reserve: float
    connect_timeout: float
    transfer_timeout: float
    alloc_timeout: float
    idle_timeout: float
    shutdown_timeout: float
    failure_notification: bool
    engine_counts: bool


def read(config: Any, metadata: Any) -> PDOptions:
    """Reads and checks the keys of one rank.

    Args:
        config: LMCache's configuration, with LMCache-Ascend's keys.
        metadata: LMCache's metadata.

    Raises:
        ConfigError: A key is missing, too short for the ranks, or contradicts another.
    """
    own = settings.adapter_settings(config)
    role, rank, ranks = config.pd_role, int(metadata.worker_id), int(metadata.world_size)
    if role not in ("sender", "receiver"):
        raise ConfigError(f"pd_role is {role!r}; kvlink's PD backend takes 'sender' or 'receiver'")
    mode = _mode(config)
    offload = role == "sender" and bool(getattr(config, "pd_use_cpu_offload", False))
    size = config.pd_buffer_size
    if offload:
        size = getattr(config, "pd_cpu_buffer_size", None) or size
    if not isinstance(size, int) or size <= 0:
        raise ConfigError(f"pd_buffer_size is {size!r}; expected bytes, for instance 2415919104")
    timeout = float(getattr(config, "pd_allocation_timeout_sec", math.inf))
    return PDOptions(
        role=role,
        mode=mode,
        rank=rank,
        world_size=ranks,
        listen=_listen(config, role, mode, rank, ranks),
        buffer_bytes=size,
        device="cpu" if offload else _device(config, metadata),
        device_index=_device_index(metadata),
        proxy=_proxy(config, role),
        pending_ttl=float(getattr(config, "pd_pull_pending_ttl", 360.0)),
        backoff=float(getattr(config, "pd_alloc_fail_backoff_ttl", 2.0)),
        reserve=float(getattr(config, "pd_pull_backpressure_reserve_pct", 2.0)) / 100.0,
        connect_timeout=own.connect_timeout,
        transfer_timeout=own.transfer_timeout,
        alloc_timeout=timeout if math.isfinite(timeout) else own.alloc_timeout,
        idle_timeout=own.idle_timeout,
        shutdown_timeout=float(getattr(config, "pd_shutdown_timeout_sec", 5.0)),
        failure_notification=own.failure_notification,
        engine_counts=getattr(config, "pd_backend_mode", "sync") == "sync",
    )


def port_of(ports: Any, rank: int, ranks: int, name: str) -> int:
    """Returns a rank's port of a list with one port a rank.

    Args:
        ports: The list; a single port counts as a list of one.
        rank: The rank.
        ranks: How many there are.
        name: The key, for the message.

    Raises:
        ConfigError: Too few ports, or no port.
    """
    if isinstance(ports, int) and not isinstance(ports, bool):
        ports = [ports]
    if not isinstance(ports, Sequence) or isinstance(ports, str) or not ports:
        raise ConfigError(f"{name} is {ports!r}; expected a list of {ranks} ports, one for each tensor parallel rank")
    if len(ports) < ranks:
        raise ConfigError(
            f"{name} has {len(ports)} ports ({', '.join(map(str, ports))}), but there are {ranks} ranks",
            hint=f"give {ranks} ports, one for each rank",
        )
    port = ports[rank]
    if not isinstance(port, int) or isinstance(port, bool) or not 0 < port < 65536:
        raise ConfigError(f"{name}[{rank}] is {port!r}; expected a port, 1 to 65535")
    return port


def _mode(config: Any) -> str:
    pull, delayed = bool(getattr(config, "pd_pull_mode", False)), bool(getattr(config, "pd_delay_pull", False))
    if delayed and not pull:
        raise ConfigError("pd_delay_pull needs pd_pull_mode: true; it is false")
    return DELAYED if delayed else PULL if pull else PUSH


def _listen(config: Any, role: str, mode: str, rank: int, ranks: int) -> str | None:
    host = config.pd_peer_host
    if role == "receiver":
        if not host:
            raise ConfigError("pd_peer_host is missing; a receiver listens on it")
        # Allocation rides on the handshake's connection; the key is checked all the same, so that a list that is too
        # short is not found out later by who relies on it.
        port_of(config.pd_peer_alloc_port, rank, ranks, "pd_peer_alloc_port")
        return f"{_bracket(host)}:{port_of(config.pd_peer_init_port, rank, ranks, 'pd_peer_init_port')}"
    done = getattr(config, "pd_pull_done_port", None)
    port = 0
    if mode != PUSH:
        port = port_of(done, rank, ranks, "pd_pull_done_port")
    elif done is not None:
        port_of(done, rank, ranks, "pd_pull_done_port")
    if host or mode != PUSH:
        return f"{_bracket(host or 'localhost')}:{port}"
    return None


def _bracket(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _proxy(config: Any, role: str) -> str | None:
    if role == "receiver" or getattr(config, "pd_skip_proxy_notification", False):
        return None
    if not config.pd_proxy_host or not config.pd_proxy_port:
        raise ConfigError(
            f"pd_proxy_host is {config.pd_proxy_host!r} and pd_proxy_port {config.pd_proxy_port!r}; a sender tells the "
            "proxy when a request's KV is at the decoder",
            hint="give both, or pd_skip_proxy_notification: true",
        )
    return f"{_bracket(config.pd_proxy_host)}:{config.pd_proxy_port}"


def _device(config: Any, metadata: Any) -> str:
    device = config.pd_buffer_device
    if device is None:
        raise ConfigError("pd_buffer_device is missing; expected cpu or npu")
    kind = str(device).split(":")[0]
    return "cpu" if kind == "cpu" else f"{kind}:{_device_index(metadata)}"


def _device_index(metadata: Any) -> int:
    local = getattr(metadata, "local_worker_id", None)
    return int(metadata.worker_id if local is None else local)
