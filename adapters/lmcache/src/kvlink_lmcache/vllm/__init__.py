"""LMCache's connector for vLLM with kvlink's channels.

Load it with ``--kv-transfer-config '{"kv_connector": "KVLinkLMCacheConnector", "kv_connector_module_path":
"kvlink_lmcache.vllm", "kv_role": "kv_producer", ...}'``. The class is built on first use, because its base is
LMCache's, or LMCache-Ascend's where that is installed.
"""

from __future__ import annotations

from typing import Any

__all__ = ["KVLinkLMCacheConnector"]


def __getattr__(name: str) -> Any:
    if name == "KVLinkLMCacheConnector":
        from kvlink_lmcache.registration import register

        register()
        from kvlink_lmcache.vllm.connector import KVLinkLMCacheConnector

        return KVLinkLMCacheConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
