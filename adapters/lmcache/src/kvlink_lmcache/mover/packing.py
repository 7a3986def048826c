"""Finds where a cache backend puts a token's values, by writing coded values and looking where they landed.

vLLM's CPU backend packs K and V for its instruction set ("vec", "amx", "neon", ...). The packings are not documented
and differ, but they never mix values: each goes to one place. So all values are numbered in small digits that every
dtype can hold, written with the backend's own operation into a scratch block, and read back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

# Digits are 1..64: exact in bfloat16 (8 significant bits) and half, and never the 0 of untouched elements.
_BASE = 64


class PackingError(ValueError):
    """A cache whose values cannot be found again."""


@dataclass(frozen=True)
class Place:
    """Where K's or V's values are in a block.

    Attributes:
        offset: Element of token 0, head 0, channel 0.
        token_stride: Elements from one token to the next.
        strides: Of head and channel.
        index: ``[tokens, heads * head_size]`` element numbers where strides cannot say it; then the others are 0.
    """

    offset: int = 0
    token_stride: int = 0
    strides: tuple[int, int] = (0, 0)
    index: torch.Tensor | None = None


@dataclass(frozen=True)
class Packing:
    """A block of ``[heads, tokens, 2 * head_size]`` elements.

    Attributes:
        heads: KV heads.
        tokens: Tokens of a block.
        head_size: Elements of a head.
        k: Where K is.
        v: Where V is.
    """

    heads: int
    tokens: int
    head_size: int
    k: Place
    v: Place


Write = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def discover(write: Write, *, heads: int, tokens: int, head_size: int, dtype: torch.dtype) -> Packing:
    """Finds the packing of a backend.

    Args:
        write: ``write(key, value, cache)`` stores ``[tokens, heads, head_size]`` keys and values into block 0 of a
            ``[1, heads, tokens, 2 * head_size]`` cache with the backend's own operation.
        heads: KV heads.
        tokens: Tokens of a block.
        head_size: Elements of a head.
        dtype: Of the cache.

    Returns:
        The packing.

    Raises:
        PackingError: The dtype is one that cannot hold the code, or values were lost or scaled.
    """
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise PackingError(
            f"a cache of {dtype} cannot be taken apart into tokens: use --kv-cache-dtype auto, or the native connector "
            "(kvlink-vllm), which moves whole blocks"
        )
    count = tokens * heads * head_size
    places = []
    for half in (0, 1):
        element = torch.zeros(2 * count, dtype=torch.long)  # number of the value that landed there
        found = torch.zeros(2 * count, dtype=torch.bool)
        number = torch.arange(count, dtype=torch.long)
        power = 1
        while power < count or power == 1:
            digit = (number // power) % _BASE + 1
            coded = digit.to(dtype).view(tokens, heads, head_size)
            empty = torch.zeros_like(coded)
            cache = torch.zeros(1, heads, tokens, 2 * head_size, dtype=dtype)
            write(*((coded, empty) if half == 0 else (empty, coded)), cache)
            landed = cache.view(-1).double()
            if not torch.equal(landed, landed.round()) or landed.max() > _BASE or landed.min() < 0:
                raise PackingError(
                    f"the backend changed values while it stored them ({dtype}): scaled caches do not work"
                )
            found |= landed > 0
            element += (landed.long() - 1).clamp_(min=0) * power
            power *= _BASE
        where = torch.full((count,), -1, dtype=torch.long)
        positions = found.nonzero().view(-1)
        where[element[positions]] = positions
        if len(positions) != count or bool((where < 0).any()):
            raise PackingError(
                f"the backend stored {len(positions)} of {count} values of {'K' if half == 0 else 'V'}; kvlink cannot "
                "address tokens of this cache: use the native connector (kvlink-vllm), which moves whole blocks"
            )
        places.append(_place(where.view(tokens, heads, head_size)))
    return Packing(heads, tokens, head_size, *places)


def _place(where: torch.Tensor) -> Place:
    """Says by strides what can be said by strides: such tokens are copied without an index."""
    tokens, heads, size = where.shape
    origin = int(where[0, 0, 0])
    token = int(where[1, 0, 0]) - origin if tokens > 1 else 1
    head = int(where[0, 1, 0]) - origin if heads > 1 else 0
    channel = int(where[0, 0, 1]) - origin if size > 1 else 1
    ruled = (
        origin
        + token * torch.arange(tokens).view(-1, 1, 1)
        + head * torch.arange(heads).view(1, -1, 1)
        + channel * torch.arange(size).view(1, 1, -1)
    )
    if min(token, head, channel) >= 0 and torch.equal(ruled, where):
        return Place(origin, token, (head, channel))
    return Place(index=where.reshape(tokens, heads * size).clone())
