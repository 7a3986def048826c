"""Bytes that are known from a seed and an offset, so that a whole region can be compared without keeping a copy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


class Patch(NamedTuple):
    """``length`` bytes at ``offset`` that hold the pattern of ``seed`` from ``source`` on. All in bytes."""

    offset: int
    seed: int
    source: int
    length: int


def pattern(seed: int, offset: int, length: int) -> Bytes:
    """Returns ``length`` bytes of the endless pattern of ``seed``, from ``offset`` on."""
    first, last = offset // 8, (offset + length + 7) // 8
    words = np.arange(first, last, dtype=np.uint64)
    words *= np.uint64(0x9E3779B97F4A7C15)
    words += np.uint64((seed * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64)
    words ^= words >> np.uint64(29)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(32)
    start = offset - first * 8
    return words.view(np.uint8)[start : start + length]


def expected(seed: int, length: int, patches: Iterable[Sequence[int]] = ()) -> Bytes:
    """Returns what a region of ``length`` bytes holds: the pattern of ``seed``, with patches over it in order."""
    content = pattern(seed, 0, length).copy()
    for offset, patch_seed, source, size in patches:
        content[offset : offset + size] = pattern(patch_seed, source, size)
    return content


def first_difference(got: Bytes, want: Bytes) -> str | None:
    """Compares two arrays of the same length.

    Returns:
        None when equal, else where the first difference is, both bytes there, and how many differ.
    """
    if np.array_equal(got, want):
        return None
    different = np.flatnonzero(got != want)
    at = int(different[0])
    return (
        f"{len(different)} of {len(want)} bytes differ, the first at offset {at}: "
        f"{int(got[at]):#04x} instead of {int(want[at]):#04x}, the last at {int(different[-1])}"
    )
