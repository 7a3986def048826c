"""The class vLLM loads: it delegates to the scheduler's or the worker's half and lets no error of theirs out.

An error costs one request, never the engine: hooks that vLLM calls in its step loop return what means "nothing" and
log, hooks that run at start raise.
"""

# vLLM is not there when types are checked, so its base classes are Any.
# mypy: disallow-subclassing-any=False

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
)

from kvlink_vllm import compat, guards
from kvlink_vllm.log import get_logger
from kvlink_vllm.metadata import KVLinkHandshake, KVLinkMetadata
from kvlink_vllm.scheduler import KVLinkScheduler
from kvlink_vllm.settings import Settings
from kvlink_vllm.stats import KVLinkPromMetrics, KVLinkStats
from kvlink_vllm.worker import KVLinkWorker

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

logger = get_logger()

_T = TypeVar("_T")
_D = TypeVar("_D")


class KVLinkConnector(KVConnectorBase_V1):
    """Pulls a prompt's KV cache from the engine that prefilled it, block for block.

    Args:
        vllm_config: vLLM's configuration.
        role: Scheduler or worker half.
        kv_cache_config: The cache's configuration; 0.18 may leave it out.
    """

    _cache_hit_source = compat.cache_hit_source()

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig | None = None
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        guards.check(vllm_config, kv_cache_config)
        settings = Settings.from_extra_config(vllm_config.kv_transfer_config.kv_connector_extra_config)
        compat.set_load_failure_policy(vllm_config, settings.on_load_failure)
        block_size = compat.block_size(vllm_config, kv_cache_config)
        self._scheduler: KVLinkScheduler | None = None
        self._worker: KVLinkWorker | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = KVLinkScheduler(vllm_config, settings, block_size)
        else:
            blocks = getattr(kv_cache_config, "num_blocks", None) or vllm_config.cache_config.num_gpu_blocks
            self._worker = KVLinkWorker(
                vllm_config, settings, blocks=int(blocks), block_size=block_size, rank=_tp_rank()
            )

    # Scheduler's half

    def on_new_request(self, request: Request) -> None:
        """See vLLM's base class."""
        self._quietly("on_new_request", lambda: self._planner.on_new_request(request), None)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """See vLLM's base class."""
        return self._quietly(
            "get_num_new_matched_tokens",
            lambda: self._planner.matched_tokens(request, num_computed_tokens),
            (0, False),
        )

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """See vLLM's base class."""
        # No net here: a request that was promised its tokens and gets no pull would wait for ever.
        self._planner.after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """See vLLM's base class."""
        return self._planner.take_metadata(scheduler_output)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """See vLLM's base class."""
        return self._quietly(
            "request_finished", lambda: self._planner.request_finished(request, block_ids), (False, None)
        )

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        """See vLLM's base class."""
        self._planner.set_addresses([item for item in metadata.values() if isinstance(item, KVLinkHandshake)])

    # Worker's half

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """See vLLM's base class."""
        self._runner.register(kv_caches)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """See vLLM's base class."""
        return self._runner.handshake()

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Begins what must not wait for this step's forward, which can take seconds.

        A decoder may ask for a new hand-off at any moment, and 0.32 calls ``start_load_kv`` after the forward.
        """
        super().bind_connector_metadata(connector_metadata)
        if isinstance(connector_metadata, KVLinkMetadata):
            self._quietly("bind_connector_metadata", lambda: self._runner.bind(connector_metadata), None)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """See vLLM's base class."""
        meta = self._get_connector_metadata()
        if isinstance(meta, KVLinkMetadata):
            self._quietly("start_load_kv", lambda: self._runner.start_reads(meta), None)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: a request runs only when all its blocks are there."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: decoders read the cache itself."""

    def wait_for_save(self) -> None:
        """Nothing: decoders read the cache itself."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """See vLLM's base class; 0.32's ``get_transfer_results`` calls this."""
        return self._quietly("get_finished", lambda: self._runner.finished(finished_req_ids), (None, None))

    def get_block_ids_with_load_errors(self) -> set[int]:
        """See vLLM's base class."""
        return self._runner.take_errors()

    def shutdown(self) -> None:
        """See vLLM's base class."""
        if self._worker is not None:
            self._quietly("shutdown", self._worker.close, None)

    # Both

    def get_kv_connector_stats(self) -> KVLinkStats | None:
        """See vLLM's base class."""
        if self._worker is not None:
            return self._worker.take_stats()
        return self._planner.stats.take()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVLinkStats:
        """See vLLM's base class."""
        return KVLinkStats(data)

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVLinkPromMetrics:
        """See vLLM's base class."""
        return KVLinkPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def reset_cache(self) -> bool | None:
        """Nothing to reset: the connector keeps no cache of its own."""
        return True

    @property
    def _planner(self) -> KVLinkScheduler:
        if self._scheduler is None:
            raise RuntimeError("a scheduler's hook was called on the worker's half")
        return self._scheduler

    @property
    def _runner(self) -> KVLinkWorker:
        if self._worker is None:
            raise RuntimeError("a worker's hook was called on the scheduler's half")
        return self._worker

    @staticmethod
    def _quietly(hook: str, function: Callable[[], _T], default: _D) -> _T | _D:
        try:
            return function()
        except Exception:
            logger.exception("kvlink: unexpected error in %s; the engine goes on", hook)
            return default


def _tp_rank() -> int:
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())
