"""How its backends come into being."""

from typing import Any


def CreateStorageBackends(config: Any, metadata: Any, *args: Any, **kwargs: Any) -> Any:
    """Builds its PD backend, whatever the channel."""
    from lmcache_ascend.v1.storage_backend.pd_backend import AscendPDBackend

    return {"PDBackend": AscendPDBackend(config, metadata, **kwargs)}
