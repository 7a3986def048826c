"""From LMCache's configuration to a kvlink channel: its name, its addresses, its options, and what peers must agree on.

Keys of kvlink stand in LMCache's ``extra_config``: ``kvlink.listen``, ``kvlink.secret_file``, the provider's options,
and those of this adapter, which begin with ``kvlink.lmcache.``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

import kvlink
from kvlink.errors import ConfigError

from . import context

ADAPTER_PREFIX = "kvlink.lmcache."


@dataclass(frozen=True)
class AdapterSettings:
    """The adapter's own keys, ``extra_config: kvlink.lmcache.<name>``.

    Attributes:
        pd_backend: "kvlink", or "lmcache" for LMCache's own PD backend on a kvlink channel.
        connect_timeout: Seconds to connect to a peer.
        transfer_timeout: Seconds that one batch of chunks may take to move.
        alloc_timeout: Seconds that a hand-off waits for room in a buffer, and a prefiller's step for free pages.
        idle_timeout: Seconds after which a hand-off is given up that neither goes on nor ends.
        failure_notification: Tell the proxy of failed hand-offs, not only of good ones.
        ascend: "kvlink", or "lmcache_ascend" to leave the names that both offer to LMCache-Ascend.
        kv_form: How the mover keeps tokens in memory objects: "blocks", "tokens", or "auto": whole blocks unless
            objects outlive the engine (disk, remote stores).
        on_load_failure: When KV that was there cannot be loaded: "recompute" it, or "fail" the request.
        model_id: Stands for the model's name where two sides compare it, if they use different paths.
    """

    pd_backend: str = "kvlink"
    connect_timeout: float = 5.0
    transfer_timeout: float = 30.0
    alloc_timeout: float = 10.0
    idle_timeout: float = 120.0
    failure_notification: bool = True
    ascend: str = "kvlink"
    kv_form: str = "auto"
    on_load_failure: str = "recompute"
    model_id: str = ""


_CHOICES = {
    "pd_backend": ("kvlink", "lmcache"),
    "ascend": ("kvlink", "lmcache_ascend"),
    "kv_form": ("auto", "blocks", "tokens"),
    "on_load_failure": ("recompute", "fail"),
}


def extra_config(config: Any) -> dict[str, Any]:
    """Returns LMCache's ``extra_config``, empty where there is none."""
    return dict(getattr(config, "extra_config", None) or {})


def adapter_settings(config: Any) -> AdapterSettings:
    """Reads the adapter's own keys.

    Args:
        config: LMCache's configuration, or None for the defaults.

    Raises:
        ConfigError: An unknown key (names the nearest valid one) or a wrong value.
    """
    known = {item.name: item for item in fields(AdapterSettings)}
    values: dict[str, Any] = {}
    for name, value in extra_config(config).items():
        if not name.startswith(ADAPTER_PREFIX):
            continue
        key = name.removeprefix(ADAPTER_PREFIX)
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"did you mean {ADAPTER_PREFIX}{near[0]}?" if near else f"valid: {', '.join(sorted(known))}"
            raise ConfigError(f"unknown key {name!r} in extra_config", hint=hint)
        default = known[key].default
        if isinstance(default, bool):
            valid = isinstance(value, bool)
        elif isinstance(default, float):
            valid = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 86400
        elif key in _CHOICES:
            valid = value in _CHOICES[key]
        else:
            valid = isinstance(value, str) and bool(value)
        if not valid:
            kinds = {bool: "true or false", float: "seconds above 0", str: "a text"}
            expected = _CHOICES.get(key) or kinds[type(default)]
            raise ConfigError(f"{name} is {value!r}; expected {expected}")
        values[key] = float(value) if isinstance(default, float) else value
    return AdapterSettings(**values)


def identity(config: Any, metadata: Any) -> dict[str, str | int]:
    """Returns what two engines must share so that one can use the other's KV: named in the error when it differs.

    Args:
        config: LMCache's configuration.
        metadata: LMCache's metadata.
    """
    layers, kv, _, heads, head_size = (int(size) for size in metadata.kv_shape)
    values: dict[str, str | int] = {
        "model": adapter_settings(config).model_id or str(metadata.model_name),
        "kv_dtype": str(metadata.kv_dtype).removeprefix("torch."),
        "chunk_size": int(config.chunk_size),
        "kv_layers": layers,
        "kv_parts": kv,
        "kv_heads": heads,
        "kv_head_size": head_size,
        "tensor_parallel": int(metadata.world_size),
        "tensor_parallel_rank": int(metadata.worker_id),
        "PYTHONHASHSEED": os.environ.get("PYTHONHASHSEED", "random"),
        "hash_algorithm": str(getattr(config, "pre_caching_hash_algorithm", "builtin")),
    }
    if context.engine.layout:
        values["kv_layout"] = context.engine.layout
    if context.engine.model_digest:
        values["model_config"] = context.engine.model_digest
    return values


def channel_config(
    channel_type: str,
    *,
    listen: str | None = None,
    device: str = "cpu",
    identity: Mapping[str, str | int] | None = None,
    config: Any = None,
) -> kvlink.ChannelConfig:
    """Builds the configuration of a channel from what LMCache says and what stands under ``kvlink.*``.

    Args:
        channel_type: LMCache's ``transfer_channel``: a provider's name, or "auto".
        listen: "host:port" that LMCache's keys name for this rank, or None. ``kvlink.listen`` is used only without it.
        device: "cpu", "npu:0".
        identity: What a peer must agree on.
        config: LMCache's configuration; None takes the process's, or only the environment where there is none.

    Raises:
        ConfigError: A wrong key or value.
    """
    if config is None:
        known = context.current()
        config = known.config if known is not None else None
    own = {name: value for name, value in extra_config(config).items() if not name.startswith(ADAPTER_PREFIX)}
    base = kvlink.ChannelConfig.from_mapping({"transfer_channel": channel_type, "extra_config": own})
    values = {item.name: getattr(base, item.name) for item in fields(base)}
    if listen is not None:
        values["listen"] = f"tcp://{listen}"
    values["device"] = device
    values["identity"] = {**dict(identity or {}), **dict(base.identity)}
    return kvlink.ChannelConfig(**values)
