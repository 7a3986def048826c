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


def load(retrieve: Any, tokens: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Does what ``LMCacheEngine.retrieve`` does; chunks that get lost while they are copied count as not retrieved.

    Args:
        retrieve: LMCache's method, bound.
        tokens: Its first argument.
        arguments: Its further arguments.
        options: Its keywords.

    Returns:
        Which tokens were retrieved, a bool tensor.
    """
    from .windows import ChunkLost

    try:
        return retrieve(tokens, *arguments, **options)
    except ChunkLost as error:
        import torch

        from ..log import get_logger

        get_logger().warning("the decoder computes a prompt itself: %s", error)
        return torch.zeros(len(tokens), dtype=torch.bool)
