"""The copies between a paged cache and one memory object.

A memory object of T tokens has room for exactly T tokens of every plane, and what stands in it is for the mover alone
to know. Two forms are used:

- ``blocks``: blocks that the tokens fill lie there as they are in the cache, piece after piece; tokens of the first and
  last block that is not filled stand before and after them, plane after plane. Nothing is repacked except those. The
  engine that reads must have the same block size and packing; kvlink compares them when two channels meet.
- ``tokens``: all tokens, K of all layers and then V of all layers. This is LMCache's ``KV_2LTD``, which others
  understand too; needed where objects outlive the engine (disk, remote stores).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from kvlink_lmcache.mover.planes import K, Piece, TokenPlane, V

FORMS = ("blocks", "tokens")
# A run of neighbouring blocks of at least this many bytes is copied by itself; others go through one indexed copy.
_RUN_BYTES = 16384
_FEW_RUNS = 4


@dataclass(frozen=True)
class Segment:
    """Tokens that stand plane after plane in an object.

    Attributes:
        ids: Blocks.
        first: First token in each.
        count: Tokens in each.
        offset: Tokens before them in their section.
    """

    ids: list[int]
    first: int
    count: int
    offset: int


@dataclass(frozen=True)
class Section:
    """A part of an object in which each plane's tokens stand together.

    Attributes:
        start: Tokens before it in the object.
        count: Its tokens.
        segments: Where they are in the cache.
    """

    start: int
    count: int
    segments: list[Segment]


@dataclass(frozen=True)
class Span:
    """How the tokens of one object lie in blocks.

    Attributes:
        sections: What is copied token by token.
        filled: Blocks that are copied as they are.
        filled_start: Tokens before them in the object.
    """

    sections: list[Section]
    filled: list[int]
    filled_start: int


class Mover:
    """Copies tokens of a paged cache to and from memory objects."""

    def __init__(self, pieces: Sequence[Piece], *, form: str = "blocks") -> None:
        """Prepares for a cache.

        Args:
            pieces: From :func:`~kvlink_lmcache.mover.planes.build_pieces`.
            form: "blocks" or "tokens".

        Raises:
            ValueError: Another form.
        """
        if form not in FORMS:
            raise ValueError(f"form {form!r}; expected one of {FORMS}")
        self.form = form
        self.block_size = pieces[0].tokens
        """Tokens of a block of the tensors; a kernel may have cut the cache manager's blocks."""
        self.token_bytes = sum(piece.token_bytes for piece in pieces)
        """Bytes of one token over all layers."""
        self._stacks = _stacks(pieces)
        self._planes: list[tuple[int, Piece, TokenPlane]] = [
            (number, piece, plane)
            for kind in (K, V)
            for number, piece in enumerate(pieces)
            for plane in piece.planes
            if plane.kind == kind
        ]

    def describe(self) -> str:
        """Returns a text that is equal exactly for movers that understand each other's objects."""
        digest = hashlib.blake2b(digest_size=8)
        for number, piece, plane in self._planes:
            kept = plane.index.numpy(force=True).tobytes() if plane.index is not None else b""
            place = (plane.kind, plane.shape, plane.offset, plane.token_stride, plane.strides)
            # Tokens that stand one by one are the same whatever the cache's blocks look like.
            inner = (piece.tokens, place) if self.form == "blocks" else (plane.kind, plane.width)
            digest.update(repr((number, str(piece.blocks.dtype), inner)).encode())
            digest.update(kept if self.form == "blocks" else b"")
        blocks = f", blocks of {self.block_size}" if self.form == "blocks" else ""
        return f"{self.form}: {self.token_bytes} bytes a token{blocks} #{digest.hexdigest()}"

    def load(self, memory: torch.Tensor, slots: Sequence[int]) -> None:
        """Copies tokens from the cache into an object.

        Args:
            memory: The object's bytes, uint8, one dimension.
            slots: Cache slot of each token.

        Raises:
            ValueError: Slots that are not in block order, or an object that is too small.
        """
        span = self._span(memory, slots)
        for section in span.sections:
            for piece, plane, values in self._values(memory, section):
                for segment in section.segments:
                    blocks = _pick(piece.blocks, segment.ids)
                    read = plane.read(blocks, segment.first, segment.count)
                    _part(values, segment).view(read.shape).copy_(read)
        runs = _runs(span.filled)
        for stack, copy in self._filled(memory, span):
            if _scattered(stack, span.filled, runs):
                copy.copy_(stack.index_select(1, _index(span.filled, stack)))
                continue
            for start, block, count in runs:
                copy[:, start : start + count].copy_(stack[:, block : block + count])

    def store(self, memory: torch.Tensor, slots: Sequence[int], *, skip: int = 0) -> None:
        """Copies tokens from an object into the cache.

        Args:
            memory: The object's bytes, uint8, one dimension.
            slots: Cache slot of each token.
            skip: Leading tokens that stay as they are in the cache.

        Raises:
            ValueError: Slots that are not in block order, or an object that is too small.
        """
        span = self._span(memory, slots)
        for section in span.sections:
            for piece, plane, values in self._values(memory, section):
                for segment in section.segments:
                    _store_segment(piece, plane, values, segment, skip - section.start)
        passed, within = divmod(max(0, skip - span.filled_start), self.block_size)
        if within and passed < len(span.filled):
            self._store_rest(memory, span, passed, within)
            passed += 1
        ids = span.filled[passed:]
        runs = _runs(ids)
        for stack, copy in self._filled(memory, span):
            if _scattered(stack, ids, runs):
                stack.index_copy_(1, _index(ids, stack), copy[:, passed:])
                continue
            for start, block, count in runs:
                stack[:, block : block + count].copy_(copy[:, passed + start : passed + start + count])

    def _store_rest(self, memory: torch.Tensor, span: Span, number: int, first: int) -> None:
        """Stores the tokens of a filled block from ``first`` on: the cache already has those before."""
        rows = [row[number : number + 1] for _, copy in self._filled(memory, span) for row in copy]
        block = span.filled[number]
        for piece_number, piece, plane in self._planes:
            values = plane.read(rows[piece_number], first, self.block_size - first)
            plane.write(piece.blocks[block : block + 1], first, values)

    # ---- where things are -------------------------------------------------------------------------------------------
    def _span(self, memory: torch.Tensor, slots: Sequence[int]) -> Span:
        count, size = len(slots), self.block_size
        if memory.numel() < count * self.token_bytes:
            raise ValueError(
                f"an object of {memory.numel()} bytes for {count} tokens of {self.token_bytes} bytes: LMCache and vLLM "
                "disagree about the model's KV shape"
            )
        first = slots[0] % size
        head = min(count, -first % size)
        filled, tail = divmod(count - head, size)
        ids = _filled_ids(slots, head, filled, size)
        ends = []
        if head:
            ends.append(Segment([_block_of(slots, 0, head, size)], first, head, 0))
        if tail:
            ends.append(Segment([_block_of(slots, count - tail, count, size)], 0, tail, count - tail))
        if self.form == "blocks":
            sections = [Section(end.offset, end.count, [Segment(end.ids, end.first, end.count, 0)]) for end in ends]
            return Span(sections, ids, head)
        middle = [Segment(ids, 0, size, head)] if ids else []
        return Span([Section(0, count, [*ends, *middle])], [], 0)

    def _values(self, memory: torch.Tensor, section: Section) -> Iterator[tuple[Piece, TokenPlane, torch.Tensor]]:
        """Yields each plane with its [tokens, width] part of a section."""
        at = section.start * self.token_bytes
        for _, piece, plane in self._planes:
            size = section.count * plane.width * piece.blocks.element_size()
            yield piece, plane, memory[at : at + size].view(piece.blocks.dtype).view(section.count, plane.width)
            at += size

    def _filled(self, memory: torch.Tensor, span: Span) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields each stack with the [pieces, filled, elements] part of the object that belongs to it."""
        if not span.filled:
            return
        at = span.filled_start * self.token_bytes
        for stack in self._stacks:
            pieces, _, elements = stack.shape
            size = pieces * len(span.filled) * elements * stack.element_size()
            yield stack, memory[at : at + size].view(stack.dtype).view(pieces, len(span.filled), elements)
            at += size


def _store_segment(piece: Piece, plane: TokenPlane, values: torch.Tensor, segment: Segment, skip: int) -> None:
    part = _part(values, segment).view(len(segment.ids), segment.count, *plane.shape)
    passed, within = divmod(max(0, skip - segment.offset), segment.count)
    if within and passed < len(segment.ids):
        block = segment.ids[passed]
        rest = part[passed : passed + 1, within:]
        plane.write(piece.blocks[block : block + 1], segment.first + within, rest)
        passed += 1
    for start, block, count in _runs(segment.ids[passed:]):
        rows = part[passed + start : passed + start + count]
        plane.write(piece.blocks[block : block + count], segment.first, rows)


def _part(values: torch.Tensor, segment: Segment) -> torch.Tensor:
    return values[segment.offset : segment.offset + len(segment.ids) * segment.count]


def _pick(blocks: torch.Tensor, ids: list[int]) -> torch.Tensor:
    if len(_runs(ids)) == 1:
        return blocks[ids[0] : ids[-1] + 1]
    return blocks.index_select(0, _index(ids, blocks))


def _index(ids: list[int], tensor: torch.Tensor) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.long, device=tensor.device)


def _scattered(stack: torch.Tensor, ids: list[int], runs: list[tuple[int, int, int]]) -> bool:
    """Whether one indexed copy beats a copy a run: many runs, each small."""
    run_bytes = len(ids) * int(stack.shape[2]) * stack.element_size() // max(1, len(runs))
    return len(runs) > _FEW_RUNS and run_bytes < _RUN_BYTES


def _runs(ids: Sequence[int]) -> list[tuple[int, int, int]]:
    """Returns (position, first block, count) of runs of neighbouring blocks."""
    runs = []
    start = 0
    for position in range(1, len(ids) + 1):
        if position == len(ids) or ids[position] != ids[position - 1] + 1:
            runs.append((start, ids[start], position - start))
            start = position
    return runs


def _block_of(slots: Sequence[int], start: int, end: int, size: int) -> int:
    low, high = slots[start], slots[end - 1]
    if high - low != end - 1 - start or low // size != high // size:
        raise ValueError(f"slots {low} to {high} of tokens {start} to {end - 1} are not one block in order")
    return low // size


def _filled_ids(slots: Sequence[int], head: int, filled: int, size: int) -> list[int]:
    return [_block_of(slots, start, start + size, size) for start in range(head, head + filled * size, size)]


def _stacks(pieces: Sequence[Piece]) -> list[torch.Tensor]:
    """Joins consecutive pieces that lie evenly in one storage into [pieces, blocks, elements] views."""
    groups: list[list[torch.Tensor]] = []
    for piece in pieces:
        group = groups[-1] if groups else []
        if group and _follows(group, piece.blocks):
            group.append(piece.blocks)
        else:
            groups.append([piece.blocks])
    return [_stack(group) for group in groups]


def _follows(group: list[torch.Tensor], blocks: torch.Tensor) -> bool:
    last = group[-1]
    if blocks.shape != last.shape or blocks.dtype != last.dtype or blocks.stride() != last.stride():
        return False
    if blocks.device != last.device or blocks.untyped_storage().data_ptr() != last.untyped_storage().data_ptr():
        return False
    gap = blocks.storage_offset() - last.storage_offset()
    return gap > 0 and (len(group) == 1 or gap == last.storage_offset() - group[-2].storage_offset())


def _stack(group: list[torch.Tensor]) -> torch.Tensor:
    first = group[0]
    gap = group[1].storage_offset() - first.storage_offset() if len(group) > 1 else first.numel()
    return first.as_strided((len(group), *first.shape), (gap, *first.stride()), first.storage_offset())
