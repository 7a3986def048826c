"""Plain TCP sockets, set up so that the kernel notices a dead peer without help from any thread."""

from __future__ import annotations

import errno
import functools
import math
import os
import socket
import weakref
from pathlib import Path

from kvlink.control import addresses
from kvlink.control.addresses import Address
from kvlink.errors import ConfigError, ConnectError

BACKLOG = 128
#: Room for more than one flow-control window of small frames, so that the receive window never closes.
RECEIVE_BUFFER = 208 << 10
_TCP_USER_TIMEOUT = getattr(socket, "TCP_USER_TIMEOUT", 18)

_open_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _close_copies() -> None:
    """In a forked child: drop its copies, or a dead parent's peers would see no end of file."""
    for sock in list(_open_sockets):
        try:
            os.close(sock.detach())
        except OSError:
            pass
    _open_sockets.clear()


os.register_at_fork(after_in_child=_close_copies)


def tune(sock: socket.socket, peer_timeout: float) -> None:
    """Make the kernel report a peer that is gone for ``peer_timeout`` seconds, busy or idle."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, max(1, math.ceil(peer_timeout) - 1))
    sock.setsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, max(1, int(peer_timeout * 1000)))


def listen(address: Address) -> tuple[socket.socket, Address]:
    """Bind and listen.

    Returns:
        The socket, and the numeric address with the port that it got.

    Raises:
        ConfigError: The address cannot be bound.
    """
    family, sockaddr = addresses.resolve(address, operation="open")[0]
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        if family == socket.AF_INET6 and addresses.is_wildcard(sockaddr[0]):
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(sockaddr)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        hint = "choose another port, or 0 for any free one" if error.errno == errno.EADDRINUSE else None
        raise ConfigError(
            f"cannot listen on {address}: {error.strerror}",
            operation="open",
            site="bind",
            vendor_code=error.errno or 0,
            hint=hint,
        ) from error
    _open_sockets.add(sock)
    return sock, Address(*sock.getsockname()[:2])


def make(family: socket.AddressFamily) -> socket.socket:
    """Return a socket to connect with."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
    _open_sockets.add(sock)
    return sock


def adopt(sock: socket.socket) -> None:
    """Remember an accepted socket for ``_close_copies``."""
    _open_sockets.add(sock)


def reaches_remote_machine(sock: socket.socket) -> bool:
    """Whether the other end of a connected socket is on another machine, as far as addresses tell."""
    try:
        ours, theirs = str(sock.getsockname()[0]), str(sock.getpeername()[0])
    except OSError:
        return False
    return not addresses.is_loopback(theirs) and ours != theirs


def refuse_loopback_advertisement(sock: socket.socket, advertise: Address) -> None:
    """Stop a connection on which a remote machine would be told a loopback address.

    Raises:
        ConnectError: Names both addresses.
    """
    if addresses.is_loopback(advertise.host) and reaches_remote_machine(sock):
        peer = Address(*sock.getpeername()[:2])
        raise ConnectError(
            f"this channel would tell the remote peer {peer} to reach it at {advertise}, which is loopback",
            operation="connect",
            peer=str(peer),
            hint="open the channel with listen='tcp://<address of this host>:0' or advertise=...",
        )


def require_protection(address: Address, host: str, secret: bytes, insecure: bool, operation: str) -> None:
    """Refuse to leave loopback without a secret.

    Args:
        address: What the user named.
        host: The numeric host that it resolved to.
        secret: Empty when there is none.
        insecure: The user's consent.
        operation: "open" or "connect".

    Raises:
        ConfigError: Neither secret nor consent.
    """
    if secret or insecure or addresses.is_loopback(host):
        return
    verb = "listen on" if operation == "open" else "connect to"
    raise ConfigError(
        f"will not {verb} {address} without a secret: anybody who reaches it could read and write registered memory",
        operation=operation,
        hint="set secret= or KVLINK_SECRET on both sides, or insecure=True in a closed network",
    )


@functools.cache
def host_id() -> str:
    """Return an id that processes have in common when they run on one kernel (containers included), else ""."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def on_this_host(other: str) -> bool:
    """Whether the ``host_id`` that a peer told is this host's."""
    return bool(other) and other == host_id()
