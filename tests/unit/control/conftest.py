import asyncio
import contextlib
import os
import socket

import pytest

from kvlink.control import auth, handshake, messages, sockets
from kvlink.control.addresses import parse
from kvlink.control.connection import Connection

from ..channel.conftest import SECRET, eventually, open_channel  # noqa: F401  (a fixture for these tests too)

KEY = auth.secret_key(SECRET)


def hello(**changes):
    fields = {
        "name": "by hand",
        "address": "tcp://127.0.0.1:1",
        "provider": "host",
        "provider_version": "0",
        "provider_wire": None,
        "connect_mode": 0,
        "host_id": sockets.host_id(),
        "identity": {},
    }
    fields.update(changes)
    return messages.Hello(**fields)


def local(channel=None, key=KEY, **changes):
    """What a hand-made channel says about itself; like ``channel``'s provider."""
    if channel is not None:
        theirs = channel._hub.local.hello
        changes.setdefault("provider_wire", theirs.provider_wire)
        changes.setdefault("connect_mode", theirs.connect_mode)
    changes.setdefault("provider_wire", 1)
    return handshake.Local(os.urandom(16), key, True, hello(**changes))


def raw(channel):
    """A blocking TCP connection to a channel's listener."""
    address = parse(channel.address)
    return socket.create_connection((address.host, address.port), timeout=10)


def read_to_end(sock):
    """Everything the other side says until it ends the connection."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(65536):
            data += part
    return data


@contextlib.asynccontextmanager
async def introduced(channel, who=None):
    """An authenticated connection to a channel, as an initiator made by hand."""
    address = parse(channel.address)
    reader, writer = await asyncio.open_connection(address.host, address.port)
    try:
        yield await handshake.introduce(reader, writer, who or local(channel), channel.address, initiator=True)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def stream_pair():
    """Two connected pairs of streams."""
    left, right = socket.socketpair()
    a, b = await asyncio.open_connection(sock=left), await asyncio.open_connection(sock=right)
    try:
        yield a, b
    finally:
        for _, writer in (a, b):
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


@contextlib.asynccontextmanager
async def connection_pair():
    """Two ends of one authenticated connection."""
    one, two = os.urandom(32), os.urandom(32)
    async with stream_pair() as (a, b):
        yield Connection(*a, one, two), Connection(*b, two, one)


@pytest.fixture
def works(open_channel):  # noqa: F811
    """Asserts that a channel still serves a well-behaved peer."""

    def check(channel):
        other = open_channel()
        channel.on_request = lambda peer, message: message
        assert other.connect(channel.address, timeout=20).request(b"ping", timeout=20) == b"ping"
        other.close()

    return check
