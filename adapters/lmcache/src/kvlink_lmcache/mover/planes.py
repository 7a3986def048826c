"""What a paged cache looks like: dense blocks, and tokens inside a block.

A *piece* is a tensor in which each block is one dense run of elements; it is kept as a ``[blocks, elements]`` view, so
that whole blocks move without knowing what is inside. A *token plane* says where in such a run a token's values are,
either by strides or, where a packing has none, by an index. One piece holds one plane (Ascend's K or V tensor) or two
(vLLM's CPU cache, whose blocks hold K and V).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvlink_lmcache.mover.packing import Packing

K, V = 0, 1
_HEADS_FIRST = ("HND", "BLHNC", "LBHNC")


class LayoutError(ValueError):
    """A cache whose tokens cannot be told apart, with its shape and what would help."""


@dataclass(frozen=True)
class Geometry:
    """What the engine says about its cache.

    Attributes:
        block_size: Tokens of a block as vLLM's cache manager counts them.
        kv_heads: KV heads of this rank.
        head_size: Elements of a head.
        mla: The cache holds one latent vector a token instead of K and V.
        layout: LMCache's name of the layout, "NHD" or "HND"; None where nobody knows.
    """

    block_size: int
    kv_heads: int
    head_size: int
    mla: bool = False
    layout: str | None = None


@dataclass(frozen=True)
class TokenPlane:
    """Where a token's values are inside a block of a piece.

    Attributes:
        kind: K or V; an MLA plane is K.
        shape: Shape of one token's values.
        offset: Element of token 0's first value.
        token_stride: Elements from one token to the next.
        strides: Strides of ``shape``.
        index: ``[tokens, width]`` element numbers where strides cannot say it; else None.
    """

    kind: int
    shape: tuple[int, ...]
    offset: int = 0
    token_stride: int = 0
    strides: tuple[int, ...] = ()
    index: torch.Tensor | None = None

    @property
    def width(self) -> int:
        """Values of one token."""
        return math.prod(self.shape)

    def read(self, blocks: torch.Tensor, first: int, count: int) -> torch.Tensor:
        """Returns the same tokens of several blocks.

        Args:
            blocks: ``[blocks, elements]``.
            first: First token in each block.
            count: Number of tokens.

        Returns:
            ``[blocks, count, *shape]``; a view where the plane has strides.
        """
        if self.index is not None:
            picked = self.index[first : first + count].reshape(-1)
            return blocks.index_select(1, picked).view(blocks.shape[0], count, *self.shape)
        return self._view(blocks, first, count)

    def write(self, blocks: torch.Tensor, first: int, values: torch.Tensor) -> None:
        """Sets the same tokens of several blocks.

        Args:
            blocks: ``[blocks, elements]``.
            first: First token in each block.
            values: ``[blocks, count, *shape]``.
        """
        count = int(values.shape[1])
        if self.index is None:
            self._view(blocks, first, count).copy_(values)
        else:
            picked = self.index[first : first + count].reshape(-1)
            blocks.index_copy_(1, picked, values.reshape(blocks.shape[0], -1))

    def _view(self, blocks: torch.Tensor, first: int, count: int) -> torch.Tensor:
        start = blocks.storage_offset() + self.offset + first * self.token_stride
        shape = (blocks.shape[0], count, *self.shape)
        return blocks.as_strided(shape, (blocks.stride(0), self.token_stride, *self.strides), start)


@dataclass(frozen=True)
class Piece:
    """One tensor of one layer.

    Attributes:
        blocks: ``[blocks, elements]`` view of it.
        tokens: Tokens of a block.
        planes: One or two.
    """

    blocks: torch.Tensor
    tokens: int
    planes: tuple[TokenPlane, ...]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token."""
        return int(self.blocks.shape[1] * self.blocks.element_size()) // self.tokens


def build_pieces(caches: Sequence[Any], geometry: Geometry, packing: Packing | None = None) -> list[Piece]:
    """Describes all layers.

    Args:
        caches: Per layer a tensor, or a tuple or list of tensors (None among them is skipped).
        geometry: What the engine says.
        packing: Where tokens are in a ``[blocks, heads, block_size, 2 * head_size]`` cache that the engine packs.

    Returns:
        Pieces in layer order; layers that share one tensor are one piece.

    Raises:
        LayoutError: A tensor of an unknown form, blocks that are not dense, or block sizes that differ.
    """
    pieces: list[Piece] = []
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for number, cache in enumerate(caches):
        tensors = [t for t in (cache if isinstance(cache, (tuple, list)) else [cache]) if t is not None and t.numel()]
        several = len(tensors) > 1
        for position, tensor in enumerate(tensors):
            place = (int(tensor.data_ptr()), tuple(tensor.shape))
            if place in seen:
                continue
            seen.add(place)
            if several:
                pieces.append(_member(number, tensor, position, geometry))
            else:
                pieces.extend(_single(number, tensor, geometry, packing))
    if not pieces:
        raise LayoutError("vLLM registered no KV cache")
    sizes = sorted({piece.tokens for piece in pieces})
    if len(sizes) > 1:
        raise LayoutError(f"the cache's tensors have blocks of {sizes} tokens; all must have the same")
    return pieces


def _member(layer: int, tensor: torch.Tensor, position: int, geometry: Geometry) -> Piece:
    """One of several tensors of a layer (Ascend): [blocks, tokens, ...], K first unless it is a latent cache."""
    if tensor.dim() == 4 and not geometry.mla:
        tensor = _tokens_second(tensor, geometry.kv_heads, geometry.layout in _HEADS_FIRST)
    if tensor.dim() < 3:
        raise LayoutError(
            f"layer {layer}, tensor {position}: shape {tuple(tensor.shape)}; expected [blocks, tokens, ...]"
        )
    kind = V if position == 1 and not geometry.mla else K
    return _piece(layer, tensor, [(kind, tensor)])


def _single(layer: int, tensor: torch.Tensor, geometry: Geometry, packing: Packing | None) -> list[Piece]:
    """The only tensor of a layer."""
    shape = tuple(int(n) for n in tensor.shape)
    heads, size = geometry.kv_heads, geometry.head_size
    heads_first = geometry.layout in _HEADS_FIRST
    if geometry.mla:
        if len(shape) == 4 and shape[2] == 1:
            tensor = tensor.squeeze(2)
        if tensor.dim() != 3:
            raise LayoutError(f"layer {layer}: an MLA cache of shape {shape}; expected [blocks, tokens, width]")
        return [_piece(layer, tensor, [(K, tensor)])]
    if len(shape) == 5 and 2 in shape[:2] and shape[4] == size:
        where = 0 if shape[0] == 2 else 1
        halves = [_tokens_second(half, heads, heads_first) for half in tensor.unbind(where)]
        if where == 0:
            return [_piece(layer, half, [(kind, half)]) for kind, half in zip((K, V), halves, strict=True)]
        return [_piece(layer, tensor, list(zip((K, V), halves, strict=True)))]
    if len(shape) == 4 and shape[3] == 2 * size:
        if packing is not None and shape[1] == packing.heads and shape[2] == packing.tokens:
            return [_packed(layer, tensor, packing)]
        whole = _tokens_second(tensor, heads, heads_first)
        return [_piece(layer, tensor, [(K, whole[..., :size]), (V, whole[..., size:])])]
    raise LayoutError(
        f"layer {layer}: a cache of shape {shape} on {tensor.device} for {heads} KV heads of {size} is of no known "
        "form ([2, blocks, tokens, heads, size], [blocks, heads, tokens, 2 * size], (k, v) tuples, MLA); use the "
        "native connector (kvlink-vllm), which moves blocks without knowing their form"
    )


def _tokens_second(tensor: torch.Tensor, heads: int, heads_first: bool) -> torch.Tensor:
    """[blocks, heads, tokens, x] becomes a [blocks, tokens, heads, x] view; which it is, the shape or the hint says."""
    second, third = tensor.shape[1], tensor.shape[2]
    if second == heads and (third != heads or heads_first):
        return tensor.transpose(1, 2)
    return tensor


def _piece(layer: int, tensor: torch.Tensor, planes: list[tuple[int, torch.Tensor]]) -> Piece:
    blocks = _dense_blocks(layer, tensor)
    base = blocks.storage_offset()
    described = tuple(
        TokenPlane(
            kind,
            tuple(int(n) for n in view.shape[2:]),
            int(view.storage_offset()) - base,
            int(view.stride(1)),
            tuple(int(n) for n in view.stride()[2:]),
        )
        for kind, view in planes
    )
    tokens = int(planes[0][1].shape[1])
    if sum(plane.width for plane in described) * tokens != blocks.shape[1]:
        raise LayoutError(f"layer {layer}: planes {described} do not fill a block of {blocks.shape[1]} elements")
    return Piece(blocks, tokens, described)


def _packed(layer: int, tensor: torch.Tensor, packing: Packing) -> Piece:
    shape = (packing.heads, packing.head_size)
    planes = []
    for kind, place in ((K, packing.k), (V, packing.v)):
        if place.index is None:
            planes.append(TokenPlane(kind, shape, place.offset, place.token_stride, place.strides))
        else:
            planes.append(TokenPlane(kind, shape, index=place.index.to(tensor.device)))
    return Piece(_dense_blocks(layer, tensor), packing.tokens, tuple(planes))


def _dense_blocks(layer: int, tensor: torch.Tensor) -> torch.Tensor:
    count = math.prod(tensor.shape[1:])
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride()[1:], tensor.shape[1:], strict=True) if n > 1):
        if stride != expected:
            raise LayoutError(
                f"layer {layer}: a block's elements do not lie side by side (shape {tuple(tensor.shape)}, strides "
                f"{tensor.stride()}); use the native connector (kvlink-vllm) or another --kv-cache layout"
            )
        expected *= size
    return tensor.as_strided((tensor.shape[0], count), (tensor.stride(0), 1), tensor.storage_offset())
