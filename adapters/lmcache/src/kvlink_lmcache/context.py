"""The process's LMCache configuration and metadata.

LMCache builds transfer channels without handing them its configuration. Whatever builds storage backends says here
first for which engine; one process has one LMCache engine.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Context:
    """What a channel or backend is built for.

    Attributes:
        config: LMCache's ``LMCacheEngineConfig``.
        metadata: LMCache's ``LMCacheMetadata``.
    """

    config: Any
    metadata: Any


@dataclass
class Engine:
    """What vLLM's connector knows and LMCache's metadata does not say.

    Attributes:
        max_model_len: Tokens of the longest sequence, 0 where nobody said.
        block_size: Tokens of a block as vLLM's cache manager counts them, 0 where nobody said.
        cache_dtype: vLLM's ``--kv-cache-dtype``.
        layout: Describes how tokens stand in memory objects; equal where objects can be exchanged.
        model_digest: Digest of the model's configuration, "" where nobody said.
    """

    max_model_len: int = 0
    block_size: int = 0
    cache_dtype: str = "auto"
    layout: str = ""
    model_digest: str = ""


_lock = threading.Lock()
_current: Context | None = None
engine = Engine()
"""Of this process; the connector fills it before LMCache builds anything."""


def enter(config: Any, metadata: Any) -> Context:
    """Sets the context of everything that is built from now on.

    Args:
        config: LMCache's configuration.
        metadata: LMCache's metadata.

    Returns:
        The context.
    """
    global _current
    with _lock:
        _current = Context(config, metadata)
        return _current


def current() -> Context | None:
    """Returns the context last entered, or None: a channel built by hand, such as in a test."""
    return _current


def set_layout(layout: str) -> None:
    """Says how tokens stand in this process's memory objects.

    Args:
        layout: A text that is equal exactly for engines that can exchange objects.
    """
    engine.layout = layout
