"""What two workers must have in common: everything that decides the bytes of a block."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from kvlink_vllm import compat
from kvlink_vllm.layout import CacheLayout
from kvlink_vllm.settings import Settings
from kvlink_vllm.wire import PROTOCOL


def build_identity(
    vllm_config: Any, settings: Settings, layout: CacheLayout, *, rank: int, block_size: int
) -> dict[str, str | int]:
    """Builds the channel identity; kvlink compares it at connect and refuses a difference by key and both values.

    Args:
        vllm_config: vLLM's configuration.
        settings: The connector's.
        layout: This worker's caches.
        rank: Its tensor-parallel rank.
        block_size: Tokens of a block.

    Returns:
        Keys and values.
    """
    model = vllm_config.model_config
    parallel = vllm_config.parallel_config
    cache = vllm_config.cache_config
    head_size = int(model.get_head_size())
    cache_dtype = str(cache.cache_dtype)
    identity: dict[str, str | int] = {
        "kvlink_vllm.protocol": PROTOCOL,
        "vllm": compat.vllm_version(),
        "model": settings.model_id or str(model.model),
        "model_config": _config_digest(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": str(getattr(model, "quantization", None)),
        "cache_dtype": cache_dtype,
        "block_size": block_size,
        "kv_heads_per_rank": int(model.get_num_kv_heads(parallel)),
        "head_size": head_size,
        "cache_layers": len({plane.key.rsplit("/", 2)[0] for plane in layout.planes}),
        "cache_layout": layout.describe(),
        "attention_backend": compat.attention_backends(vllm_config),
        "tp_size": int(parallel.tensor_parallel_size),
        "tp_rank": rank,
    }
    if layout.storages[0].device.startswith("cpu"):
        identity["cpu_packing"] = compat.cpu_packing(model.dtype, block_size, head_size, cache_dtype)
    return identity


def _config_digest(model: Any) -> str:
    """Digests the model's own configuration without what differs between copies of one model."""
    try:
        values = dict(model.hf_config.to_dict())
    except Exception:
        return "unknown"
    for name in ("_name_or_path", "transformers_version", "_attn_implementation_autoset"):
        values.pop(name, None)
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
