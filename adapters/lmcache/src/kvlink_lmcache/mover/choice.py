"""When the plain torch mover takes the place of LMCache's kernels, and in which form it keeps objects."""

from __future__ import annotations

import importlib.util
from typing import Any

from kvlink.errors import ConfigError
from kvlink_lmcache import context, settings
from kvlink_lmcache.mover.connector import PagedConnector


def wanted(metadata: Any, engine: Any) -> bool:
    """Tells whether LMCache has no connector of its own for this device.

    Args:
        metadata: LMCache's metadata.
        engine: LMCache's ``EngineType``.
    """
    if getattr(engine, "name", "") != "VLLM" or metadata.role == "scheduler":
        return False
    device = _device_type()
    return device == "cpu" or (device == "npu" and importlib.util.find_spec("lmcache_ascend") is None)


def create(config: Any, metadata: Any, layout_hints: Any) -> PagedConnector:
    """Builds the connector.

    Args:
        config: LMCache's configuration.
        metadata: LMCache's metadata.
        layout_hints: LMCache's hints about vLLM's cache layout, or None.

    Returns:
        The connector.

    Raises:
        ConfigError: ``use_layerwise``, which the mover does not do, or a wrong ``kvlink.lmcache.kv_form``.
    """
    if config.use_layerwise:
        raise ConfigError("use_layerwise: true is not supported on this device", hint="set it to false")
    from kvlink_lmcache.vllm.packing import cpu_packing

    return PagedConnector(
        metadata,
        layout=(layout_hints or {}).get("kv_layout"),
        block_size=context.engine.block_size,
        form=kv_form(config),
        packing_of=cpu_packing,
    )


def kv_form(config: Any) -> str:
    """Returns how tokens stand in objects: whole blocks, unless objects outlive the engine or reach others.

    Args:
        config: LMCache's configuration.

    Raises:
        ConfigError: ``kvlink.lmcache.kv_form`` is none of its values.
    """
    form = settings.adapter_settings(config).kv_form
    if form != "auto":
        return form
    lasting = ("local_disk", "remote_url", "remote_storage_plugins", "gds_path", "storage_plugins", "maru_path")
    nixl_store = settings.extra_config(config).get("enable_nixl_storage")
    return "tokens" if nixl_store or any(getattr(config, name, None) for name in lasting) else "blocks"


def _device_type() -> str:
    import lmcache

    found = getattr(lmcache, "torch_device_type", None)
    if found is not None:
        return str(found)
    import torch

    # LMCache 0.4.4 has no such name and assumes CUDA.
    if torch.cuda.is_available():
        return "cuda"
    npu = getattr(torch, "npu", None)
    return "npu" if npu is not None and npu.is_available() else "cpu"
