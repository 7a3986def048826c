"""Registered local memory."""

from __future__ import annotations

import ctypes
import logging
import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import _forks
from ._memory import HOST, MemoryView, access_name, parse_access
from .errors import BusyError, ClosedError, TransferTimeout, UnsupportedError

if TYPE_CHECKING:
    from ._engine import EngineChannel
    from .control.hub import Hub
    from .control.published import Holder

_log = logging.getLogger("kvlink")


class Region:
    """Registered local memory; made by ``Channel.register`` and ``Channel.allocate``. Thread-safe.

    Attributes:
        name: The name that peers see.
        nbytes: Its size.
        device: Where it is: "cpu", "npu:0".
        access: What peers may do: "r", "w" or "rw".
        handle: The integer that stands for it in ``kvlink.RANGE``.
        address: Where it starts.
        closed: Whether ``close`` has begun.
    """

    def __init__(
        self,
        hub: Hub,
        engine: EngineChannel,
        forget: Callable[[Region], None],
        *,
        name: str,
        access: str,
        handle: int,
        view: MemoryView,
    ) -> None:
        self.name = name
        self.access = access_name(parse_access(access))
        self.nbytes = view.nbytes
        self.device = view.device_name
        self.handle = handle
        self.address = view.address
        self.closed = False
        self._hub = hub
        self._engine = engine
        self._forget = forget
        self._kind = view.kind
        self._keepalive: Any = view.keepalive
        self._registered = True
        self._held = False
        self._lock = threading.Lock()
        self._generation = _forks.generation

    def buffer(self) -> memoryview:
        """Return the memory itself, writable, as bytes; ``numpy.frombuffer`` and ``torch.frombuffer`` take it.

        Views of memory from ``Channel.allocate`` may be used until the channel is closed, not afterwards.

        Raises:
            UnsupportedError: It is device memory.
            ClosedError: The region is closed.
            ForkedError: Called in a child process.
        """
        if self._generation != _forks.generation:
            raise _forks.forked("buffer")
        if self.closed:
            raise ClosedError(f"region {self.name!r} is closed", operation="buffer")
        if self._kind != HOST:
            raise UnsupportedError(f"region {self.name!r} is on {self.device}; the CPU cannot view it")
        holder = self._keepalive
        if not isinstance(holder, ctypes.Array):
            # The array keeps what it stands for alive, and every view of it keeps the array.
            array = (ctypes.c_ubyte * self.nbytes).from_address(self.address)
            array._kvlink_keepalive = holder  # type: ignore[attr-defined]
            holder = array
        return memoryview(holder).cast("B")

    def close(self, *, timeout: float = 5.0) -> None:
        """Withdraw it from every peer and unregister it. Idempotent.

        Transfers that use it end with ``RegionRevoked`` or ``TransferCancelled``, here and at the peers. Once this has
        returned, nothing of kvlink reads or writes the memory. A peer that does not let go in time gets its link
        closed.

        Args:
            timeout: Seconds for the peers to let go.

        Raises:
            TransferTimeout: A peer process on this host is neither dead nor answering (it may be stopped) and could
                still write into the memory. kvlink keeps a reference to it until that process goes on or ends; call
                again to wait for that.
            BusyError: The provider still uses the memory; call again.
            ForkedError: Called in a child process.
        """
        if self._generation != _forks.generation:
            raise _forks.forked("close region")
        deadline = time.monotonic() + timeout
        self.closed = True
        with self._lock:
            if not self._registered and not self._held:
                return
            try:
                holders = self._hub.loop.run(lambda: self._hub.published.withdraw(self.handle, timeout), timeout + 10.0)
                if self._registered:
                    self._unregister(max(deadline - time.monotonic(), 0.1))
            except ClosedError:  # the channel was closed meanwhile, and all its memory with it
                self._registered = False
                return
            if holders:
                self._hold(holders)
                names = ", ".join(holder.address for holder in holders)
                raise TransferTimeout(
                    f"region {self.name!r}: {names} has not let go within {timeout:g} s and may still write into it; "
                    "its link is closed, and the memory is kept until that process goes on or ends",
                    operation="close region",
                    hint="is that process stopped? call close() again to wait for it",
                )
        self._release()

    def _unregister(self, timeout: float) -> None:
        try:
            self._engine.mem_close(self.handle, timeout)
        except BusyError:
            # A transfer of ours that cannot be stopped, or a provider that binds memory to its links.
            self._hub.loop.run(self._hub.close_all_links, 10.0)
            self._engine.mem_close(self.handle, max(timeout, 1.0))
        self._registered = False
        self._forget(self)

    def _hold(self, holders: list[Holder]) -> None:
        if self._held:
            return
        self._held = True
        self._hub.published.hold(self.nbytes, holders, self._release)
        _log.warning("%s: region %r is kept for %s", self._hub.name, self.name, [holder.address for holder in holders])

    def _release(self) -> None:
        """Nothing can write into the memory any more: give it back."""
        self._held = False
        self._keepalive = None

    def abandon(self, *, keep: bool) -> None:
        """The channel has been closed. Internal.

        Args:
            keep: A peer may still write into the memory, so it must not be given back, ever.
        """
        self.closed = True
        self._registered = False
        if keep:
            _kept_forever.append(self._keepalive)
        self._release()

    def __repr__(self) -> str:
        state = " closed" if self.closed else ""
        return f"<Region {self.name!r} {self.nbytes} bytes {self.access} on {self.device}{state}>"


_kept_forever: list[Any] = []


def allocated_view(engine: EngineChannel, address: int, nbytes: int, kind: int, device: int, name: str) -> MemoryView:
    """Describe memory of ``mem_alloc`` so that it is freed when the last view of it has gone. Internal."""
    holder: Any = (ctypes.c_ubyte * nbytes).from_address(address) if kind == HOST else _Token()
    weakref.finalize(holder, engine.mem_free, address).atexit = False
    return MemoryView(address, nbytes, kind, device, name, False, holder)


class _Token:
    """Stands for device memory; its end frees it."""
