"""From vLLM's caches to storages and planes, and from block ids to ranges.

A *storage* is one allocation, registered once however many tensors view it. A *plane* is one evenly spaced row of
block-sized pieces: block ``b`` of a plane lies at ``offset + b * stride`` and is ``length`` dense bytes. A layer whose
block dimension comes first is one plane a tensor; vLLM 0.18's ``(2, blocks, ...)`` is two, K and V.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvlink_vllm.wire import WirePlane


class LayoutError(ValueError):
    """A cache that cannot be moved block by block."""


@dataclass(frozen=True)
class Storage:
    """One allocation to register.

    Attributes:
        name: Region name, "kv.0", "kv.1", ... in the order of first appearance.
        pointer: Address of its first byte.
        nbytes: Its size.
        device: "cpu", "npu:0", ...
        owner: Keeps the memory alive.
    """

    name: str
    pointer: int
    nbytes: int
    device: str
    owner: Any


@dataclass(frozen=True)
class Plane:
    """One row of block-sized pieces.

    Attributes:
        key: "layer/tensor/part", equal on both sides.
        storage: Index into the storages.
        offset: Bytes from the storage's start to block 0.
        stride: Bytes from one block to the next.
        length: Bytes of one block's piece.
        shape: Shape of that piece, without the block dimension.
        dtype: Element type.
        order: Bytes from one element to the next in each dimension of the shape; 0 where there is only one.
    """

    key: str
    storage: int
    offset: int
    stride: int
    length: int
    shape: tuple[int, ...]
    dtype: str
    order: tuple[int, ...] = ()


@dataclass(frozen=True)
class CacheLayout:
    """All planes of a worker's caches.

    Attributes:
        storages: What to register.
        planes: In layer order.
        blocks: Number of blocks.
    """

    storages: tuple[Storage, ...]
    planes: tuple[Plane, ...]
    blocks: int

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all planes."""
        return sum(plane.length for plane in self.planes)

    def describe(self) -> str:
        """Returns a short text that is equal exactly for layouts between which whole blocks may be copied.

        Where blocks lie is left out: each side uses its own offsets and strides between blocks, so the two may have
        different numbers of them. The order of the dimensions within a block counts: one shape can be NHD or HND.
        """
        digest = hashlib.blake2b(digest_size=8)
        for plane in self.planes:
            digest.update(f"{plane.key}|{plane.dtype}|{plane.shape}|{plane.order}|{plane.length};".encode())
        kinds: dict[str, int] = {}
        for plane in self.planes:
            kind = f"{plane.dtype}{list(plane.shape)}"
            kinds[kind] = kinds.get(kind, 0) + 1
        text = " + ".join(f"{count}x{kind}" for kind, count in list(kinds.items())[:4])
        return f"{text} #{digest.hexdigest()}"

    def wire(self) -> list[WirePlane]:
        """Returns the planes as a peer needs them."""
        return [
            WirePlane(plane.key, self.storages[plane.storage].name, plane.offset, plane.stride, plane.length)
            for plane in self.planes
        ]


def build_layout(caches: Mapping[str, Any], blocks: int) -> CacheLayout:
    """Finds storages and planes.

    Args:
        caches: Layer name to a tensor, or to a tuple or list of tensors. Tensors are used through ``data_ptr``,
            ``shape``, ``stride``, ``element_size``, ``dtype``, ``device`` and ``untyped_storage`` only.
        blocks: Blocks that vLLM's cache manager counts.

    Returns:
        The layout.

    Raises:
        LayoutError: No cache, a tensor without a block dimension of that size, or a block that is not dense.
    """
    if not caches:
        raise LayoutError("vLLM registered no KV cache: this model has none to hand over")
    storages: list[Storage] = []
    index: dict[tuple[str, int], int] = {}
    planes: list[Plane] = []
    places: set[tuple[int, int]] = set()
    for layer, cache in caches.items():
        tensors = list(cache) if isinstance(cache, (tuple, list)) else [cache]
        for position, tensor in enumerate(tensors):
            if tensor is None or math.prod(tensor.shape) == 0:
                continue
            storage = tensor.untyped_storage()
            key = (str(tensor.device), int(storage.data_ptr()))
            if key not in index:
                index[key] = len(storages)
                storages.append(
                    Storage(f"kv.{len(storages)}", int(storage.data_ptr()), int(storage.nbytes()), key[0], tensor)
                )
            base = int(tensor.data_ptr()) - storages[index[key]].pointer
            if (index[key], base) in places:
                continue  # layers that share one cache: its bytes move once
            places.add((index[key], base))
            planes.extend(_planes(f"{layer}/{position}", tensor, blocks, index[key], base))
    return CacheLayout(tuple(storages), tuple(planes), blocks)


def _planes(key: str, tensor: Any, blocks: int, storage: int, base: int) -> list[Plane]:
    shape = tuple(int(n) for n in tensor.shape)
    size = int(tensor.element_size())
    strides = tuple(int(n) * size for n in tensor.stride())
    dtype = str(tensor.dtype).removeprefix("torch.")
    if shape[0] % blocks == 0 and not (len(shape) > 1 and shape[0] == 2 and shape[1] == blocks):
        # A kernel may cut the manager's block into several of its own; they lie side by side.
        parts = shape[0] // blocks
        piece: tuple[int, ...] = shape[1:] if parts == 1 else (parts, *shape[1:])
        piece_strides = strides[1:] if parts == 1 else strides
        length = _dense(key, piece, piece_strides, size)
        order = _order(piece, piece_strides)
        return [Plane(f"{key}/0", storage, base, strides[0] * parts, length, piece, dtype, order)]
    if len(shape) > 1 and shape[0] == 2 and shape[1] % blocks == 0:
        parts = shape[1] // blocks
        piece = shape[2:] if parts == 1 else (parts, *shape[2:])
        piece_strides = strides[2:] if parts == 1 else strides[1:]
        length = _dense(key, piece, piece_strides, size)
        order = _order(piece, piece_strides)
        return [
            Plane(f"{key}/{half}", storage, base + half * strides[0], strides[1] * parts, length, piece, dtype, order)
            for half in range(2)
        ]
    raise LayoutError(f"cache {key}: shape {shape} has no block dimension of {blocks} in front (nor after a leading 2)")


def _dense(key: str, shape: tuple[int, ...], strides: tuple[int, ...], size: int) -> int:
    """Returns a piece's bytes if they lie side by side in any order of the dimensions."""
    expected = size
    for stride, count in sorted((stride, count) for stride, count in zip(strides, shape, strict=True) if count > 1):
        if stride != expected:
            raise LayoutError(
                f"cache {key}: the bytes of one block do not lie side by side; it cannot be moved block by block "
                f"(shape {shape}, strides {strides} bytes)"
            )
        expected *= count
    return expected


def _order(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Returns a piece's strides without those that mean nothing."""
    return tuple(stride if count > 1 else 0 for stride, count in zip(strides, shape, strict=True))


def check_peer(ours: CacheLayout, theirs: Sequence[WirePlane]) -> None:
    """Checks that a peer's planes pair with ours.

    Args:
        ours: This worker's layout.
        theirs: The peer's planes.

    Raises:
        LayoutError: Another number of planes, another key, another piece length, or a negative value.
    """
    if len(theirs) != len(ours.planes):
        raise LayoutError(f"the peer's cache has {len(theirs)} planes, ours has {len(ours.planes)}")
    for mine, other in zip(ours.planes, theirs, strict=True):
        if mine.key != other.key or mine.length != other.length:
            raise LayoutError(
                f"plane {mine.key} of {mine.length} bytes a block faces the peer's {other.key} of {other.length} bytes"
            )
        if other.offset < 0 or other.stride < other.length:
            raise LayoutError(f"plane {other.key} of the peer has offset {other.offset} and stride {other.stride}")


def build_ranges(
    dtype: np.dtype[Any],
    ours: CacheLayout,
    our_handles: Sequence[int],
    theirs: Sequence[WirePlane],
    their_handles: Mapping[str, int],
    local: npt.NDArray[np.int64],
    remote: npt.NDArray[np.int64],
) -> npt.NDArray[Any]:
    """Pairs blocks over all planes.

    Rows come plane by plane with blocks in the order given, so that runs of neighbouring ids stay neighbours and
    the engine can coalesce them. There is no Python loop over blocks.

    Args:
        dtype: ``kvlink.RANGE``.
        ours: This worker's layout.
        our_handles: Region handle of each of our storages.
        theirs: The peer's planes, checked by ``check_peer``.
        their_handles: Remote region handle by region name.
        local: Our block ids, int64.
        remote: The peer's block ids, as many.

    Returns:
        The ranges, planes x blocks rows.
    """
    count = len(ours.planes)
    rows = np.empty((count, len(local)), dtype=dtype)
    rows["mem"] = np.fromiter((our_handles[plane.storage] for plane in ours.planes), np.uint32, count)[:, None]
    rows["rmem"] = np.fromiter((their_handles[plane.region] for plane in theirs), np.uint32, count)[:, None]
    rows["local_offset"] = _offsets([(plane.offset, plane.stride) for plane in ours.planes], local)
    rows["remote_offset"] = _offsets([(plane.offset, plane.stride) for plane in theirs], remote)
    rows["length"] = np.fromiter((plane.length for plane in ours.planes), np.uint64, count)[:, None]
    return rows.reshape(-1)


def _offsets(planes: Sequence[tuple[int, int]], ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    table = np.asarray(planes, dtype=np.int64)
    offsets: npt.NDArray[np.int64] = table[:, :1] + table[:, 1:] * ids[None, :]
    return offsets


def checksum(layout: CacheLayout, blocks: npt.NDArray[np.int64]) -> str:
    """Digests blocks of a cache in host memory (``kvlink.verify``; slow, for tests and fault finding).

    Args:
        layout: The layout.
        blocks: Block ids in order.

    Returns:
        Hex digest over all planes, blocks in the order given.

    Raises:
        LayoutError: The cache is not in host memory.
    """
    import ctypes

    digest = hashlib.blake2b(digest_size=16)
    for plane in layout.planes:
        storage = layout.storages[plane.storage]
        if not storage.device.startswith("cpu"):
            raise LayoutError(f"kvlink.verify needs a cache in host memory, this one is on {storage.device}")
        view = memoryview((ctypes.c_char * storage.nbytes).from_address(storage.pointer)).cast("B")
        for block in blocks.tolist():
            start = plane.offset + block * plane.stride
            digest.update(view[start : start + plane.length])
    return digest.hexdigest()
