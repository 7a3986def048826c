"""Refuses at start, by name, what this connector does not support, and says what to change."""

from __future__ import annotations

import sys
from typing import Any


class UnsupportedFeature(ValueError):
    """A vLLM feature that is on and that this connector does not support."""


def check(vllm_config: Any, kv_cache_config: Any) -> None:
    """Checks a configuration; runs in the scheduler's and in the worker's half.

    Args:
        vllm_config: vLLM's configuration.
        kv_cache_config: The cache's configuration, or None where the version does not pass it.

    Raises:
        UnsupportedFeature: Names the feature and the flag to change.
    """
    parallel = vllm_config.parallel_config
    _refuse_above_one(
        parallel,
        "data_parallel_size",
        "data parallel",
        "start one engine a replica (--data-parallel-size 1) and give the proxy all of them",
    )
    _refuse_above_one(parallel, "pipeline_parallel_size", "pipeline parallel", "use --tensor-parallel-size instead")
    _refuse_above_one(
        parallel, "decode_context_parallel_size", "decode context parallel", "set --decode-context-parallel-size 1"
    )
    _refuse_above_one(
        parallel, "prefill_context_parallel_size", "prefill context parallel", "set --prefill-context-parallel-size 1"
    )
    if getattr(vllm_config, "speculative_config", None) is not None:
        raise UnsupportedFeature("speculative decoding is not supported by KVLinkConnector: drop --speculative-config")
    model = vllm_config.model_config
    if getattr(model, "use_mla", False) and parallel.tensor_parallel_size > 1:
        raise UnsupportedFeature(
            "MLA with tensor parallel is not supported by KVLinkConnector: set --tensor-parallel-size 1"
        )
    if getattr(model, "is_encoder_decoder", False):
        raise UnsupportedFeature("encoder-decoder models are not supported by KVLinkConnector")
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        raise UnsupportedFeature(
            "--calculate-kv-scales is not supported by KVLinkConnector: the two engines would scale their fp8 caches "
            "differently; use scales from the checkpoint"
        )
    groups = getattr(kv_cache_config, "kv_cache_groups", None)
    if groups is not None and len(groups) != 1:
        raise UnsupportedFeature(
            f"this model has {len(groups)} KV-cache groups; KVLinkConnector moves one: add "
            "--disable-hybrid-kv-cache-manager (models with state-space layers cannot be handed over)"
        )
    for group in groups or ():
        spec = type(group.kv_cache_spec).__name__
        if "Mamba" in spec or "Linear" in spec:
            raise UnsupportedFeature(f"state-space layers ({spec}) are not supported by KVLinkConnector")
    if inside_multi_connector():
        raise UnsupportedFeature(
            "KVLinkConnector inside MultiConnector is not supported: name KVLinkConnector itself as kv_connector"
        )


def _refuse_above_one(config: Any, field: str, name: str, change: str) -> None:
    value = getattr(config, field, 1)
    if isinstance(value, int) and value > 1:
        raise UnsupportedFeature(f"{name} ({field} {value}) is not supported by KVLinkConnector: {change}")


def inside_multi_connector() -> bool:
    """Tells whether vLLM's MultiConnector is building this connector; its children get no mark of their own."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").endswith("kv_connector.v1.multi_connector"):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
