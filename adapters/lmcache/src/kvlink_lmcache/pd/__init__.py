"""Disaggregated prefill for LMCache on kvlink."""

from __future__ import annotations

from typing import Any

from .. import settings


def create_pd_backend(config: Any, metadata: Any) -> Any:
    """Builds the PD backend of one rank.

    Args:
        config: LMCache's configuration, whose ``transfer_channel`` is one of kvlink's.
        metadata: LMCache's metadata.

    Returns:
        The backend; None where LMCache's own is wanted (``kvlink.lmcache.pd_backend: lmcache``) or the only one that
        can (``pd_role: both``).

    Raises:
        ConfigError: See :class:`kvlink_lmcache.pd.backend.KVLinkPDBackend`.
    """
    if settings.adapter_settings(config).pd_backend == "lmcache" or config.pd_role == "both":
        return None
    from .backend import KVLinkPDBackend

    return KVLinkPDBackend(config, metadata)


def after_store(backend: Any, transfer_spec: Any) -> None:
    """Tells a PD backend of kvlink's that the engine has stored a step's chunks.

    Args:
        backend: LMCache's storage backend named "PDBackend", or None.
        transfer_spec: The ``DisaggSpec`` that the store was called with, or None.
    """
    ended = getattr(backend, "store_ended", None)
    if ended is not None:
        ended(transfer_spec)
