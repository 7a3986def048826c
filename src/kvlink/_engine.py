"""Thin typed objects over the engine's C API (``src/engine/engine.h``).

Nothing here decides anything: these classes own handles, convert units (seconds in Python, milliseconds in C) and turn
statuses into exceptions. A handle belongs to the process that made it: after a fork every call raises ForkedError. The
classes are thread-safe, and a handle is released exactly once, when its object is collected.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any

from . import _forks
from ._calls import milliseconds, new_error, read_blob
from ._engine_link import GET, PUT, EnginePeer, EngineTransfer
from ._engine_types import Attributes, Capability, EngineResult, EngineStatistics
from ._native import ffi, lib
from ._status import Status, c_text, raise_status, status_error
from .errors import ClosedError

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

HOST, DEVICE = 0, 1
INITIATOR, ACCEPTOR = 0, 1
READ, WRITE = 1, 2

_DRAIN_ROOM = 256

_STATISTICS = tuple(EngineStatistics.__dataclass_fields__)

_cache_lock = threading.Lock()
_providers: dict[str, EngineProvider] = {}


def _forget_parent() -> None:
    global _cache_lock
    _cache_lock = threading.Lock()  # the parent may have held it at the moment of the fork
    _providers.clear()


os.register_at_fork(after_in_child=_forget_parent)


class EngineProvider:
    """A provider library, loaded once and never unloaded."""

    __slots__ = ("_generation", "_handle", "name", "path", "path_names", "version", "wire_version")

    def __init__(self, handle: Any, path: str) -> None:
        self._handle = handle
        self._generation = _forks.generation
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
                out, err = ffi.new("kve_provider **"), new_error()
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
        err = new_error()
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
        "_generation",
        "_handle",
        "_lock",
        "attributes",
        "event_fd",
        "provider",
        "unwritable",
    )

    def __init__(self, handle: Any, provider: EngineProvider) -> None:
        self._handle = handle
        self._generation = _forks.generation
        self._closed = False
        self._lock = threading.Lock()
        self._drain_ids = ffi.new("uint64_t[]", _DRAIN_ROOM)
        self.provider = provider
        self.unwritable: frozenset[int] = frozenset()  # handles of memory that this process itself may not write
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
                "default_timeout_ms": milliseconds(default_timeout),
                "cancel_grace_ms": milliseconds(cancel_grace),
                "option_count": len(keep),
                "options": table,
                "device": c_device,
            },
        )
        out, err = ffi.new("kve_channel **"), new_error()
        status = lib.kve_channel_open(provider._handle, params, out, err)
        if status:
            raise_status(err, "open", status=status)
        return cls(out[0], provider)

    def _query(self) -> Attributes:
        attr, err = ffi.new("kvl_attr *", {"struct_size": ffi.sizeof("kvl_attr")}), new_error()
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
        if self._generation != _forks.generation:
            raise _forks.forked(operation)
        if self._closed:
            raise ClosedError("the channel is closed", operation=operation)

    def drain(self) -> list[int]:
        """Returns the ids of transfers that finished since the last call and asked for it. Never blocks.

        Raises:
            ForkedError: Called in a child process.
        """
        if self._generation != _forks.generation:
            raise _forks.forked("drain")
        finished: list[int] = []
        with self._lock:
            while True:
                count = lib.kve_channel_drain(self._handle, self._drain_ids, _DRAIN_ROOM)
                finished += ffi.unpack(self._drain_ids, count)
                if count < _DRAIN_ROOM:
                    return finished

    def close(self, grace: float = 1.0) -> None:
        """Closes peers, memory and engine; ends every transfer. Blocks up to about ``grace`` seconds. Idempotent.

        Raises:
            EngineError: A provider call hangs; the engine was abandoned.
        """
        if self._generation != _forks.generation:
            return
        self._closed = True
        err = new_error()
        status = lib.kve_channel_close(self._handle, milliseconds(grace), err)
        if status:
            raise_status(err, "close channel", status=status)

    def __del__(self) -> None:
        if getattr(self, "_generation", None) == _forks.generation:
            lib.kve_channel_release(self._handle)  # closes it when it is open

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
        table, count, err = ffi.new("kvl_stat[]", room), ffi.new("uint32_t *", room), new_error()
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
        out, err = ffi.new("uint64_t *"), new_error()
        status = lib.kve_mem_alloc(self._handle, kind, nbytes, out, err)
        if status:
            raise_status(err, "allocate", status=status)
        return int(out[0])

    def mem_free(self, address: int) -> None:
        """Gives memory of :meth:`mem_alloc` back; after its region was closed."""
        if self._generation == _forks.generation:
            lib.kve_mem_free(self._handle, address)

    def mem_open(self, address: int, nbytes: int, kind: int, device: int, access: int, *, writable: bool = True) -> int:
        """Registers memory.

        Args:
            address: Where it starts.
            nbytes: Its bytes.
            kind: HOST or DEVICE.
            device: Device index; -1 for host memory.
            access: READ and WRITE, or-ed: what peers may do.
            writable: Whether this process may write it; if not, a get into it is refused.

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
        out, err = ffi.new("uint32_t *"), new_error()
        status = lib.kve_mem_open(self._handle, desc, out, err)
        if status:
            raise_status(err, "register", status=status)
        handle = int(out[0])
        if not writable:
            with self._lock:
                self.unwritable |= {handle}
        return handle

    def mem_export(self, handle: int) -> bytes:
        """Returns the blob a peer needs to address registered memory.

        Raises:
            KvlinkError: The provider cannot export it.
        """
        self._check("register")
        return read_blob(
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
        err = new_error()
        status = lib.kve_mem_close(self._handle, handle, milliseconds(timeout), err)
        if status:
            raise_status(err, "close region", status=status)
        if handle in self.unwritable:
            with self._lock:
                self.unwritable -= {handle}

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
        err = new_error()
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
        out, err = ffi.new("kve_peer **"), new_error()
        status = lib.kve_peer_open(self._handle, params, out, err)
        if status:
            raise_status(err, "connect", peer=peer_id, status=status)
        return EnginePeer(out[0], self, peer_id)
