"""LMCache's keys and memory objects as they stand in messages, checked by whoever receives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmcache.utils import STR_DTYPE_TO_TORCH_DTYPE, TORCH_DTYPE_TO_STR_DTYPE, CacheEngineKey

from kvlink.errors import ConfigError

from ..buffer import PDBuffer
from .wire import MAX_TEXT, Chunks


def describe(keys: Sequence[Any], objects: Sequence[Any]) -> Chunks:
    """Describes chunks of which only the last may be partial.

    Args:
        keys: LMCache's keys.
        objects: Its memory objects, at least one.
    """
    first, last = objects[0].meta, objects[-1].meta
    return Chunks(
        keys=[key.to_string() for key in keys],
        shape=list(first.shape),
        dtype=TORCH_DTYPE_TO_STR_DTYPE[first.dtype],
        fmt=first.fmt.value,
        last_tokens=int(last.shape[first.fmt.token_dim()]),
    )


def read(chunks: Chunks, buffer: PDBuffer) -> tuple[list[Any], list[int]]:
    """Checks chunks against this side's buffer.

    Args:
        chunks: From the peer.
        buffer: Where they will stand.

    Returns:
        LMCache's keys, and the tokens of each chunk.

    Raises:
        ConfigError: They do not fit in number, shape, dtype or format; names both values.
    """
    count = len(chunks.keys)
    dim = buffer.fmt.token_dim()
    if count == 0:
        raise ConfigError("a batch of no chunks")
    if chunks.fmt != buffer.fmt.value or STR_DTYPE_TO_TORCH_DTYPE.get(chunks.dtype) != buffer.dtype:
        ours = f"{TORCH_DTYPE_TO_STR_DTYPE[buffer.dtype]} in format {buffer.fmt.value}"
        raise ConfigError(f"chunks of {chunks.dtype} in format {chunks.fmt} do not fit ours of {ours}")
    full = list(buffer.shape)
    rest = [size for index, size in enumerate(chunks.shape) if index != dim]
    if len(chunks.shape) != len(full) or rest != [size for index, size in enumerate(full) if index != dim]:
        raise ConfigError(f"chunks of shape {chunks.shape} do not fit ours of {full}")
    tokens = [chunks.shape[dim]] * (count - 1) + [chunks.last_tokens]
    if not all(0 < number <= full[dim] for number in tokens):
        raise ConfigError(f"a chunk of {max(tokens)} tokens does not fit ours of {full[dim]}")
    if any(len(key) > MAX_TEXT for key in chunks.keys):
        raise ConfigError(f"a key of more than {MAX_TEXT} characters")
    return [CacheEngineKey.from_string(key) for key in chunks.keys], tokens
