"""What is refused at start: engines that LMCache cannot serve and configurations that do not fit together."""

from __future__ import annotations

import os
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from kvlink.errors import ConfigError
from kvlink_lmcache import keys, names
from kvlink_lmcache.log import get_logger

logger = get_logger()

# What LMCache's connector reads from kv_connector_extra_config, apart from the keys "lmcache.<any of its own>".
CONNECTOR_KEYS = ("discard_partial_chunks", "lmcache_rpc_port", "skip_last_n_tokens")
CONNECTOR_LMCACHE_KEYS = ("max_tokens_per_load",)  # read there and no key of LMCache's configuration


class UnsupportedFeature(RuntimeError):
    """vLLM is set up in a way that LMCache's connector cannot serve."""


def check_engine(vllm_config: Any, kv_cache_config: Any) -> None:
    """Refuses what would give wrong results or fail at the first request.

    Args:
        vllm_config: vLLM's configuration.
        kv_cache_config: The caches' configuration, or None.

    Raises:
        UnsupportedFeature: Named, with what to change.
        ConfigError: A misspelt key in ``kv_connector_extra_config``.
    """
    groups = getattr(kv_cache_config, "kv_cache_groups", None)
    if groups is not None and len(groups) > 1:
        raise UnsupportedFeature(
            f"this model has {len(groups)} KV-cache groups; LMCache's connector moves one: add "
            "--disable-hybrid-kv-cache-manager (models with state-space layers cannot be handed over)"
        )
    check_connector_keys(vllm_config.kv_transfer_config.kv_connector_extra_config or {})


def check_connector_keys(extra: Mapping[str, Any]) -> None:
    """Refuses keys that nobody reads.

    Args:
        extra: ``kv_connector_extra_config``.

    Raises:
        ConfigError: With the nearest key.
    """
    for key in extra:
        if key in CONNECTOR_KEYS:
            continue
        if key.startswith("lmcache."):
            _check_lmcache_key(key.removeprefix("lmcache."))
            continue
        if key.startswith("kvlink.") or key == "transfer_channel":
            raise ConfigError(
                f"{key!r} in kv_connector_extra_config is not read there: write it into LMCache's YAML file "
                f"({'extra_config: {' + key + ': ...}' if key.startswith('kvlink.') else key + ': ...'})"
            )
        near = get_close_matches(key, CONNECTOR_KEYS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(CONNECTOR_KEYS)}, lmcache.<key>"
        raise ConfigError(f"unknown key {key!r} in kv_connector_extra_config: {hint}")


def _check_lmcache_key(key: str) -> None:
    """LMCache takes its own keys from there too, and drops what it does not know with a warning."""
    from lmcache.v1 import config

    known = [*config._CONFIG_DEFINITIONS, *CONNECTOR_LMCACHE_KEYS]
    if key not in known:
        near = get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean 'lmcache.{near[0]}'?" if near else "see docs/lmcache.md for all keys"
        raise ConfigError(f"unknown key 'lmcache.{key}' in kv_connector_extra_config: {hint}")


def check_lmcache_config(vllm_config: Any) -> Any:
    """Reads LMCache's configuration as LMCache will, and refuses what does not fit this engine.

    Args:
        vllm_config: vLLM's configuration.

    Returns:
        LMCache's configuration.

    Raises:
        ConfigError: A misspelt key, a list of ports shorter than TP, roles that do not match, a device that is none.
    """
    from lmcache.integration.vllm.utils import lmcache_get_or_create_config
    from lmcache.v1 import config as keys_of
    from lmcache.v1.config_base import validate_and_set_config_value

    path = os.environ.get("LMCACHE_CONFIG_FILE")
    if path:
        # Again, because LMCache-Ascend makes a configuration class of its own, which checks no file.
        keys.check_file(path, keys.known_keys(keys_of))
    try:
        config = lmcache_get_or_create_config()
        for key, value in (vllm_config.kv_transfer_config.kv_connector_extra_config or {}).items():
            if key.startswith("lmcache.") and hasattr(config, key.removeprefix("lmcache.")):
                validate_and_set_config_value(config, key.removeprefix("lmcache."), value)  # as LMCache will do itself
    except AssertionError as error:
        raise ConfigError(
            f"LMCache refuses its configuration: {error or 'a key that its mode needs is missing'}"
        ) from error
    parallel = vllm_config.parallel_config
    check_config(config, tp_size=int(parallel.tensor_parallel_size), kv_role=vllm_config.kv_transfer_config.kv_role)
    if config.enable_pd:
        check_parallel(parallel, mla=bool(getattr(vllm_config.model_config, "use_mla", False)))
    return config


def check_parallel(parallel: Any, *, mla: bool) -> None:
    """Refuses what has no place in LMCache's hand-off: it knows one port and one part of the KV a rank.

    Args:
        parallel: vLLM's ``parallel_config``.
        mla: The model keeps one latent vector a token, the same on each rank.

    Raises:
        UnsupportedFeature: Pipeline or data parallel, or MLA with tensor parallel.
    """
    if parallel.pipeline_parallel_size > 1 or parallel.data_parallel_size > 1:
        raise UnsupportedFeature(
            "enable_pd with pipeline or data parallel is not supported: ports are one per tensor-parallel rank; use "
            "--tensor-parallel-size and start one engine a replica"
        )
    if mla and parallel.tensor_parallel_size > 1:
        raise UnsupportedFeature(
            "enable_pd with MLA and tensor parallel is not supported: LMCache stores such KV on the first rank only "
            "and the others would wait for theirs; set --tensor-parallel-size 1"
        )


def check_config(config: Any, *, tp_size: int, kv_role: str) -> None:
    """Refuses an LMCache configuration that does not fit an engine.

    Args:
        config: LMCache's configuration.
        tp_size: Tensor-parallel ranks.
        kv_role: vLLM's ``kv_role``.

    Raises:
        ConfigError: Names the key, the value, and what was expected.
    """
    ours = names.is_kvlink(config.transfer_channel)
    if not config.enable_pd:
        return
    _check_role(config.pd_role, kv_role)
    lists = {
        "receiver": ("pd_peer_init_port", "pd_peer_alloc_port"),
        "sender": ("pd_pull_done_port",) if getattr(config, "pd_pull_mode", False) else (),
    }
    for key in lists.get(config.pd_role, ()):
        ports = getattr(config, key, None)
        if ports is None:
            raise ConfigError(f"{key} is missing; a {config.pd_role} needs one port a rank, {tp_size} in all")
        if len(ports) < tp_size:
            raise ConfigError(
                f"{key} has {len(ports)} ports ({ports}); --tensor-parallel-size {tp_size} needs {tp_size}"
            )
        if len(set(ports)) < len(ports):
            raise ConfigError(f"{key} names a port twice: {ports}")
    if config.pd_role == "receiver" and not config.pd_peer_host:
        raise ConfigError("pd_peer_host is missing; a receiver needs the address at which senders reach it")
    if config.pd_role == "sender" and not config.pd_skip_proxy_notification and not config.pd_proxy_port:
        raise ConfigError("pd_proxy_port is missing; a sender tells the proxy there that the KV has arrived")
    if getattr(config, "pd_delay_pull", False) and not getattr(config, "pd_pull_mode", False):
        raise ConfigError("pd_delay_pull is true and pd_pull_mode false: delayed pull is a form of pull; set both")
    if ours:
        _check_device(config.pd_buffer_device)
        if os.environ.get("PYTHONHASHSEED") in (None, "random") and _hashes_by_seed(config):
            logger.warning(
                "PYTHONHASHSEED is not set: prefiller and decoder hash tokens differently and every prompt would be "
                "computed twice; export PYTHONHASHSEED=0 for both"
            )


def _check_role(pd_role: str | None, kv_role: str) -> None:
    fitting = {"sender": ("kv_producer", "kv_both"), "receiver": ("kv_consumer", "kv_both")}
    if pd_role in fitting and kv_role not in fitting[pd_role]:
        raise ConfigError(
            f"pd_role is {pd_role!r} and kv_role {kv_role!r}: a {pd_role} goes with kv_role {fitting[pd_role][0]!r}"
        )


def _check_device(device: Any) -> None:
    import torch

    kind = str(device).partition(":")[0]
    if kind == "cpu":
        return
    module = getattr(torch, kind, None)
    available = getattr(module, "is_available", None)
    if kind not in ("npu", "cuda", "xpu", "hpu", "musa"):
        raise ConfigError(f"pd_buffer_device is {device!r}; expected 'npu' or 'cpu'")
    if available is None or not available():
        raise ConfigError(
            f"pd_buffer_device is {device!r}, and this machine has none that torch can use: set it to cpu"
        )


def _hashes_by_seed(config: Any) -> bool:
    return str(getattr(config, "pre_caching_hash_algorithm", "builtin")) == "builtin"
