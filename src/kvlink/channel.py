"""The local side: one provider engine on one device, its control listener, and the memory registered with it."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import logging
import os
import secrets
import socket
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType

from . import _forks, registry
from ._engine import DEVICE, HOST, Attributes, Capability, EngineChannel, EngineProvider
from ._memory import MemoryView, describe, parse_access, parse_device
from .config import ChannelConfig, resolve_secret, validate_options
from .control import addresses, auth, sockets
from .control import messages as m
from .control.addresses import Address
from .control.handshake import Local
from .control.hub import Hub, Limits
from .errors import ClosedError, ConfigError, KvlinkError, UnsupportedError
from .peer import Peer
from .region import Region, allocated_view
from .statistics import ChannelStatistics

_log = logging.getLogger("kvlink")
_open_channels: weakref.WeakSet[Channel] = weakref.WeakSet()
CANCEL_GRACE = 1.0
EXIT_SECONDS = 4.0


class _Regions(Mapping[str, Region]):
    """A live view: the dictionary behind it is replaced, never changed."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def __getitem__(self, name: str) -> Region:
        return self._channel._regions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._channel._regions)

    def __len__(self) -> int:
        return len(self._channel._regions)


class Channel:
    """The local side of any number of connections; made by ``kvlink.open``. Thread-safe, a context manager.

    Handlers are attributes that may be set at any time. ``on_request`` runs on a small pool of threads; ``on_notify``,
    ``on_peer_lost`` and the callbacks of transfers run on one thread, in order. A slow handler delays only its like.

    Attributes:
        name: The provider's name, the value of ``transfer_channel``.
        id: Random id of this instance.
        address: "tcp://host:port" that peers connect to.
        device: "cpu", "npu:0".
        on_peer: Called with the identity of every new peer, whichever side connects, before it is taken; refuses by
            raising or returning False.
        on_request: Called with (peer, message); returns the answer, at most 1 MiB.
        on_notify: Called with (peer, message).
        on_peer_lost: Called with (peer, error) when a connection ends that this side did not close.
    """

    def __init__(self, config: ChannelConfig) -> None:
        spec = registry.select(config.transfer_channel, config.device)
        options = validate_options(spec, config.options)
        parse_device(config.device)
        secret = config.secret or b""
        wanted = addresses.parse(config.listen)
        for _, sockaddr in addresses.resolve(wanted, operation="open")[:1]:
            sockets.require_protection(wanted, sockaddr[0], secret, config.insecure, "open")
        self._claim = registry.claim(spec.exclusion_group, spec.name)
        sock: socket.socket | None = None
        engine: EngineChannel | None = None
        try:
            sock, bound = sockets.listen(wanted)
            advertise = addresses.advertised(bound, sock.family, config.advertise)
            declared = {option.name for option in spec.options}
            for key, value in (
                ("bind_host", bound.host),
                ("advertise_host", advertise.host),
                ("peer_timeout_ms", str(max(1, int(config.peer_timeout * 1000)))),
            ):
                if key in declared:
                    options.setdefault(key, value)
            provider = EngineProvider.load(spec.library_path())
            engine = EngineChannel.open(
                provider,
                options=options,
                device=config.device,
                default_timeout=config.transfer_timeout,
                cancel_grace=CANCEL_GRACE,
            )
            local = _introduction(config, provider, engine.attributes, advertise, spec.name)
            limits = Limits(
                peer_timeout=config.peer_timeout,
                request_timeout=config.request_timeout,
                handshake_timeout=config.handshake_timeout,
                max_handshakes=config.max_handshakes or Limits.max_handshakes,
                max_peers=config.max_peers,
            )
            self._hub = Hub(engine, local, sock, advertise, secret=secret, insecure=config.insecure, limits=limits)
        except BaseException:
            if sock is not None:
                sock.close()
            if engine is not None:
                engine.close(0.5)
            self._claim.release()
            raise
        self.name = spec.name
        self.id = local.channel_id.hex()
        self.address = str(advertise)
        self.device = config.device
        self._engine = engine
        self._regions: dict[str, Region] = {}
        self._reserved: set[str] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._close_done = threading.Event()
        self._generation = _forks.generation
        _open_channels.add(self)
        # Exit handlers run in the reverse order of their registration: this one has to come before those of libraries
        # that take the device away (torch_npu), which may have been imported after kvlink.
        atexit.unregister(_close_all)
        atexit.register(_close_all)

    # ---- what it is ----

    @property
    def capabilities(self) -> Capability:
        """What the provider can do."""
        return self._engine.attributes.capabilities

    @property
    def attributes(self) -> Attributes:
        """Limits and attributes of the provider's engine."""
        return self._engine.attributes

    @property
    def closed(self) -> bool:
        """Whether ``close`` has begun."""
        return self._closed

    @property
    def regions(self) -> Mapping[str, Region]:
        """Live mapping of the registered regions by name."""
        return _Regions(self)

    @property
    def on_peer(self) -> Callable[[dict[str, str | int]], object] | None:
        """Called with the identity of every new peer; refuses by raising or returning False."""
        return self._hub.handlers.on_peer

    @on_peer.setter
    def on_peer(self, handler: Callable[[dict[str, str | int]], object] | None) -> None:
        self._hub.handlers.on_peer = handler

    @property
    def on_request(self) -> Callable[[Peer, bytes], bytes] | None:
        """Called with (peer, message); returns the answer."""
        return self._hub.handlers.on_request

    @on_request.setter
    def on_request(self, handler: Callable[[Peer, bytes], bytes] | None) -> None:
        self._hub.handlers.on_request = handler

    @property
    def on_notify(self) -> Callable[[Peer, bytes], object] | None:
        """Called with (peer, message)."""
        return self._hub.handlers.on_notify

    @on_notify.setter
    def on_notify(self, handler: Callable[[Peer, bytes], object] | None) -> None:
        self._hub.handlers.on_notify = handler

    @property
    def on_peer_lost(self) -> Callable[[Peer, KvlinkError], object] | None:
        """Called with (peer, error) when a connection ends that this side did not close."""
        return self._hub.handlers.on_peer_lost

    @on_peer_lost.setter
    def on_peer_lost(self, handler: Callable[[Peer, KvlinkError], object] | None) -> None:
        self._hub.handlers.on_peer_lost = handler

    # ---- memory ----

    def register(self, memory: object, *, name: str, access: str = "rw") -> Region:
        """Register memory and publish it to all peers, now and later. Nothing is copied.

        A provider without the capability LATE_MEMORY serves it on later connections only: a transfer that names it on
        one that was there before fails and says to reconnect.

        Args:
            memory: A torch tensor or storage, a NumPy array, a buffer, or ``(pointer, nbytes, device)``; contiguous.
                kvlink keeps a reference until the region is closed; behind a bare pointer the caller does.
            name: At most 200 characters, unique among this channel's open regions.
            access: What peers may do: "r", "w" or "rw".

        Returns:
            The region.

        Raises:
            ConfigError: Memory that cannot be registered, a name that is taken, or a wrong ``access``.
            ClosedError: The channel is closed.
            ForkedError: Called in a child process.
        """
        self._check("register")
        return self._publish(lambda: describe(memory, access=access), name, access)

    def allocate(self, nbytes: int, *, name: str, access: str = "rw", device: str | None = None) -> Region:
        """Allocate zeroed memory that this provider moves fastest, and register it.

        Args:
            nbytes: Its size.
            name: As for ``register``.
            access: As for ``register``.
            device: "cpu" for (pinned) host memory, or the channel's own device, which is the default.

        Returns:
            The region; ``Region.buffer()`` is the memory.

        Raises:
            UnsupportedError: The provider allocates no memory; use ``register``.
            ConfigError: A wrong size, name or ``access``.
            KvlinkError: It ran out.
            ClosedError: The channel is closed.
            ForkedError: Called in a child process.
        """
        self._check("allocate")
        if Capability.ALLOCATE not in self.capabilities:
            raise UnsupportedError(f"channel {self.name!r} does not allocate memory", hint="register() your own")
        if nbytes <= 0:
            raise ConfigError(f"nbytes is {nbytes}; it must be positive", operation="allocate")
        where = self.device if device is None else device
        kind_name, index = parse_device(where)
        if kind_name != "cpu" and (kind_name, index) != parse_device(self.device):
            raise ConfigError(
                f"device is {device!r}; this channel allocates on 'cpu' and {self.device!r}", operation="allocate"
            )
        kind = HOST if kind_name == "cpu" else DEVICE

        def make() -> MemoryView:
            address = self._engine.mem_alloc(kind, nbytes)
            return allocated_view(self._engine, address, nbytes, kind, index, where)

        return self._publish(make, name, access)

    def _publish(self, make: Callable[[], MemoryView], name: str, access: str) -> Region:
        bits = parse_access(access)
        if not isinstance(name, str) or not 0 < len(name) <= m.MAX_NAME:
            raise ConfigError(f"a region's name has 1 to {m.MAX_NAME} characters", operation="register")
        with self._lock:
            if name in self._regions or name in self._reserved:
                raise ConfigError(f"this channel has a region named {name!r} already", operation="register")
            self._reserved.add(name)
        try:
            view = make()
            handle = self._engine.mem_open(
                view.address, view.nbytes, view.kind, view.device, bits, writable=not view.readonly
            )
            try:
                blob = self._engine.mem_export(handle)
                region = Region(
                    self._hub, self._engine, self._forget, name=name, access=access, handle=handle, view=view
                )
                info = m.RegionInfo(handle, name, view.nbytes, bits, view.device_name, blob)
                with self._lock:
                    self._regions = {**self._regions, name: region}
                self._hub.loop.call(self._hub.published.add, info)
            except BaseException:
                with self._lock:
                    self._regions = {key: other for key, other in self._regions.items() if key != name}
                self._engine.mem_close(handle, 1.0)
                raise
        finally:
            with self._lock:
                self._reserved.discard(name)
        return region

    def _forget(self, region: Region) -> None:
        with self._lock:
            self._regions = {name: other for name, other in self._regions.items() if other is not region}

    # ---- peers ----

    def connect(self, address: str, *, timeout: float = 30.0) -> Peer:
        """Connect to the channel that listens at an address, or return its peer when it is connected already.

        When this returns, both sides have imported each other's regions.

        Args:
            address: "tcp://host:port", IPv6 in brackets.
            timeout: Seconds for everything.

        Returns:
            The peer.

        Raises:
            ConnectTimeout: Not in time.
            AuthenticationError: The secrets differ, or one side has none.
            IdentityMismatch: Both sides name an identity key and disagree.
            VersionMismatch: The kvlink versions or providers do not fit.
            ConnectRefused: ``on_peer`` of one side said no, or the peer is full.
            ConnectError: Nothing listens there, or the connection broke.
            ConfigError: A malformed address, or one beyond loopback without a secret.
            ClosedError: The channel is closed.
            ForkedError: Called in a child process.
        """
        self._check("connect")
        target = addresses.parse(address)
        try:
            return self._hub.loop.run(lambda: self._hub.connect(target, timeout))
        except concurrent.futures.CancelledError:
            raise ClosedError("the channel was closed meanwhile", operation="connect", peer=address) from None

    async def connect_async(self, address: str, *, timeout: float = 30.0) -> Peer:
        """Connect as ``connect`` does, without blocking the running loop.

        Args:
            address: "tcp://host:port", IPv6 in brackets.
            timeout: Seconds for everything.

        Returns:
            The peer.

        Raises:
            ConnectError: See ``connect``, also for the other errors.
        """
        self._check("connect")
        target = addresses.parse(address)
        future = self._hub.loop.start(lambda: self._hub.connect(target, timeout))
        wrapped = asyncio.wrap_future(future)
        try:
            return await wrapped
        except asyncio.CancelledError:
            if self._closed and not wrapped.cancelled():
                raise ClosedError("the channel was closed meanwhile", operation="connect", peer=address) from None
            raise

    def peers(self) -> Mapping[str, Peer]:
        """Return the connected peers by id, as of now.

        Raises:
            ForkedError: Called in a child process.
        """
        if self._generation != _forks.generation:
            raise _forks.forked("peers")
        return MappingProxyType(self._hub.peers)

    def statistics(self) -> ChannelStatistics:
        """Return the channel's counters.

        Raises:
            ClosedError: The channel is closed.
            ForkedError: Called in a child process.
        """
        self._check("statistics")
        engine, hub = self._engine.statistics(), self._hub
        counted = {name: getattr(engine, name) for name in engine.__dataclass_fields__ if name != "peers"}
        refusals = list(hub.listener.refusals)
        return ChannelStatistics(
            peers=len(hub.peers),
            regions=len(self._regions),
            refused=hub.listener.refused,
            last_refusal=str(refusals[-1]) if refusals else "",
            dropped_notifications=hub.dropped_notifications,
            held_bytes=hub.published.held_bytes,
            provider=MappingProxyType(self._engine.provider_statistics()),
            **counted,
        )

    # ---- the end ----

    def close(self, *, grace: float = 1.0) -> None:
        """Close peers, regions and the engine; every wait ends. Idempotent; harmless in a child process.

        Args:
            grace: Seconds for peers to let go and for the provider to end.

        Raises:
            EngineError: A call of the provider hangs; its engine was abandoned.
        """
        if self._generation != _forks.generation:
            return
        with self._lock:
            first = not self._closed
            self._closed = True
        if not first:
            self._close_done.wait(grace + 5.0)
            return
        unconfirmed: list[str] = []
        keep = True  # of an engine that hangs, or a control plane that did not say, nothing is known
        try:
            unconfirmed = self._hub.close(grace)
            keep = bool(unconfirmed)
        finally:
            for region in list(self._regions.values()):
                region.abandon(keep=keep)
            if unconfirmed and self._regions:
                _log.warning(
                    "%s: %s may still write into memory that was registered; it is kept",
                    self._hub.name,
                    ", ".join(unconfirmed),
                )
            self._regions = {}
            self._claim.release()
            _open_channels.discard(self)
            self._close_done.set()

    def __enter__(self) -> Channel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Channel {self.name} {self.address} {self.device}{' closed' if self._closed else ''}>"

    def _check(self, operation: str) -> None:
        if self._generation != _forks.generation:
            raise _forks.forked(operation)
        if self._closed:
            raise ClosedError("the channel is closed", operation=operation)


def _introduction(
    config: ChannelConfig, provider: EngineProvider, attributes: Attributes, advertise: Address, name: str
) -> Local:
    """Build what this channel says about itself."""
    for key, value in config.identity.items():
        if len(key) > m.MAX_NAME or len(str(value)) > 4096:
            raise ConfigError(f"identity key {key!r}: at most {m.MAX_NAME} characters, its value at most 4096")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ConfigError(f"identity key {key!r} is {value}; integers have 64 bits, pass it as text")
    channel_id = secrets.token_bytes(16)
    hello = m.Hello(
        name=f"{name}-{channel_id[:4].hex()}",
        address=str(advertise),
        provider=name,
        provider_version=provider.version,
        provider_wire=provider.wire_version,
        connect_mode=int(attributes.connect_both),
        host_id=sockets.host_id(),
        identity=dict(config.identity),
    )
    if len(m.encode(hello)) > m.MAX_HELLO_MESSAGE:
        raise ConfigError(f"the identity is too long: at most {m.MAX_HELLO_MESSAGE} bytes in all")
    secret = config.secret or b""
    return Local(channel_id, auth.secret_key(secret), bool(secret), hello)


def open(
    transfer_channel: str = "auto",
    *,
    listen: str = "tcp://127.0.0.1:0",
    advertise: str | None = None,
    device: str = "cpu",
    secret: bytes | str | None = None,
    identity: Mapping[str, str | int] | None = None,
    options: Mapping[str, object] | None = None,
    insecure: bool = False,
    peer_timeout: float = 3.0,
    transfer_timeout: float = 60.0,
) -> Channel:
    """Open a channel: a provider's engine on a device, and the listener that peers connect to.

    Args:
        transfer_channel: A provider's name, or "auto" for the best one that this host can use.
        listen: "tcp://host:port" of the control listener; IPv6 in brackets; port 0 takes a free one.
        advertise: The address peers are told; None for the one that was bound.
        device: "cpu", "npu:0".
        secret: What both sides must prove to know; None takes ``KVLINK_SECRET`` or ``KVLINK_SECRET_FILE``.
        identity: Keys and values that a peer which names them too must share: model, layout, dtype.
        options: The provider's options.
        insecure: Allow to leave loopback without a secret.
        peer_timeout: Seconds of silence of a peer's host after which the peer counts as lost.
        transfer_timeout: Deadline in seconds of a transfer whose caller gives none.

    Returns:
        The channel; close it, or use it as a context manager.

    Raises:
        ConfigError: A wrong argument or option, an address that cannot be bound, or no secret beyond loopback.
        ChannelNotFoundError: No such provider is installed.
        ChannelUnavailableError: This host cannot use it; says why.
        StateError: Another provider of the same exclusion group is open in this process.
    """
    return Channel(
        ChannelConfig(
            transfer_channel=transfer_channel,
            listen=listen,
            advertise=advertise,
            device=device,
            secret=resolve_secret(secret),
            identity=identity or {},
            options=options or {},
            insecure=insecure,
            peer_timeout=peer_timeout,
            transfer_timeout=transfer_timeout,
        )
    )


def open_from_config(config: str | os.PathLike[str] | Mapping[str, object] | ChannelConfig) -> Channel:
    """Open a channel from a YAML file, a mapping, or a ``ChannelConfig``.

    Args:
        config: Path of a YAML file, a mapping of the same keys, or a configuration. LMCache's files are understood.

    Raises:
        ConfigError: An unknown key (names the nearest valid one) or a wrong value.
        KvlinkError: See ``open``.
    """
    if isinstance(config, ChannelConfig):
        return Channel(config)
    if isinstance(config, Mapping):
        return Channel(ChannelConfig.from_mapping(config))
    return Channel(ChannelConfig.from_yaml(Path(config)))


def _close_all() -> None:
    """At exit: nothing of a channel may keep the interpreter from ending."""
    import time

    deadline = time.monotonic() + EXIT_SECONDS
    for channel in list(_open_channels):
        left = deadline - time.monotonic()
        if left <= 0:
            return
        try:
            channel.close(grace=min(0.5, left))
        except Exception as error:
            _log.warning("closing %r at exit: %s", channel, error)
