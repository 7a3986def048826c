"""One connected remote channel, and the regions that it has published."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from . import _forks
from ._engine import GET, PUT, EnginePeer
from ._memory import access_name
from .errors import (
    BusyError,
    ClosedError,
    ConfigError,
    EngineError,
    KvlinkError,
    LinkError,
    PeerLost,
    RequestTimeout,
    StateError,
)
from .transfer import Transfer

if TYPE_CHECKING:
    import asyncio

    from .control.hub import Hub
    from .control.session import Session

MAX_REQUEST_BYTES = 1 << 20
MAX_NOTIFY_BYTES = 1 << 16
#: What may wait in memory for a peer that does not read before ``notify`` says busy.
MAX_QUEUED_BYTES = 64 << 20


class RemoteRegion:
    """A peer's published region, valid for this connection only.

    Attributes:
        name: The name under which it was registered.
        nbytes: Its size.
        access: What we may do: "r", "w" or "rw".
        device: Where it is, in the peer's words.
        handle: The integer that stands for it in ``kvlink.RANGE``.
        closed: Whether the peer has withdrawn it, or the connection has ended.
    """

    __slots__ = ("access", "closed", "device", "handle", "name", "nbytes")

    def __init__(self, name: str, nbytes: int, access: int, device: str, handle: int) -> None:
        self.name = name
        self.nbytes = nbytes
        self.access = access_name(access)
        self.device = device
        self.handle = handle
        self.closed = False

    def __repr__(self) -> str:
        return f"<RemoteRegion {self.name!r} {self.nbytes} bytes {self.access}{' closed' if self.closed else ''}>"


class _Regions(Mapping[str, RemoteRegion]):
    """A live view: the dictionary behind it is replaced, never changed."""

    __slots__ = ("_peer",)

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    def __getitem__(self, name: str) -> RemoteRegion:
        try:
            return self._peer.imported[name]
        except KeyError:
            raise KeyError(self._peer.explain_missing(name)) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._peer.imported)

    def __len__(self) -> int:
        return len(self._peer.imported)

    def __repr__(self) -> str:
        return repr(self._peer.imported)


class Peer:
    """One connected remote channel; made by ``Channel.connect`` or by a connection from outside. Thread-safe.

    Attributes:
        id: The remote channel's id; a restarted process has another.
        address: Where the remote channel listens, as it says itself.
        name: The remote channel's name.
        identity: What it says about itself.
        regions: Live mapping of its published regions by name.
        error: Why the connection ended, or None while it stands.
    """

    def __init__(
        self, session: Session, hub: Hub, link: EnginePeer, address: str, identity: Mapping[str, str | int], name: str
    ) -> None:
        self.id = session.peer_id.hex()
        self.address = address
        self.name = name
        self.identity: Mapping[str, str | int] = MappingProxyType(dict(identity))
        self.error: KvlinkError | None = None
        self.dialled = address
        self.imported: dict[str, RemoteRegion] = {}
        self._by_handle: dict[int, RemoteRegion] = {}
        self._import_errors: dict[str, tuple[int, KvlinkError]] = {}
        self._session = session
        self._hub = hub
        self._link = link
        self._submit = link.submit
        self._generation = _forks.generation
        self._change = threading.Condition(threading.Lock())

    # ---- data ----

    def put(
        self,
        ranges: npt.NDArray[np.void],
        *,
        notify: bytes | None = None,
        stream: int | None = None,
        timeout: float | None = None,
    ) -> Transfer:
        """Start to write local memory into the peer's. Never blocks.

        Args:
            ranges: One-dimensional array of ``kvlink.RANGE``; may be changed or dropped as soon as this returns. The
                memory it names may not be changed before the transfer has ended.
            notify: Sent to the peer's ``on_notify`` once the bytes are visible there; not sent when the transfer
                fails. At most 64 KiB.
            stream: The device stream that produces the bytes, for providers with ``STREAM``.
            timeout: Deadline in seconds from now; None takes the channel's ``transfer_timeout``.

        Returns:
            The transfer.

        Raises:
            RangeError: A malformed array, or a range outside its region; nothing was moved.
            RegionRevoked: A region was closed.
            PeerLost: The peer or the network went away.
            ClosedError: This side closed the peer or the channel.
            UnsupportedError: The provider cannot put from this side.
            ForkedError: Called in a child process.
        """
        if self.error is not None:
            raise self.failure("put")
        if notify is not None:
            notify = _checked(notify, MAX_NOTIFY_BYTES, "notify")
        try:
            transfer = Transfer(self._submit(PUT, ranges, stream or 0, timeout), "put", self, self._hub)
        except KvlinkError as error:
            raise self._explain(error, "put") from None
        if notify is not None:
            body = notify
            transfer.notify_when_done(lambda: self._session.send_notify(body))
        return transfer

    def get(self, ranges: npt.NDArray[np.void], *, stream: int | None = None, timeout: float | None = None) -> Transfer:
        """Start to read the peer's memory into ours. Never blocks.

        Args:
            ranges: One-dimensional array of ``kvlink.RANGE``; may be changed or dropped as soon as this returns.
            stream: The device stream that the bytes are for, for providers with ``STREAM``.
            timeout: Deadline in seconds from now; None takes the channel's ``transfer_timeout``.

        Returns:
            The transfer.

        Raises:
            RangeError: A malformed array, or a range outside its region; nothing was moved.
            RegionRevoked: A region was closed.
            PeerLost: The peer or the network went away.
            ClosedError: This side closed the peer or the channel.
            UnsupportedError: The provider cannot get from this side.
            ForkedError: Called in a child process.
        """
        if self.error is not None:
            raise self.failure("get")
        try:
            return Transfer(self._submit(GET, ranges, stream or 0, timeout), "get", self, self._hub)
        except KvlinkError as error:
            raise self._explain(error, "get") from None

    # ---- messages ----

    def request(self, message: bytes, *, timeout: float | None = None) -> bytes:
        """Ask the peer's ``on_request`` and wait for its answer.

        Args:
            message: At most 1 MiB.
            timeout: Seconds; None takes the configuration's ``request_timeout``.

        Returns:
            The answer, at most 1 MiB.

        Raises:
            RequestError: The peer's handler raised (the message names the exception), or it has none.
            RequestTimeout: No answer in time.
            PeerLost: The peer or the network went away.
            ClosedError: This side closed the peer or the channel.
            ConfigError: The message is too long.
            ForkedError: Called in a child process.
        """
        timeout = self._hub.limits.request_timeout if timeout is None else timeout
        reply = self._ask(message, timeout)
        try:
            return reply.result(timeout)
        except FutureTimeout:
            if reply.done() and not reply.cancelled():
                raise
            reply.cancel()
            raise self._request_timeout(timeout) from None

    async def request_async(self, message: bytes, *, timeout: float | None = None) -> bytes:
        """Ask as ``request`` does, without blocking the running loop.

        Args:
            message: At most 1 MiB.
            timeout: Seconds; None takes the configuration's ``request_timeout``.

        Raises:
            RequestError: See ``request``, also for the other errors.
        """
        import asyncio

        timeout = self._hub.limits.request_timeout if timeout is None else timeout
        reply = self._ask(message, timeout)
        wrapped: asyncio.Future[bytes] = asyncio.wrap_future(reply)
        done, _ = await asyncio.wait({wrapped}, timeout=timeout)
        if not done:
            wrapped.cancel()
            raise self._request_timeout(timeout)
        return wrapped.result()

    def notify(self, message: bytes) -> None:
        """Send a message to the peer's ``on_notify``; returns at once.

        It arrives after the notifications of earlier calls, and after those of puts that completed before this call.

        Args:
            message: At most 64 KiB.

        Raises:
            BusyError: The peer has not read for a long time, and too much waits for it.
            PeerLost: The peer or the network went away.
            ClosedError: This side closed the peer or the channel.
            ConfigError: The message is too long.
            ForkedError: Called in a child process.
        """
        self._check("notify")
        message = _checked(message, MAX_NOTIFY_BYTES, "notify")
        self._check_queue("notify")
        self._hub.reports.post(self._session.send_notify, message)

    def _ask(self, message: bytes, timeout: float) -> Future[bytes]:
        self._check("request")
        message = _checked(message, MAX_REQUEST_BYTES, "request")
        self._check_queue("request")
        reply: Future[bytes] = Future()
        self._hub.reports.post(self._session.send_request, message, timeout, reply)
        return reply

    def _check_queue(self, operation: str) -> None:
        if self._session.queued_bytes > MAX_QUEUED_BYTES:
            raise BusyError(
                f"{self._session.queued_bytes} bytes of messages wait for a peer that does not read",
                operation=operation,
                peer=self.address,
            )

    def _request_timeout(self, timeout: float) -> RequestTimeout:
        return RequestTimeout(f"no answer within {timeout:g} s", operation="request", peer=self.address)

    # ---- regions and state ----

    @property
    def regions(self) -> Mapping[str, RemoteRegion]:
        """Live mapping of the peer's published regions by name."""
        return _Regions(self)

    @property
    def state(self) -> str:
        """Return "connected", "lost" (peer or network) or "closed" (by this side)."""
        if self.error is None:
            return "connected"
        return "closed" if isinstance(self.error, ClosedError) else "lost"

    def wait_region(self, name: str, timeout: float = 10.0) -> RemoteRegion:
        """Wait until the peer has published a region.

        Args:
            name: Its name.
            timeout: Seconds.

        Returns:
            The region.

        Raises:
            RequestTimeout: Not published in time; lists what is.
            KvlinkError: It was published, but the provider could not import it.
            PeerLost: The peer or the network went away.
            ClosedError: This side closed the peer or the channel.
            ForkedError: Called in a child process.
        """
        self._check("wait_region")
        deadline = time.monotonic() + timeout
        with self._change:
            while True:
                region = self.imported.get(name)
                if region is not None:
                    return region
                if self.error is not None:
                    raise self.failure("wait_region")
                failed = self._import_errors.get(name)
                if failed is not None:
                    raise _again(failed[1], "wait_region", self.address)
                left = deadline - time.monotonic()
                if left <= 0:
                    raise RequestTimeout(
                        f"region {name!r} was not published within {timeout:g} s; published: "
                        f"{', '.join(sorted(self.imported)) or 'none'}",
                        operation="wait_region",
                        peer=self.address,
                    )
                self._change.wait(left)

    def close(self) -> None:
        """End the connection; its transfers end with ``ClosedError``. Idempotent; waits for no peer.

        Raises:
            ForkedError: Called in a child process.
        """
        if self._generation != _forks.generation:
            raise _forks.forked("close")
        self._hub.call(lambda: self._session.close(by_user=True))
        with self._change:
            if not self._hub.loop.inside:
                self._change.wait_for(lambda: self.error is not None, timeout=1.0)

    def __repr__(self) -> str:
        return f"<Peer {self.name!r} {self.address} {self.state}>"

    # ---- for the control plane ----

    def failure(self, operation: str) -> KvlinkError:
        """Return why this peer can serve no call, as a fresh exception. Internal."""
        assert self.error is not None
        return _again(self.error, operation, self.address)

    def suspect(self) -> None:
        """Have the data path checked, for a transfer said that it is down. Internal."""
        self._hub.call(self._session.check)

    def explain_missing(self, name: str) -> str:
        """Return why there is no region of that name. Internal."""
        failed = self._import_errors.get(name)
        if failed is not None:
            return f"{name}: published, but it cannot be used from here: {failed[1].message}"
        return f"{name}: the peer publishes {', '.join(sorted(self.imported)) or 'no region'}"

    def add_region(self, region: RemoteRegion, remote_handle: int) -> None:
        """An import is done. Internal, control loop."""
        with self._change:
            self._by_handle[remote_handle] = region
            self._import_errors.pop(region.name, None)
            self.imported = {**self.imported, region.name: region}
            self._change.notify_all()

    def region_failed(self, name: str, remote_handle: int, error: KvlinkError) -> None:
        """An import failed. Internal, control loop."""
        with self._change:
            self._import_errors[name] = (remote_handle, error)
            self._change.notify_all()

    def remove_region(self, remote_handle: int) -> RemoteRegion | None:
        """The peer withdraws a region. Internal, control loop."""
        with self._change:
            region = self._by_handle.pop(remote_handle, None)
            if region is not None:
                region.closed = True
                self.imported = {name: other for name, other in self.imported.items() if other is not region}
            for name, (handle, _) in list(self._import_errors.items()):
                if handle == remote_handle:
                    del self._import_errors[name]
            return region

    def ended(self, error: KvlinkError) -> None:
        """The connection has ended. Internal, control loop."""
        with self._change:
            if self.error is None:
                self.error = error
            for region in self._by_handle.values():
                region.closed = True
            self.imported = {}
            self._change.notify_all()

    def _check(self, operation: str) -> None:
        if self._generation != _forks.generation:
            raise _forks.forked(operation)
        if self.error is not None:
            raise self.failure(operation)

    def _explain(self, error: KvlinkError, operation: str) -> KvlinkError:
        """A submit failed: because the peer ended meanwhile, or for its own reason."""
        if self.error is not None and isinstance(error, (ClosedError, StateError, LinkError)):
            return self.failure(operation)
        if isinstance(error, (PeerLost, EngineError)):
            self.suspect()
        return error


def _checked(message: object, limit: int, operation: str) -> bytes:
    if not isinstance(message, (bytes, bytearray, memoryview)):
        raise ConfigError(f"the message is {type(message).__name__}; expected bytes", operation=operation)
    if len(message) > limit:
        raise ConfigError(f"the message has {len(message)} bytes; at most {limit} are allowed", operation=operation)
    return bytes(message)


def _again(error: KvlinkError, operation: str, peer: str) -> KvlinkError:
    """Copy an error for another caller, so that tracebacks do not pile up on one object."""
    copy = type(error).__new__(type(error), error.message)
    copy.__dict__.update(error.__dict__)
    copy.operation = operation
    copy.peer = peer
    copy.__cause__ = error.__cause__
    return copy
