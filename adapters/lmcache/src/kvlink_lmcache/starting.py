"""What LMCache's connector has to tell kvlink before LMCache builds anything, whichever connector class vLLM loaded."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from kvlink_lmcache import context

_MARK = "__kvlink_tells__"


def install(implementation: Any) -> None:
    """Wraps ``LMCacheConnectorV1Impl``'s constructor and ``register_kv_caches``; a second call does nothing.

    Args:
        implementation: The class.
    """
    if _MARK in vars(implementation):
        return
    setattr(implementation, _MARK, True)
    construct, register = implementation.__init__, implementation.register_kv_caches

    @functools.wraps(construct)
    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        describe(vllm_config)
        construct(self, vllm_config, *args, **kwargs)

    @functools.wraps(register)
    def register_kv_caches(self: Any, kv_caches: Mapping[str, Any]) -> Any:
        bind(self, kv_caches)
        return register(self, kv_caches)

    implementation.__init__ = init
    implementation.register_kv_caches = register_kv_caches


def describe(vllm_config: Any) -> None:
    """Leaves for LMCache's side what only vLLM's configuration says.

    Args:
        vllm_config: vLLM's configuration.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    context.engine.max_model_len = int(getattr(model, "max_model_len", 0) or 0)
    context.engine.block_size = int(getattr(cache, "block_size", 0) or 0)
    context.engine.cache_dtype = str(getattr(cache, "cache_dtype", "auto"))
    context.engine.model_digest = _model_digest(model)


def bind(implementation: Any, kv_caches: Mapping[str, Any]) -> None:
    """Shows the caches to the mover before LMCache sizes its buffers by what it believes of them.

    Args:
        implementation: LMCache's ``LMCacheConnectorV1Impl``.
        kv_caches: Caches by layer.

    Raises:
        LayoutError: Caches of an unknown form.
        PackingError: A packing that cannot be found out.
    """
    connector: Any = getattr(implementation.lmcache_engine, "gpu_connector", None)
    if hasattr(connector, "bind"):
        connector.bind(list(kv_caches.values()))


def _model_digest(model: Any) -> str:
    """Digests the model's configuration without what differs between copies of one model."""
    try:
        values = dict(model.hf_config.to_dict())
    except Exception:
        return ""
    for name in ("_name_or_path", "transformers_version", "_attn_implementation_autoset"):
        values.pop(name, None)
    return hashlib.blake2b(json.dumps(values, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()
