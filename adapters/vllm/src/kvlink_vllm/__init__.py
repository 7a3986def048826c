"""kvlink's connector for vLLM.

Load it with ``--kv-transfer-config '{"kv_connector": "KVLinkConnector", "kv_connector_module_path": "kvlink_vllm",
"kv_role": "kv_producer", "kv_connector_extra_config": {"transfer_channel": "host"}}'``.
"""

from __future__ import annotations

from kvlink_vllm.connector import KVLinkConnector

__version__ = "0.1.0"

__all__ = ["KVLinkConnector", "__version__"]
