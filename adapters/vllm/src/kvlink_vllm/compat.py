"""All that differs between the vLLM versions this connector runs on (0.18, 0.23, 0.32).

What the base class offers in one version only is handled by leaving it alone: this connector overrides no method whose
signature differs (``handle_preemptions``), offers ``get_finished`` everywhere (0.32's ``get_transfer_results`` wraps
it), treats ``start_load_kv`` as "before or after the forward" (it only starts background work), and does not rely on
``on_new_request`` (absent in 0.18), only profits from it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from kvlink_vllm.log import get_logger

logger = get_logger()


def vllm_version() -> str:
    """Returns vLLM's version without local build tags."""
    import vllm

    return str(vllm.__version__).partition("+")[0]


def cache_hit_source() -> Any:
    """Returns 0.32's metrics label for tokens that came from a peer, or None in versions without one."""
    try:
        from vllm.v1.metrics.cache_hit_source import CacheHitSource
    except ImportError:
        return None
    return getattr(CacheHitSource, "P2P", None)


def set_load_failure_policy(vllm_config: Any, policy: str) -> None:
    """Sets what vLLM does with a request whose blocks did not come.

    The scheduler of all three versions reads the field right after it built the connector.

    Args:
        vllm_config: The configuration the scheduler holds.
        policy: "recompute" or "fail".
    """
    config = vllm_config.kv_transfer_config
    if getattr(config, "kv_load_failure_policy", policy) != policy:
        object.__setattr__(config, "kv_load_failure_policy", policy)


def block_size(vllm_config: Any, kv_cache_config: Any) -> int:
    """Returns tokens of a block as vLLM's cache manager counts them.

    Args:
        vllm_config: vLLM's configuration.
        kv_cache_config: The cache's configuration, or None in 0.18 where it may be absent.
    """
    groups = getattr(kv_cache_config, "kv_cache_groups", None)
    if groups:
        return int(groups[0].kv_cache_spec.block_size)
    return int(vllm_config.cache_config.block_size)


def attention_layers(vllm_config: Any) -> Mapping[str, Any]:
    """Returns this worker's attention layers by name, or nothing where they cannot be listed."""
    try:
        from vllm.config import get_layers_from_vllm_config
        from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

        layers: Mapping[str, Any] = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    except Exception:
        logger.debug("the attention layers cannot be listed", exc_info=True)
        return {}
    return layers


def attention_backends(vllm_config: Any) -> str:
    """Returns the names of the attention backends in use, sorted, or "unknown"."""
    names = set()
    for layer in attention_layers(vllm_config).values():
        backend = getattr(layer, "get_attn_backend", None)
        try:
            names.add(str(backend().get_name()) if backend else type(layer).__name__)
        except Exception:
            names.add(type(layer).__name__)
    return "+".join(sorted(names)) or "unknown"


def cpu_packing(dtype: Any, block_tokens: int, head_size: int, cache_dtype: str) -> str:
    """Returns the name of the CPU's packing of a block ("vec", "amx", "neon", ...), which decides its bytes.

    Args:
        dtype: The model's torch dtype.
        block_tokens: Tokens of a block.
        head_size: Elements of a head.
        cache_dtype: vLLM's ``cache_dtype`` text.

    Returns:
        The name, or "plain" in versions whose CPU backend does not pack, or "unknown".
    """
    try:
        from vllm.v1.attention.backends import cpu_attn
    except ImportError:
        return "unknown"
    function = getattr(cpu_attn, "_get_attn_isa", None)
    if function is None:
        return "plain"
    given = (dtype, block_tokens, head_size, cache_dtype)
    try:
        return str(function(*given[: len(inspect.signature(function).parameters)]))
    except Exception:
        logger.debug("the CPU's cache packing cannot be told", exc_info=True)
        return "unknown"
