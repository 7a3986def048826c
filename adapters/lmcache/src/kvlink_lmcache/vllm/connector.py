"""``KVLinkLMCacheConnector``: LMCache's connector with checks before it and without its silent failures."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Mapping
from typing import Any

from kvlink_lmcache import scheduling, settings, starting
from kvlink_lmcache.log import get_logger
from kvlink_lmcache.vllm import checks, repairs

logger = get_logger()


def _base() -> Any:
    """LMCache's connector class, or LMCache-Ascend's: that one brings the NPU's kernels."""
    if importlib.util.find_spec("lmcache_ascend") is not None:
        from lmcache_ascend.integration.vllm.lmcache_ascend_connector_v1 import LMCacheAscendConnectorV1Dynamic

        return LMCacheAscendConnectorV1Dynamic
    from lmcache.integration.vllm.lmcache_connector_v1 import LMCacheConnectorV1Dynamic

    return LMCacheConnectorV1Dynamic


_Base: Any = _base()


class StartError(RuntimeError):
    """LMCache could not start; it would have gone on without moving any KV."""


class KVLinkLMCacheConnector(_Base):  # type: ignore[misc]
    """LMCache's connector over kvlink's channels."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any = None) -> None:
        """Checks the configuration, then starts LMCache.

        Args:
            vllm_config: vLLM's configuration.
            role: Scheduler or worker.
            kv_cache_config: The caches' configuration; vLLM 0.18 does not give it.

        Raises:
            ConfigError: A key or value that cannot be.
            UnsupportedFeature: vLLM is set up in a way that LMCache cannot serve.
            StartError: LMCache did not start.
        """
        checks.check_engine(vllm_config, kv_cache_config)
        repairs.install(vllm_config)
        config = checks.check_lmcache_config(vllm_config)
        _on_load_failure(vllm_config, settings.adapter_settings(config).on_load_failure)
        # LMCache-Ascend's up to 0.4.4 takes two arguments, and vLLM >= 0.23 refuses what it makes of them; all
        # it does is to call LMCache's.
        start = _Base if "kv_cache_config" in inspect.signature(_Base.__init__).parameters else _Base.__mro__[1]
        start.__init__(self, vllm_config, role, kv_cache_config)
        scheduling.repair(type(self._lmcache_engine))  # LMCache-Ascend's overrides what is repaired in LMCache's
        self._refuse_degraded("start")

    def register_kv_caches(self, kv_caches: Mapping[str, Any]) -> None:
        """Looks at the caches before LMCache sizes its buffers by them, then starts LMCache's backends.

        Args:
            kv_caches: Caches by layer.

        Raises:
            StartError: LMCache's backends did not start.
            LayoutError: Caches of an unknown form.
        """
        starting.bind(self._lmcache_engine, kv_caches)
        super().register_kv_caches(kv_caches)
        self._refuse_degraded("start its backends")

    def _refuse_degraded(self, what: str) -> None:
        """LMCache catches what goes wrong at start and computes everything anew for ever; kvlink says so at once."""
        manager: Any = getattr(self._lmcache_engine, "_manager", None)
        if getattr(manager, "_init_failed", False):
            reason = str(manager._init_failed_reason).strip().splitlines()
            raise StartError(f"LMCache could not {what}: {reason[-1] if reason else 'it gave no reason'}")


def _on_load_failure(vllm_config: Any, policy: str) -> None:
    """Says what vLLM does with a request whose KV did not come; its scheduler reads that after building this."""
    transfer = vllm_config.kv_transfer_config
    if getattr(transfer, "kv_load_failure_policy", policy) != policy:
        object.__setattr__(transfer, "kv_load_failure_policy", policy)
