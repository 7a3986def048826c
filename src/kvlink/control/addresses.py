"""Addresses: "tcp://host:port" with IPv4, IPv6 in brackets, or a name; who may be reached from where."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass

from kvlink.errors import ConfigError

SCHEME = "tcp://"


@dataclass(frozen=True)
class Address:
    """One endpoint.

    Attributes:
        host: Name or numeric address, without brackets.
        port: 0 lets the system choose.
    """

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{SCHEME}{host}:{self.port}"


def parse(text: str, *, default_port: int | None = None) -> Address:
    """Read an address.

    Args:
        text: "tcp://127.0.0.1:5000", "tcp://[::1]:0", "node7:5000"; the scheme may be left out.
        default_port: Used when the text names none; None makes that an error.

    Raises:
        ConfigError: It is no such address.
    """
    rest = text[len(SCHEME) :] if text.startswith(SCHEME) else text
    if "://" in rest:
        raise ConfigError(f"address {text!r}: only {SCHEME} is known")
    if rest.startswith("["):
        host, bracket, tail = rest[1:].partition("]")
        port_text = tail[1:] if tail.startswith(":") else ""
        well_formed = bool(bracket) and (not tail or tail.startswith(":"))
    elif rest.count(":") > 1:
        host, port_text, well_formed = rest, "", True  # a bare IPv6 address
    else:
        host, _, port_text = rest.partition(":")
        well_formed = True
    if not port_text and default_port is not None and well_formed and host:
        return Address(host, default_port)
    if not well_formed or not host or not port_text.isdecimal() or int(port_text) > 65535:
        raise ConfigError(f"address {text!r} is not of the form tcp://host:port", hint="for example tcp://127.0.0.1:0")
    return Address(host, int(port_text))


def is_loopback(host: str) -> bool:
    """Whether a numeric address (or "localhost") stays on this machine."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def is_wildcard(host: str) -> bool:
    """Whether a numeric address stands for every interface."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def resolve(address: Address, *, operation: str) -> list[tuple[socket.AddressFamily, tuple[str, int]]]:
    """Look a host up; may block.

    Returns:
        Families and numeric addresses to try, in the resolver's order.

    Raises:
        ConfigError: The name is unknown.
    """
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(f"cannot resolve host {address.host!r}: {error}", operation=operation) from error
    out: list[tuple[socket.AddressFamily, tuple[str, int]]] = []
    for family, _, _, _, sockaddr in found:
        entry = (family, (str(sockaddr[0]), int(sockaddr[1])))
        if entry not in out:
            out.append(entry)
    return out


def routable_host(family: socket.AddressFamily) -> str | None:
    """Return this machine's address on its default route, or None; sends nothing."""
    target = "2001:db8::1" if family == socket.AF_INET6 else "192.0.2.1"  # documentation ranges: never reached
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))
            host = str(probe.getsockname()[0])
    except OSError:
        return None
    return None if is_loopback(host) or is_wildcard(host) else host


def advertised(bound: Address, family: socket.AddressFamily, advertise: str | None) -> Address:
    """Return the address that peers are told.

    Args:
        bound: Where the listener is bound, numeric, with its port.
        family: Of the listener.
        advertise: What the user said: "host", "host:port" or None.

    Raises:
        ConfigError: It would be a wildcard, and this machine's own address cannot be told.
    """
    if advertise is not None:
        address = parse(advertise, default_port=bound.port)
        if is_wildcard(address.host):
            raise ConfigError(f"advertise={advertise!r} names no host that a peer could connect to")
        return Address(address.host, address.port or bound.port)
    if not is_wildcard(bound.host):
        return bound
    host = routable_host(family)
    if host is None and family == socket.AF_INET6:
        host = routable_host(socket.AF_INET)  # a dual-stack listener
    if host is None:
        raise ConfigError(
            f"listening on {bound} but this machine has no address that peers could be told",
            hint="pass advertise='host' or listen on one address",
        )
    return Address(host, bound.port)
