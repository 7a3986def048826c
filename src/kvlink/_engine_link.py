"""Peers and transfers of the engine's C API: the part of it that a transfer runs through."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from . import _forks
from ._calls import MAX_MS, milliseconds, new_error, read_blob
from ._engine_types import EngineResult
from ._native import ffi, lib
from ._ranges import RANGE, check_ranges, refuse_unwritable
from ._status import Status, c_text, raise_status
from .errors import ClosedError, EngineError

if TYPE_CHECKING:
    from ._engine import EngineChannel, EngineProvider

PUT, GET = 0, 1

_OPERATIONS = ("put", "get")
_SLICE_MS = 250  # the longest sleep in C, so that Python can handle signals
_NOTIFY = 1


class _Scratch:
    """Output parameters of one call in flight, used again by later calls; ``err`` is clean while it is in the list."""

    __slots__ = ("err", "handle")

    def __init__(self) -> None:
        self.err = new_error()
        self.handle = ffi.new("kve_transfer **")


_scratches: list[_Scratch] = []
_results: list[Any] = []  # `kve_result *` that nobody reads at the moment


def _take_scratch() -> _Scratch:
    try:
        return _scratches.pop()
    except IndexError:
        return _Scratch()


class EnginePeer:
    """One link to a remote channel."""

    __slots__ = ("__weakref__", "_closed", "_generation", "_handle", "channel", "peer_id")

    def __init__(self, handle: Any, channel: EngineChannel, peer_id: str) -> None:
        self._handle = handle
        self._generation = _forks.generation
        self._closed = False
        self.channel = channel
        self.peer_id = peer_id

    def _check(self, operation: str) -> None:
        if self._generation != _forks.generation:
            raise _forks.forked(operation)
        if self._closed:
            raise ClosedError("the peer is closed", operation=operation, peer=self.peer_id)

    def describe(self) -> bytes:
        """Returns the blob that the other side's connect needs.

        Raises:
            ConnectError: The provider cannot describe the link.
        """
        self._check("connect")
        return read_blob(
            lambda buffer, length, err: lib.kve_peer_describe(self._handle, buffer, length, err),
            "connect",
            self.peer_id,
        )

    def connect(self, blob: bytes, timeout: float) -> None:
        """Connects to the peer that ``blob`` describes. Blocks up to ``timeout`` seconds.

        Raises:
            ConnectError: It failed, or was interrupted; the link may only be closed then.
            ConnectTimeout: No connection in time.
        """
        self._check("connect")
        err = new_error()
        status = lib.kve_peer_connect(self._handle, blob, len(blob), max(1, milliseconds(timeout)), err)
        if status:
            raise_status(err, "connect", peer=self.peer_id, status=status)

    def interrupt(self) -> None:
        """Makes a blocked :meth:`connect` fail soon, where the provider can."""
        if self._generation == _forks.generation:
            lib.kve_peer_interrupt(self._handle)

    def check(self) -> None:
        """Checks the data path. Never blocks.

        Raises:
            PeerLost: It is dead; says why.
            ClosedError: This side closed it.
        """
        self._check("check")
        err = new_error()
        status = lib.kve_peer_check(self._handle, err)
        if status and status != Status.UNSUPPORTED:
            raise_status(err, "check", peer=self.peer_id, status=status)

    def close(self, status: int = Status.LINK_DOWN, message: str = "", grace: float = 1.0) -> None:
        """Closes the link; its transfers end with ``status`` and ``message``. Blocks up to about ``grace`` seconds.

        Idempotent, and harmless in a child process.
        """
        if self._generation != _forks.generation:
            return
        self._closed = True
        lib.kve_peer_close(self._handle, status, message.encode()[:400], milliseconds(grace))

    def __del__(self) -> None:
        if getattr(self, "_generation", None) == _forks.generation:
            lib.kve_peer_release(self._handle)  # closes it in the background when it is open

    def rmem_open(self, blob: bytes, nbytes: int, access: int, timeout: float) -> int:
        """Imports a region of the peer. May block up to ``timeout`` seconds.

        Args:
            blob: What the peer's mem_export returned.
            nbytes: The region's bytes as the peer published them; transfers are checked against them.
            access: READ and WRITE, or-ed, as published.
            timeout: Seconds.

        Returns:
            The handle, as RANGE takes it.

        Raises:
            ConnectError: The blob is not acceptable, or the peer did not answer in time.
            PeerLost: The link is dead.
        """
        self._check("import region")
        out, err = ffi.new("uint32_t *"), new_error()
        status = lib.kve_rmem_open(
            self._handle, blob, len(blob), nbytes, access, max(1, milliseconds(timeout)), out, err
        )
        if status:
            raise_status(err, "import region", peer=self.peer_id, status=status)
        return int(out[0])

    def rmem_close(self, handle: int, timeout: float) -> None:
        """Lets go of a region that the peer withdraws: cancels transfers that use it and waits for them.

        Raises:
            BusyError: Still in use after ``timeout`` seconds; close the peer.
        """
        self._check("close region")
        err = new_error()
        status = lib.kve_rmem_close(self._handle, handle, milliseconds(timeout), err)
        if status:
            raise_status(err, "close region", peer=self.peer_id, status=status)

    def submit(
        self,
        op: int,
        ranges: npt.NDArray[np.void],
        stream: int = 0,
        timeout: float | None = None,
        notify: bool = False,
    ) -> EngineTransfer:
        """Starts a transfer. Never blocks; the array may change or go as soon as this returned.

        Args:
            op: PUT or GET.
            ranges: One-dimensional C-contiguous array of RANGE; read in place.
            stream: The caller's device stream, or 0.
            timeout: Deadline in seconds from now; None takes the channel's default.
            notify: Report the end through the channel's event descriptor.

        Raises:
            RangeError: The array has another dtype or layout, or a range is outside its region or overflows.
            PeerLost: The link is dead.
            ClosedError: This side closed it.
            UnsupportedError: The provider cannot do that here.
        """
        if self._generation != _forks.generation:
            raise _forks.forked(_OPERATIONS[op])
        try:
            if ranges.dtype != RANGE or ranges.ndim != 1:
                check_ranges(ranges)
            pointer = ffi.from_buffer("kvl_range[]", ranges)
        except (AttributeError, BufferError, ValueError, TypeError):
            check_ranges(ranges)
            raise
        if op == GET and self.channel.unwritable:
            refuse_unwritable(ranges, self.channel.unwritable)
        scratch = _take_scratch()
        status = lib.kve_submit(
            self._handle,
            op,
            pointer,
            len(pointer),
            stream,
            0 if timeout is None else max(1, milliseconds(timeout)),
            _NOTIFY if notify else 0,
            scratch.handle,
            scratch.err,
        )
        if status:
            if self._closed:
                raise ClosedError("the peer is closed", operation=_OPERATIONS[op], peer=self.peer_id)
            if status == Status.DENIED:  # at submit: a range that its regions do not allow; later: one withdrawn since
                status = Status.INVALID
            raise_status(scratch.err, _OPERATIONS[op], peer=self.peer_id, status=status)
        transfer = EngineTransfer(scratch.handle[0], self.channel.provider)
        _scratches.append(scratch)
        return transfer


class EngineTransfer:
    """One submitted array of ranges. It goes on when this object is dropped."""

    __slots__ = ("__weakref__", "_generation", "_handle", "_provider")

    def __init__(self, handle: Any, provider: EngineProvider) -> None:
        self._handle = handle
        self._provider = provider
        self._generation = _forks.generation

    @property
    def id(self) -> int:
        """The number that :meth:`EngineChannel.drain` reports."""
        if self._generation != _forks.generation:
            raise _forks.forked("id")
        return int(lib.kve_transfer_id(self._handle))

    def done(self) -> bool:
        """Whether it finished, well or not. Never blocks."""
        if self._generation != _forks.generation:
            raise _forks.forked("done")
        return bool(lib.kve_transfer_done(self._handle))

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until it finished.

        Args:
            timeout: Seconds; None waits for its end, which its own deadline bounds.

        Returns:
            True when it finished, well or not.
        """
        if self._generation != _forks.generation:
            raise _forks.forked("wait")
        left = MAX_MS if timeout is None else milliseconds(timeout)
        # Slices, not a clock: each full slice slept is at least its length, so the sum cannot fall short.
        while left > _SLICE_MS:
            if lib.kve_transfer_wait(self._handle, _SLICE_MS):
                return True
            if timeout is not None:
                left -= _SLICE_MS
        return bool(lib.kve_transfer_wait(self._handle, left))

    def notify(self) -> None:
        """Report its end through the channel's event descriptor; at once when it has finished."""
        if self._generation != _forks.generation:
            raise _forks.forked("notify")
        lib.kve_transfer_notify(self._handle)

    def cancel(self) -> None:
        """Asks for its end; it still finishes once, with its true status."""
        if self._generation != _forks.generation:
            raise _forks.forked("cancel")
        lib.kve_transfer_cancel(self._handle)

    def result(self) -> EngineResult:
        """Returns how it ended; status AGAIN while it has not.

        Raises:
            EngineError: The engine does not know it.
        """
        if self._generation != _forks.generation:
            raise _forks.forked("result")
        try:
            out = _results.pop()
        except IndexError:
            out = ffi.new("kve_result *", {"struct_size": ffi.sizeof("kve_result")})
        status = lib.kve_transfer_result(self._handle, out)
        if status:
            raise EngineError(f"the engine gives no result: {Status(status).name}", operation="result")
        failed = out.status != 0
        result = EngineResult(
            out.status,
            self._provider.path_name(out.path),
            out.vendor_code,
            out.bytes,
            out.ranges,
            out.duration_ns / 1e9,
            c_text(out.site) if failed else "",
            c_text(out.message) if failed else "",
        )
        _results.append(out)
        return result

    def __del__(self) -> None:
        if self._generation == _forks.generation:
            lib.kve_transfer_release(self._handle)
