"""All that is replaced in LMCache, one function a symbol.

Each function gets the module right after its code ran, checks that the symbol is what kvlink knows, and says why it is
replaced and when that can go away. Names that other modules had imported before are rebound there. Nothing here imports
lmcache by itself.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from kvlink_lmcache import versions

_MARK = "__kvlink_original__"


def config_keys(module: ModuleType) -> None:
    """Adds LMCache-Ascend's keys to ``LMCacheEngineConfig`` and refuses misspelt ones.

    Why: LMCache drops keys that it does not know with a warning, ``pd_pull_mode`` among them, and so do typing errors.
    Goes away: with an LMCache that lets a backend declare keys (none does, 0.5.6 included).
    """
    from kvlink_lmcache import keys

    versions.require(module, "LMCacheEngineConfig.from_file", ("file_path",))
    keys.install(module)


def create_gpu_connector(module: ModuleType) -> None:
    """Makes ``CreateGPUConnector`` return the plain torch mover where LMCache has none.

    Why: for the CPU it ends in "No supported cpu connector found", for an NPU without LMCache-Ascend's kernels too.
    Goes away: with an LMCache that has a registry of connectors or a CPU one that respects vLLM's packing.
    """
    original = _original(module, "CreateGPUConnector", ("config", "metadata", "engine", "layout_hints"))
    if original is None:
        return

    @functools.wraps(original)
    def create(config: Any, metadata: Any, engine: Any, layout_hints: Any = None) -> Any:
        from kvlink_lmcache.mover import choice

        if choice.wanted(metadata, engine):
            return choice.create(config, metadata, layout_hints)
        return original(config, metadata, engine, layout_hints)

    _replace(module, "CreateGPUConnector", create, original, ())


def create_transfer_channel(module: ModuleType) -> None:
    """Makes ``CreateTransferChannel`` accept kvlink's providers.

    Why: it asserts "nixl" or "mock_memory"; there is no registry in 0.4.4 or 0.5.6. LMCache's names go on to LMCache.
    Goes away: with a registry for in-process channels, as its multiprocess mode has.
    """
    original = _original(
        module,
        "CreateTransferChannel",
        ("channel_type", "async_mode", "role", "buffer_ptr", "buffer_size", "align_bytes", "tp_rank", "peer_init_url"),
    )
    if original is None:
        return

    @functools.wraps(original)
    def create(channel_type: str, *args: Any, **kwargs: Any) -> Any:
        from kvlink_lmcache import names

        if not names.is_kvlink(channel_type):
            return original(channel_type, *args, **kwargs)
        from kvlink_lmcache import channel

        return channel.create_transfer_channel(channel_type, *args, **kwargs)

    users = ("pd_backend", "pd_backend_async", "p2p_backend")
    others = tuple(f"lmcache.v1.storage_backend.{user}" for user in users)
    _replace(module, "CreateTransferChannel", create, original, others)


def create_storage_backends(module: ModuleType) -> None:
    """Makes ``CreateStorageBackends`` build kvlink's PD backends for kvlink's channels.

    Why: LMCache has no pull mode, its push backend sends again, blocks and hides failures, and a channel is built
    without the configuration, which is remembered here. Goes away: with backend plugins that are loaded in PD mode too.
    """
    original = _original(module, "CreateStorageBackends", ("config", "metadata", "loop"))
    if original is None:
        return

    @functools.wraps(original)
    def create(config: Any, metadata: Any, *args: Any, **kwargs: Any) -> Any:
        from kvlink_lmcache import backends

        return backends.create(original, config, metadata, *args, **kwargs)

    _replace(module, "CreateStorageBackends", create, original, ("lmcache.v1.storage_backend.storage_manager",))


def engine_store(module: ModuleType) -> None:
    """Has ``LMCacheEngine.store`` tell kvlink's PD backend when it is through.

    Why: where it gets no page for a chunk it stores fewer, or returns without a word to the backend, and the request's
    hand-off would wait for the rest. Goes away: when LMCache reports an incomplete store to the backend.
    """
    engine: Any = versions.require(module, "LMCacheEngine", ())
    original = versions.require(module, "LMCacheEngine.store", ("self", "tokens"))
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def store(self: Any, *args: Any, **kwargs: Any) -> Any:
        from kvlink_lmcache import pd

        try:
            return original(self, *args, **kwargs)
        finally:
            backends = getattr(self.storage_manager, "storage_backends", {})
            pd.after_store(backends.get("PDBackend"), kwargs.get("transfer_spec"))

    setattr(store, _MARK, original)
    engine.store = store


def engine_retrieve(module: ModuleType) -> None:
    """Has ``LMCacheEngine.retrieve`` report chunks as not retrieved that a prefiller lost while they were copied.

    Why: with delayed pull, chunks that do not fit the buffer are read while the engine copies them; LMCache lets an
    error there end the engine. Goes away: when LMCache's connectors may fail for one request.
    """
    engine: Any = versions.require(module, "LMCacheEngine", ())
    original = versions.require(module, "LMCacheEngine.retrieve", ("self", "tokens", "mask"))
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def retrieve(self: Any, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        from kvlink_lmcache import pd

        return pd.load(functools.partial(original, self), tokens, args, kwargs)

    setattr(retrieve, _MARK, original)
    engine.retrieve = retrieve


def ascend_channel(module: ModuleType) -> None:
    """Makes LMCache-Ascend's ``CreateTransferChannel`` build kvlink's channels.

    Why: its backends build through this factory of its own, which takes "hccl" and "hixl" only. For a name that both
    offer kvlink's wins, unless ``kvlink.lmcache.ascend: lmcache_ascend`` says otherwise.
    Goes away: with a registry for channels there.
    """
    original = _original(module, "CreateTransferChannel", ("channel_type", "async_mode", "role"))
    if original is None:
        return

    @functools.wraps(original)
    def create(channel_type: str, *args: Any, **kwargs: Any) -> Any:
        from kvlink_lmcache import ascend

        if ascend.wanted(channel_type):
            return ascend.create_transfer_channel(channel_type, *args, **kwargs)
        return original(channel_type, *args, **kwargs)

    users = ("pd_backend", "pd.backend", "p2p_backend")
    others = tuple(f"lmcache_ascend.v1.storage_backend.{user}" for user in users)
    _replace(module, "CreateTransferChannel", create, original, others)


def ascend_backends(module: ModuleType) -> None:
    """Remembers the configuration when LMCache-Ascend builds its storage backends; they stay its own.

    Why: a channel is built without the configuration. Goes away: when it is handed over.
    """
    if not hasattr(module, "CreateStorageBackends"):
        return
    original = _original(module, "CreateStorageBackends", ("config", "metadata"))
    if original is None:
        return

    @functools.wraps(original)
    def create(config: Any, metadata: Any, *args: Any, **kwargs: Any) -> Any:
        from kvlink_lmcache import context

        context.enter(config, metadata)
        return original(config, metadata, *args, **kwargs)

    _replace(module, "CreateStorageBackends", create, original, ())


def server_factories(module: ModuleType) -> None:
    """Registers kvlink's factories for ``lmcache server --p2p-transfer-engine``; nothing is replaced.

    Why: LMCache has a registry but loads nothing that could fill it before it builds the server.
    Goes away: with an entry-point group for transfer channels.
    """
    from kvlink_lmcache import mp

    versions.require(module, "register_transfer_channel_factory", ("transfer_channel_type", "factory"))
    mp.register(module)


def connector_meta(module: ModuleType) -> None:
    """Repairs ``LMCacheConnectorV1Impl`` on the scheduler's side.

    Why: the scheduler's and the worker's copies of a transfer's progress diverge, so chunked prefill sends everything
    again; an aborted request kills the engine. Goes away: when LMCache's scheduler counts what was handed to workers.
    """
    from kvlink_lmcache import scheduling

    implementation = versions.require(module, "LMCacheConnectorV1Impl", ())
    versions.require(module, "LMCacheConnectorV1Impl.build_connector_meta", ("self", "scheduler_output"))
    versions.require(module, "LMCacheConnectorV1Impl.request_finished", ("self", "request", "block_ids"))
    scheduling.repair(implementation)


def connector_start(module: ModuleType) -> None:
    """Makes ``LMCacheConnectorV1Impl`` tell kvlink of vLLM's configuration and caches before LMCache uses either.

    Why: LMCache's metadata lacks the longest sequence, and its sizes are guesses from vLLM's head size. Goes away: when
    ``LMCacheMetadata`` says the first and is made from the caches.
    """
    from kvlink_lmcache import starting

    implementation = versions.require(module, "LMCacheConnectorV1Impl", ())
    versions.require(module, "LMCacheConnectorV1Impl.__init__", ("self", "vllm_config"))
    versions.require(module, "LMCacheConnectorV1Impl.register_kv_caches", ("self", "kv_caches"))
    starting.install(implementation)


PATCHES: tuple[tuple[str, Callable[[ModuleType], None]], ...] = (
    ("lmcache.v1.config", config_keys),
    ("lmcache.v1.gpu_connector", create_gpu_connector),
    ("lmcache.v1.transfer_channel", create_transfer_channel),
    ("lmcache.v1.storage_backend", create_storage_backends),
    ("lmcache.v1.cache_engine", engine_store),
    ("lmcache.v1.cache_engine", engine_retrieve),
    ("lmcache.v1.distributed.transfer_channel.factory", server_factories),
    ("lmcache_ascend.v1.transfer_channel", ascend_channel),
    ("lmcache_ascend.v1.storage_backend", ascend_backends),
    ("lmcache.integration.vllm.vllm_v1_adapter", connector_start),
    ("lmcache.integration.vllm.vllm_v1_adapter", connector_meta),
)
"""Module and function, in no particular order."""


def _original(module: ModuleType, name: str, parameters: tuple[str, ...]) -> Callable[..., Any] | None:
    """Returns the function to replace, or None if that was done before."""
    found = versions.require(module, name, parameters)
    return None if hasattr(found, _MARK) else found


def _replace(
    module: ModuleType, name: str, new: Callable[..., Any], original: Callable[..., Any], others: tuple[str, ...]
) -> None:
    setattr(new, _MARK, original)
    setattr(module, name, new)
    for other in others:
        imported = sys.modules.get(other)
        if getattr(imported, name, None) is original:
            setattr(imported, name, new)
