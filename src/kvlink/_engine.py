"""Thin typed objects over the engine's C API (``src/engine/engine.h``).

Nothing here decides anything: these classes own handles, convert units (seconds in Python, milliseconds in C) and turn
statuses into exceptions. A handle belongs to the process that made it: after a fork every call raises ForkedError. The
classes are thread-safe, and a handle is released exactly once, when its object is collected.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ._engine_types import Attributes, Capability, EngineResult, EngineStatistics
from ._native import ffi, lib
from ._ranges import RANGE, check_ranges
from ._status import Status, c_text, raise_status, status_error
from .errors import ClosedError, EngineError, ForkedError

__all__ = [
    "ACCEPTOR",
    "DEVICE",
    "GET",
    "HOST",
    "INITIATOR",
    "PUT",
    "READ",
    "WRITE",
    "Attributes",
    "Capability",
    "EngineChannel",
    "EnginePeer",
    "EngineProvider",
    "EngineResult",
    "EngineStatistics",
    "EngineTransfer",
    "Status",
    "raise_status",
    "status_error",
]

PUT, GET = 0, 1
HOST, DEVICE = 0, 1
INITIATOR, ACCEPTOR = 0, 1
READ, WRITE = 1, 2

_OPERATIONS = ("put", "get")
_SLICE_MS = 250  # the longest sleep in C, so that Python can handle signals
_MAX_MS = 0xFFFFFFFF
_NOTIFY = 1
_DRAIN_ROOM = 256
_MOST_BLOB_BYTES = 1 << 24

_fork_generation = 0


def _count_fork() -> None:
    global _fork_generation, _cache_lock
    _fork_generation += 1
    _cache_lock = threading.Lock()
    _providers.clear()


os.register_at_fork(after_in_child=_count_fork)


class _Scratch:
    """Output parameters of one call in flight, used again by later calls; ``err`` is clean while it is in the list."""

    __slots__ = ("err", "handle", "length")

    def __init__(self) -> None:
        self.err = ffi.new("kvl_error *", {"struct_size": ffi.sizeof("kvl_error")})
        self.handle = ffi.new("kve_transfer **")
        self.length = ffi.new("uint64_t *")


_scratches: list[_Scratch] = []


def _take_scratch() -> _Scratch:
    try:
        return _scratches.pop()
    except IndexError:
        return _Scratch()


def _new_error() -> Any:
    return ffi.new("kvl_error *", {"struct_size": ffi.sizeof("kvl_error")})


def _milliseconds(seconds: float) -> int:
    """Converts a timeout; rounds up, so that a positive one never becomes "none given"."""
    if seconds >= _MAX_MS / 1000:
        return _MAX_MS
    return max(0, math.ceil(seconds * 1000))


def _forked(operation: str) -> ForkedError:
    return ForkedError(
        "this handle was made before the process forked; open a new channel in the child", operation=operation
    )


_STATISTICS = tuple(EngineStatistics.__dataclass_fields__)

_cache_lock = threading.Lock()
_providers: dict[str, EngineProvider] = {}


class EngineProvider:
    """A provider library, loaded once and never unloaded."""

    __slots__ = ("_generation", "_handle", "name", "path", "path_names", "version", "wire_version")

    def __init__(self, handle: Any, path: str) -> None:
        self._handle = handle
        self._generation = _fork_generation
        self.path = path
        self.name = c_text(lib.kve_provider_name(handle))
        self.version = c_text(lib.kve_provider_version(handle))
        self.wire_version = int(lib.kve_provider_wire_version(handle))
        self.path_names: tuple[str, ...] = tuple(
            c_text(lib.kve_provider_path_name(handle, index)) for index in range(lib.kve_provider_path_count(handle))
        )

    @classmethod
    def load(cls, path: str) -> EngineProvider:
        """Loads a provider library; the same path gives the same object.

        Args:
            path: Absolute path of the shared library.

        Raises:
            ChannelUnavailableError: It cannot be loaded, is no provider, or has another ABI; says which.
        """
        path = os.path.realpath(path)
        with _cache_lock:
            known = _providers.get(path)
            if known is None:
                out, err = ffi.new("kve_provider **"), _new_error()
                status = lib.kve_provider_load(os.fsencode(path), out, err)
                if status:
                    raise_status(err, "load", status=status)
                known = _providers[path] = cls(out[0], path)
            return known

    def probe(self) -> None:
        """Asks whether this host can use it. May load vendor libraries; :func:`kvlink.probe` does it in a child.

        Raises:
            ChannelUnavailableError: Not usable; says why.
        """
        err = _new_error()
        status = lib.kve_provider_probe(self._handle, err)
        if status:
            raise_status(err, "probe", status=status)

    def path_name(self, index: int) -> str:
        """Returns the name of a path by its number in a result."""
        return self.path_names[index] if index < len(self.path_names) else f"path {index}"


class EngineChannel:
    """One open provider engine with its thread."""

    __slots__ = (
        "__weakref__",
        "_closed",
        "_drain_ids",
        "_drain_lock",
        "_generation",
        "_handle",
        "attributes",
        "event_fd",
        "provider",
    )

    def __init__(self, handle: Any, provider: EngineProvider) -> None:
        self._handle = handle
        self._generation = _fork_generation
        self._closed = False
        self._drain_lock = threading.Lock()
        self._drain_ids = ffi.new("uint64_t[]", _DRAIN_ROOM)
        self.provider = provider
        self.attributes = self._query()
        self.event_fd = int(lib.kve_channel_event_fd(handle))

    @classmethod
    def open(
        cls,
        provider: EngineProvider,
        *,
        options: Mapping[str, str],
        device: str = "cpu",
        default_timeout: float = 60.0,
        cancel_grace: float = 1.0,
    ) -> EngineChannel:
        """Opens an engine of a provider.

        Args:
            provider: A loaded provider.
            options: The provider's options, as text.
            device: "cpu", "npu:0".
            default_timeout: Deadline in seconds of a transfer whose caller gives none.
            cancel_grace: Seconds that a cancel may take after a deadline before the link is closed.

        Raises:
            ConfigError: An option is unknown or has a bad value.
            ChannelUnavailableError: This host cannot use the provider.
            KvlinkError: Whatever else the provider reports.
        """
        keep = [
            (ffi.new("char[]", name.encode()), ffi.new("char[]", value.encode())) for name, value in options.items()
        ]
        table = ffi.new("kvl_option[]", [{"name": name, "value": value} for name, value in keep])
        c_device = ffi.new("char[]", device.encode())
        params = ffi.new(
            "kve_channel_params *",
            {
                "struct_size": ffi.sizeof("kve_channel_params"),
                "default_timeout_ms": _milliseconds(default_timeout),
                "cancel_grace_ms": _milliseconds(cancel_grace),
                "option_count": len(keep),
                "options": table,
                "device": c_device,
            },
        )
        out, err = ffi.new("kve_channel **"), _new_error()
        status = lib.kve_channel_open(provider._handle, params, out, err)
        if status:
            raise_status(err, "open", status=status)
        return cls(out[0], provider)

    def _query(self) -> Attributes:
        attr, err = ffi.new("kvl_attr *", {"struct_size": ffi.sizeof("kvl_attr")}), _new_error()
        status = lib.kve_channel_query(self._handle, attr, err)
        if status:
            raise_status(err, "open", status=status)
        return Attributes(
            connect_both=bool(attr.connect_mode),
            max_connects=attr.max_connects,
            max_links=attr.max_links,
            capabilities=Capability(attr.caps),
            memory_kinds=attr.memory_kinds,
            alignment=attr.alignment,
            memory_alignment=attr.memory_alignment,
            max_ranges=attr.max_ranges,
            max_range_bytes=attr.max_range_bytes,
            max_describe=attr.max_describe,
            max_export=attr.max_export,
            exclusion_group=c_text(attr.exclusion_group),
        )

    def _check(self, operation: str) -> None:
        if self._generation != _fork_generation:
            raise _forked(operation)
        if self._closed:
            raise ClosedError("the channel is closed", operation=operation)

    def drain(self) -> list[int]:
        """Returns the ids of transfers that finished since the last call and asked for it. Never blocks.

        Raises:
            ForkedError: Called in a child process.
        """
        if self._generation != _fork_generation:
            raise _forked("drain")
        finished: list[int] = []
        with self._drain_lock:
            while True:
                count = lib.kve_channel_drain(self._handle, self._drain_ids, _DRAIN_ROOM)
                finished += self._drain_ids[0:count]
                if count < _DRAIN_ROOM:
                    return finished

    def close(self, grace: float = 1.0) -> None:
        """Closes peers, memory and engine; ends every transfer. Blocks up to about ``grace`` seconds. Idempotent.

        Raises:
            EngineError: A provider call hangs; the engine was abandoned.
        """
        if self._generation != _fork_generation:
            return
        self._closed = True
        err = _new_error()
        status = lib.kve_channel_close(self._handle, _milliseconds(grace), err)
        if status:
            raise_status(err, "close channel", status=status)

    def __del__(self) -> None:
        if getattr(self, "_generation", None) != _fork_generation:
            return  # never opened completely, or a child's copy
        if not self._closed:
            lib.kve_channel_close(self._handle, 100, ffi.NULL)
        lib.kve_channel_release(self._handle)

    def statistics(self) -> EngineStatistics:
        """Returns the engine's counters.

        Raises:
            ClosedError: The channel is closed.
        """
        self._check("statistics")
        out = ffi.new("kve_statistics *", {"struct_size": ffi.sizeof("kve_statistics")})
        status = lib.kve_channel_statistics(self._handle, out)
        if status:
            raise status_error(status, "", "statistics")
        return EngineStatistics(*(int(getattr(out, name)) for name in _STATISTICS))

    def provider_statistics(self) -> dict[str, int]:
        """Returns the provider's own counters by name; empty when it keeps none.

        Raises:
            ClosedError: The channel is closed.
        """
        self._check("statistics")
        if Capability.STATISTICS not in self.attributes.capabilities:
            return {}
        room = 64
        table, count, err = ffi.new("kvl_stat[]", room), ffi.new("uint32_t *", room), _new_error()
        status = lib.kve_channel_provider_stats(self._handle, table, count, err)
        if status:
            raise_status(err, "statistics", status=status)
        return {c_text(table[index].name): int(table[index].value) for index in range(min(count[0], room))}

    # ---- memory ----

    def mem_alloc(self, kind: int, nbytes: int) -> int:
        """Allocates zeroed memory that the provider moves fastest.

        Args:
            kind: HOST or DEVICE.
            nbytes: At least so many bytes.

        Returns:
            Its address.

        Raises:
            UnsupportedError: The provider allocates no memory of that kind.
            KvlinkError: It ran out.
        """
        self._check("allocate")
        out, err = ffi.new("uint64_t *"), _new_error()
        status = lib.kve_mem_alloc(self._handle, kind, nbytes, out, err)
        if status:
            raise_status(err, "allocate", status=status)
        return int(out[0])

    def mem_free(self, address: int) -> None:
        """Gives memory of :meth:`mem_alloc` back; after its region was closed."""
        if self._generation == _fork_generation:
            lib.kve_mem_free(self._handle, address)

    def mem_open(self, address: int, nbytes: int, kind: int, device: int, access: int) -> int:
        """Registers memory.

        Args:
            address: Where it starts.
            nbytes: Its bytes.
            kind: HOST or DEVICE.
            device: Device index; -1 for host memory.
            access: READ and WRITE, or-ed: what peers may do.

        Returns:
            The handle, as RANGE takes it.

        Raises:
            ConfigError: The provider cannot register such memory.
            KvlinkError: Whatever else it reports.
        """
        self._check("register")
        desc = ffi.new(
            "kvl_mem_desc *",
            {
                "struct_size": ffi.sizeof("kvl_mem_desc"),
                "kind": kind,
                "device": device,
                "access": access,
                "address": address,
                "length": nbytes,
            },
        )
        out, err = ffi.new("uint32_t *"), _new_error()
        status = lib.kve_mem_open(self._handle, desc, out, err)
        if status:
            raise_status(err, "register", status=status)
        return int(out[0])

    def mem_export(self, handle: int) -> bytes:
        """Returns the blob a peer needs to address registered memory.

        Raises:
            KvlinkError: The provider cannot export it.
        """
        self._check("register")
        return _read_blob(
            lambda buffer, length, err: lib.kve_mem_export(self._handle, handle, buffer, length, err), "register"
        )

    def mem_close(self, handle: int, timeout: float) -> None:
        """Unregisters memory: refuses new transfers, cancels those in flight and waits for them.

        Args:
            handle: Of :meth:`mem_open`.
            timeout: Seconds to wait.

        Raises:
            BusyError: It is still in use and stays registered; close the peers concerned, then call again.
        """
        self._check("close region")
        err = _new_error()
        status = lib.kve_mem_close(self._handle, handle, _milliseconds(timeout), err)
        if status:
            raise_status(err, "close region", status=status)

    def mem_copy(self, handle: int, offset: int, host: Any, *, to_region: bool) -> None:
        """Copies between host memory and registered memory that the CPU cannot touch. Blocks.

        Args:
            handle: Of :meth:`mem_open`.
            offset: Where in the region, in bytes.
            host: A C-contiguous buffer; writable when it is the destination. All of it is copied.
            to_region: The direction.

        Raises:
            UnsupportedError: The provider lacks ``COPY``.
            ConfigError: Outside the region.
        """
        self._check("copy")
        err = _new_error()
        with ffi.from_buffer("char[]", host, require_writable=not to_region) as buffer:
            status = lib.kve_mem_copy(self._handle, handle, offset, buffer, len(buffer), int(to_region), err)
        if status:
            raise_status(err, "copy", status=status)

    def peer_open(
        self,
        role: int,
        epoch: int,
        session: bytes,
        session_key: bytes,
        local_id: str,
        peer_id: str,
    ) -> EnginePeer:
        """Makes one link; no I/O with the peer yet.

        Args:
            role: INITIATOR or ACCEPTOR.
            epoch: Grows with every link of a channel.
            session: 16 bytes, equal on both sides, fresh for every attempt.
            session_key: 32 secret bytes, equal on both sides.
            local_id: This channel's id, at most 63 bytes.
            peer_id: The peer's id, at most 63 bytes.

        Raises:
            ConnectError: The provider has no room for another link.
        """
        self._check("connect")
        if len(session) != 16 or len(session_key) != 32:
            raise ValueError("session must have 16 bytes and session_key 32")
        params = ffi.new(
            "kvl_link_params *",
            {
                "struct_size": ffi.sizeof("kvl_link_params"),
                "role": role,
                "epoch": epoch,
                "session": session,
                "session_key": session_key,
                "local_id": local_id.encode()[:63],
                "peer_id": peer_id.encode()[:63],
            },
        )
        out, err = ffi.new("kve_peer **"), _new_error()
        status = lib.kve_peer_open(self._handle, params, out, err)
        if status:
            raise_status(err, "connect", peer=peer_id, status=status)
        return EnginePeer(out[0], self, peer_id)


def _read_blob(call: Any, operation: str, peer: str | None = None) -> bytes:
    """The two-call idiom: ask for the size, then for the bytes; a blob that grew in between is asked for again."""
    room = 512
    while True:
        buffer, length, err = ffi.new("char[]", room), ffi.new("uint64_t *", room), _new_error()
        status = call(buffer, length, err)
        if status == 0:
            return bytes(ffi.buffer(buffer, length[0]))
        if status != Status.NO_RESOURCE or not room < length[0] <= _MOST_BLOB_BYTES:
            raise_status(err, operation, peer=peer, status=status)
        room = int(length[0])


class EnginePeer:
    """One link to a remote channel."""

    __slots__ = ("__weakref__", "_closed", "_generation", "_handle", "channel", "peer_id")

    def __init__(self, handle: Any, channel: EngineChannel, peer_id: str) -> None:
        self._handle = handle
        self._generation = _fork_generation
        self._closed = False
        self.channel = channel
        self.peer_id = peer_id

    def _check(self, operation: str) -> None:
        if self._generation != _fork_generation:
            raise _forked(operation)
        if self._closed:
            raise ClosedError("the peer is closed", operation=operation, peer=self.peer_id)

    def describe(self) -> bytes:
        """Returns the blob that the other side's connect needs.

        Raises:
            ConnectError: The provider cannot describe the link.
        """
        self._check("connect")
        return _read_blob(
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
        err = _new_error()
        status = lib.kve_peer_connect(self._handle, blob, len(blob), max(1, _milliseconds(timeout)), err)
        if status:
            raise_status(err, "connect", peer=self.peer_id, status=status)

    def interrupt(self) -> None:
        """Makes a blocked :meth:`connect` fail soon, where the provider can."""
        if self._generation == _fork_generation:
            lib.kve_peer_interrupt(self._handle)

    def check(self) -> None:
        """Checks the data path. Never blocks.

        Raises:
            PeerLost: It is dead; says why.
            ClosedError: This side closed it.
        """
        self._check("check")
        err = _new_error()
        status = lib.kve_peer_check(self._handle, err)
        if status and status != Status.UNSUPPORTED:
            raise_status(err, "check", peer=self.peer_id, status=status)

    def close(self, status: int = Status.LINK_DOWN, message: str = "", grace: float = 1.0) -> None:
        """Closes the link; its transfers end with ``status`` and ``message``. Blocks up to about ``grace`` seconds.

        Idempotent, and harmless in a child process.
        """
        if self._generation != _fork_generation:
            return
        self._closed = True
        lib.kve_peer_close(self._handle, status, message.encode()[:400], _milliseconds(grace))

    def __del__(self) -> None:
        if getattr(self, "_generation", None) == _fork_generation:
            if not self._closed:
                lib.kve_peer_close(self._handle, Status.CANCELLED, b"the peer object was dropped", 100)
            lib.kve_peer_release(self._handle)

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
        out, err = ffi.new("uint32_t *"), _new_error()
        status = lib.kve_rmem_open(
            self._handle, blob, len(blob), nbytes, access, max(1, _milliseconds(timeout)), out, err
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
        err = _new_error()
        status = lib.kve_rmem_close(self._handle, handle, _milliseconds(timeout), err)
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
        if self._generation != _fork_generation:
            raise _forked(_OPERATIONS[op])
        try:
            if ranges.dtype != RANGE or ranges.ndim != 1:
                check_ranges(ranges)
            pointer = ffi.from_buffer("kvl_range[]", ranges)
        except (AttributeError, BufferError, ValueError, TypeError):
            check_ranges(ranges)
            raise
        scratch = _take_scratch()
        status = lib.kve_submit(
            self._handle,
            op,
            pointer,
            len(pointer),
            stream,
            0 if timeout is None else max(1, _milliseconds(timeout)),
            _NOTIFY if notify else 0,
            scratch.handle,
            scratch.err,
        )
        if status:
            if self._closed:
                raise ClosedError("the peer is closed", operation=_OPERATIONS[op], peer=self.peer_id)
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
        self._generation = _fork_generation

    @property
    def id(self) -> int:
        """The number that :meth:`EngineChannel.drain` reports."""
        if self._generation != _fork_generation:
            raise _forked("id")
        return int(lib.kve_transfer_id(self._handle))

    def done(self) -> bool:
        """Whether it finished, well or not. Never blocks."""
        if self._generation != _fork_generation:
            raise _forked("done")
        return bool(lib.kve_transfer_done(self._handle))

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until it finished.

        Args:
            timeout: Seconds; None waits for its end, which its own deadline bounds.

        Returns:
            True when it finished, well or not.
        """
        if self._generation != _fork_generation:
            raise _forked("wait")
        left = _MAX_MS if timeout is None else _milliseconds(timeout)
        # Slices, not a clock: each full slice slept is at least its length, so the sum cannot fall short.
        while left > _SLICE_MS:
            if lib.kve_transfer_wait(self._handle, _SLICE_MS):
                return True
            if timeout is not None:
                left -= _SLICE_MS
        return bool(lib.kve_transfer_wait(self._handle, left))

    def notify(self) -> None:
        """Report its end through the channel's event descriptor; at once when it has finished."""
        if self._generation != _fork_generation:
            raise _forked("notify")
        lib.kve_transfer_notify(self._handle)

    def cancel(self) -> None:
        """Asks for its end; it still finishes once, with its true status."""
        if self._generation != _fork_generation:
            raise _forked("cancel")
        lib.kve_transfer_cancel(self._handle)

    def result(self) -> EngineResult:
        """Returns how it ended; status AGAIN while it has not.

        Raises:
            EngineError: The engine does not know it.
        """
        if self._generation != _fork_generation:
            raise _forked("result")
        out = ffi.new("kve_result *", {"struct_size": ffi.sizeof("kve_result")})
        status = lib.kve_transfer_result(self._handle, out)
        if status not in (Status.OK, Status.AGAIN):
            raise EngineError(f"no result: status {status}", operation="result")
        return EngineResult(
            status=int(out.status),
            path=self._provider.path_name(out.path),
            vendor_code=int(out.vendor_code),
            nbytes=int(out.bytes),
            ranges=int(out.ranges),
            duration=out.duration_ns / 1e9,
            site=c_text(out.site),
            message=c_text(out.message),
        )

    def __del__(self) -> None:
        if self._generation == _fork_generation:
            lib.kve_transfer_release(self._handle)
