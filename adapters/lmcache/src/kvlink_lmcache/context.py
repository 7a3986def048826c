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
        max_model_len: Tokens of the longest sequence, 0 where nobody said.
    """

    config: Any
    metadata: Any
    max_model_len: int = 0


_lock = threading.Lock()
_current: Context | None = None
_max_model_len = 0


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
        _current = Context(config, metadata, _max_model_len)
        return _current


def current() -> Context | None:
    """Returns the context last entered, or None: a channel built by hand, such as in a test."""
    return _current


def set_max_model_len(tokens: int) -> None:
    """Says how long a sequence may become; the connector knows, LMCache's metadata does not.

    Args:
        tokens: vLLM's ``max_model_len``.
    """
    global _max_model_len
    with _lock:
        _max_model_len = tokens
