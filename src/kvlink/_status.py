"""The one place where a status of the C side becomes an exception of :mod:`kvlink.errors`."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType
from typing import Any, NoReturn

from ._native import ffi
from .errors import (
    AuthenticationError,
    BusyError,
    ChannelUnavailableError,
    ConfigError,
    ConnectError,
    ConnectTimeout,
    EngineError,
    KvlinkError,
    PeerLost,
    RangeError,
    RegionRevoked,
    StateError,
    TransferCancelled,
    TransferError,
    TransferTimeout,
    UnsupportedError,
)


class Status(IntEnum):
    """``enum kvl_status_code`` of provider.h."""

    OK = 0
    DONE = 1
    AGAIN = 2
    INVALID = 3
    STATE = 4
    BUSY = 5
    UNSUPPORTED = 6
    UNAVAILABLE = 7
    NO_RESOURCE = 8
    DENIED = 9
    TIMEOUT = 10
    CANCELLED = 11
    INTERNAL = 12
    REMOTE = 13
    LINK_DOWN = 14
    ENGINE_DOWN = 15


_Map = Mapping[Status, type[KvlinkError]]

# What a status means wherever nothing more is known.
_GENERAL: _Map = MappingProxyType(
    {
        Status.DONE: EngineError,
        Status.AGAIN: BusyError,
        Status.INVALID: ConfigError,
        Status.STATE: StateError,
        Status.BUSY: BusyError,
        Status.UNSUPPORTED: UnsupportedError,
        Status.UNAVAILABLE: ChannelUnavailableError,
        Status.NO_RESOURCE: KvlinkError,
        Status.DENIED: KvlinkError,
        Status.TIMEOUT: BusyError,  # a close that could not end: the object is still in use
        Status.CANCELLED: StateError,
        Status.INTERNAL: EngineError,
        Status.REMOTE: KvlinkError,
        Status.LINK_DOWN: PeerLost,
        Status.ENGINE_DOWN: EngineError,
    }
)
_CONNECTING: _Map = MappingProxyType(
    {
        Status.NO_RESOURCE: ConnectError,
        Status.DENIED: AuthenticationError,
        Status.TIMEOUT: ConnectTimeout,
        Status.CANCELLED: ConnectError,
        Status.INTERNAL: ConnectError,
        Status.REMOTE: ConnectError,
        Status.LINK_DOWN: ConnectError,
    }
)
_TRANSFERRING: _Map = MappingProxyType(
    {
        Status.AGAIN: TransferError,
        Status.INVALID: RangeError,
        Status.BUSY: TransferError,
        Status.NO_RESOURCE: TransferError,
        Status.DENIED: RegionRevoked,  # the target no longer serves what it had published
        Status.TIMEOUT: TransferTimeout,
        Status.CANCELLED: TransferCancelled,
        Status.INTERNAL: TransferError,
        Status.REMOTE: TransferError,
    }
)
# Operations with a meaning of their own; every other operation follows the general map.
_BY_OPERATION: Mapping[str, _Map] = MappingProxyType(
    {
        "load": MappingProxyType(
            {Status.INVALID: ChannelUnavailableError, Status.UNSUPPORTED: ChannelUnavailableError}
        ),
        "connect": _CONNECTING,
        "import region": MappingProxyType({**_CONNECTING, Status.LINK_DOWN: PeerLost}),
        "put": _TRANSFERRING,
        "get": _TRANSFERRING,
        "close channel": MappingProxyType({Status.TIMEOUT: EngineError}),
    }
)
_REVOKED_SITE = "region_close"  # the engine's mark on transfers that a closing region stopped
_HINTS: Mapping[Status, str] = MappingProxyType(
    {
        Status.LINK_DOWN: "connect again to go on",
        Status.ENGINE_DOWN: "close this channel and open another",
        Status.NO_RESOURCE: "check ulimit -n, ulimit -l and free memory",
        Status.INTERNAL: "this is a defect: please report it with this text",
    }
)


def exception_class(status: int, operation: str) -> type[KvlinkError]:
    """Returns the exception class of a failing status in an operation."""
    try:
        known = Status(status)
    except ValueError:
        return EngineError
    return _BY_OPERATION.get(operation, {}).get(known) or _GENERAL.get(known, EngineError)


def status_error(
    status: int,
    message: str,
    operation: str,
    *,
    peer: str | None = None,
    site: str | None = None,
    vendor_code: int = 0,
) -> KvlinkError:
    """Makes the exception of a failing status.

    Args:
        status: A status of provider.h, not OK.
        message: What happened; a text is made up when it is empty.
        operation: The kvlink call that failed: "put", "connect".
        peer: Address or id of the peer, or None.
        site: The system or vendor call that failed, or None.
        vendor_code: Its raw code, or 0.

    Returns:
        The exception, to be raised by the caller.
    """
    if status == Status.CANCELLED and site == _REVOKED_SITE:
        return RegionRevoked(message, operation=operation, peer=peer, hint="its owner closed a region meanwhile")
    name = Status(status).name if status in Status._value2member_map_ else f"status {status}"
    return exception_class(status, operation)(
        message or f"failed with {name}",
        operation=operation,
        peer=peer,
        site=site or None,
        vendor_code=vendor_code,
        hint=_HINTS.get(status),  # type: ignore[call-overload]
    )


def c_text(array: Any) -> str:
    """Decodes a char array of C, whatever bytes it holds."""
    text: bytes = ffi.string(array)
    return text.decode("utf-8", "replace")


def raise_status(err: Any, operation: str, *, peer: str | None = None, status: int | None = None) -> NoReturn:
    """Raises the exception of a ``kvl_error``.

    Args:
        err: The ``kvl_error *`` that the failed call filled.
        operation: The kvlink call that failed: "put", "connect".
        peer: Address or id of the peer, or None.
        status: The status that the call returned, where it may have left ``err`` unwritten; None takes ``err.status``.

    Raises:
        KvlinkError: Always; the subclass follows from the status and the operation.
    """
    raise status_error(
        int(err.status) if status is None else status,
        c_text(err.message),
        operation,
        peer=peer,
        site=c_text(err.site),
        vendor_code=int(err.vendor_code),
    )
