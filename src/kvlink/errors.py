"""The error tree: every error that kvlink raises is one of these.

::

    KvlinkError
    ├── ConfigError (ValueError)            a wrong option, key or argument; fix the call
    │   ├── ChannelNotFoundError            no such provider; lists the installed ones and the pip name
    │   ├── DuplicateChannelError           two distributions offer one name
    │   └── RangeError                      a range outside its region, or a malformed ranges array
    ├── ChannelUnavailableError             installed, but this host cannot use it; carries the probe's reason
    ├── UnsupportedError                    the provider lacks that capability
    ├── StateError (RuntimeError)           right call, wrong moment
    │   ├── ClosedError                     YOU closed it
    │   ├── BusyError                       still in use; try again later
    │   └── ForkedError                     the handle belongs to the parent process
    ├── TransferError                       this transfer failed, the peer still works
    │   ├── TransferTimeout (TimeoutError)  its deadline passed
    │   ├── TransferCancelled               stopped on request
    │   └── RegionRevoked                   one of its regions was closed meanwhile
    ├── LinkError                           connect again to go on
    │   ├── ConnectError (ConnectionError)  the handshake or the connect failed
    │   │   ├── ConnectTimeout (TimeoutError)
    │   │   ├── AuthenticationError         a secret that does not match, or is missing
    │   │   ├── IdentityMismatch            both sides name a key and disagree: .key .ours .theirs
    │   │   ├── VersionMismatch             wire version or provider differ
    │   │   └── ConnectRefused              the peer's on_peer said no, or it is full
    │   └── PeerLost (ConnectionError)      the peer or the network went away
    ├── RequestError                        the peer's handler failed
    │   └── RequestTimeout (TimeoutError)
    ├── PoolError                           .requested .capacity
    │   ├── PoolTooSmall                    can never fit, however long one waits
    │   ├── PoolTimeout (TimeoutError)      did not fit before the deadline
    │   └── LeaseError                      released twice, or used after release
    └── EngineError                         the device or the engine is gone; open a new channel

Closed (you did it), lost (peer or network) and busy are three different errors. ``str(error)`` is never empty: it
names the operation, the peer, the vendor call and its raw code where there is one, and one thing to check.
"""

from __future__ import annotations


class KvlinkError(Exception):
    """Base of all kvlink errors.

    Attributes:
        message: What happened, with the values concerned.
        operation: The kvlink call that failed ("put", "connect"), or None.
        peer: Address or id of the peer concerned, or None.
        site: The system or vendor call that failed ("process_vm_readv"), or None.
        vendor_code: Its raw code (errno for system calls), or 0.
        hint: One thing to check or do, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        operation: str | None = None,
        peer: str | None = None,
        site: str | None = None,
        vendor_code: int = 0,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message or type(self).__name__
        self.operation = operation
        self.peer = peer
        self.site = site
        self.vendor_code = vendor_code
        self.hint = hint

    def __str__(self) -> str:
        where = [text for text in (self.operation, f"peer {self.peer}" if self.peer else None) if text]
        text = f"{' '.join(where)}: {self.message}" if where else self.message
        if self.site:
            code = f" -> {self.vendor_code}" if self.vendor_code else ""
            text += f" [{self.site}{code}]"
        if self.hint:
            text += f" ({self.hint})"
        return text


class ConfigError(KvlinkError, ValueError):
    """A wrong option, key or argument."""


class ChannelNotFoundError(ConfigError):
    """No provider of that name is installed."""


class DuplicateChannelError(ConfigError):
    """Two distributions offer a provider of the same name."""


class RangeError(ConfigError):
    """A range outside its region, or a malformed ranges array."""


class ChannelUnavailableError(KvlinkError):
    """The provider is installed but this host cannot use it."""


class UnsupportedError(KvlinkError):
    """The provider lacks the capability that the call needs."""


class StateError(KvlinkError, RuntimeError):
    """The right call at the wrong moment."""


class ClosedError(StateError):
    """This side closed the object before."""


class BusyError(StateError):
    """The object is still in use."""


class ForkedError(StateError):
    """The handle belongs to the parent process; open a new channel after fork."""


class TransferError(KvlinkError):
    """One transfer failed; the peer still works."""


class TransferTimeout(TransferError, TimeoutError):
    """The transfer's deadline passed."""


class TransferCancelled(TransferError):
    """The transfer was stopped on request."""


class RegionRevoked(TransferError):
    """A region of the transfer was closed by its owner."""


class LinkError(KvlinkError):
    """The connection to one peer failed; connect again to go on."""


class ConnectError(LinkError, ConnectionError):
    """The handshake or the connect failed."""


class ConnectTimeout(ConnectError, TimeoutError):
    """No connection before the deadline."""


class AuthenticationError(ConnectError):
    """The secrets of the two sides differ, or one side has none."""


class IdentityMismatch(ConnectError):
    """Both sides name an identity key and disagree.

    Attributes:
        key: The identity key.
        ours: This side's value.
        theirs: The peer's value.
    """

    def __init__(self, key: str, ours: object, theirs: object, *, peer: str | None = None) -> None:
        super().__init__(
            f"identity key {key!r} differs: ours is {ours!r}, the peer's is {theirs!r}",
            operation="connect",
            peer=peer,
            hint=f"start both sides with the same {key}",
        )
        self.key = key
        self.ours = ours
        self.theirs = theirs


class VersionMismatch(ConnectError):
    """Wire version or provider of the two sides differ."""


class ConnectRefused(ConnectError):
    """The peer refused the connection."""


class PeerLost(LinkError, ConnectionError):
    """The peer or the network to it went away."""


class RequestError(KvlinkError):
    """The peer's request handler failed or is missing."""


class RequestTimeout(RequestError, TimeoutError):
    """The peer did not answer a request in time."""


class PoolError(KvlinkError):
    """A buffer pool could not serve a call.

    Attributes:
        requested: Pages asked for.
        capacity: Pages the pool has.
    """

    def __init__(self, message: str, *, requested: int = 0, capacity: int = 0, hint: str | None = None) -> None:
        super().__init__(message, operation="pool", hint=hint)
        self.requested = requested
        self.capacity = capacity


class PoolTooSmall(PoolError):
    """The request can never fit into this pool."""


class PoolTimeout(PoolError, TimeoutError):
    """The request did not fit before its deadline."""


class LeaseError(PoolError):
    """A lease was released twice, or used after its release."""


class EngineError(KvlinkError):
    """The device or the engine is gone."""
