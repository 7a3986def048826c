"""Chunks that stay at the prefiller and are more than the decoder's buffer holds.

They are read window by window while the engine copies them into its paged cache, the next window on its way meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import kvlink

from ..buffer import PDBuffer
from .ledger import Entry


class ChunkLost(RuntimeError):
    """A chunk could not be read while the engine copied its neighbours; the engine has to compute all of them."""


@dataclass(eq=False)
class Reading:
    """One window on its way.

    Attributes:
        items: Its memory objects.
        transfer: The read.
        finish: Waits for it and checks with the prefiller that what was read is whole.
    """

    items: list[Any]
    transfer: kvlink.Transfer
    finish: Callable[[], None]
    whole: bool = False

    def release(self) -> None:
        """Frees the pages once nothing is written to them any more."""
        if not self.whole:
            self.transfer.cancel()
            try:
                self.transfer.wait()
            except Exception:  # however it ended, it has
                pass
        for item in self.items:
            item.ref_count_down()


Start = Callable[[Sequence[Entry], list[Any]], Reading]


class Windows:
    """The chunks of one load, in the order in which the engine copies them. Used on the engine's thread."""

    def __init__(self, entries: Sequence[Entry], buffer: PDBuffer, start: Start, give_up: Callable[[], None]) -> None:
        """Cuts the chunks into windows; nothing is read yet.

        Args:
            entries: Handed out to the engine, all of one hand-off's prefiller.
            buffer: Whose free pages the windows use.
            start: Starts to read entries into memory objects.
            give_up: Called when a read failed.
        """
        size = max(1, min(buffer.free_pages // 2, 32))
        self._buffer = buffer
        self._start = start
        self._give_up = give_up
        self._windows = [list(entries[first : first + size]) for first in range(0, len(entries), size)]
        self._size = size
        self._readings: dict[int, Reading] = {}
        self._left = len(entries)
        self._lock = threading.Lock()
        self.items = [RemoteChunk(self, index, entry, buffer) for index, entry in enumerate(entries)]

    def item(self, index: int) -> Any:
        """Returns the memory object of a chunk, read by now; those of windows before are gone.

        Args:
            index: Its place.

        Raises:
            ChunkLost: It could not be read.
        """
        number = index // self._size
        try:
            for passed in [other for other in self._readings if other < number]:
                self._readings.pop(passed).release()
            reading = self._begin(number)
            if number + 1 < len(self._windows) and len(self._windows[number + 1]) <= self._buffer.free_pages:
                self._begin(number + 1)
            if not reading.whole:
                reading.finish()
                reading.whole = True
        except Exception as error:
            self.close()
            self._give_up()
            raise ChunkLost(
                f"chunk {index} of {len(self.items)} could not be read from the prefiller: {error}"
            ) from error
        return reading.items[index - number * self._size]

    def _begin(self, number: int) -> Reading:
        if number not in self._readings:
            entries = self._windows[number]
            items = self._buffer.take([entry.tokens for entry in entries])
            if items is None:
                raise ChunkLost(f"no {len(entries)} of the decoder's {self._buffer.total} PD pages are free")
            try:
                self._readings[number] = self._start(entries, items)
            except BaseException:
                for item in items:
                    item.ref_count_down()
                raise
        return self._readings[number]

    def dropped(self) -> None:
        """The engine needs one chunk less."""
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self.close()

    def close(self) -> None:
        """Frees all pages."""
        readings, self._readings = list(self._readings.values()), {}
        for reading in readings:
            reading.release()


class RemoteChunk:
    """Stands for a memory object whose bytes come when they are looked at."""

    def __init__(self, windows: Windows, index: int, entry: Entry, buffer: PDBuffer) -> None:
        self._windows = windows
        self._index = index
        self._bytes: int = buffer.chunk_shape(entry.tokens).numel() * buffer.dtype.itemsize
        self._count = 1
        self.is_pinned = False

    def get_size(self) -> int:
        """Returns its bytes, without reading them."""
        return self._bytes

    def ref_count_up(self) -> None:
        """Counts a reference."""
        self._count += 1

    def ref_count_down(self) -> None:
        """Drops a reference; the last chunk's last one frees the windows' pages."""
        self._count -= 1
        if self._count == 0:
            self._windows.dropped()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._windows.item(self._index), name)
