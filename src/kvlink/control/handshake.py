"""One connection from its first byte to two channels that know and trust each other."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from kvlink.control import auth, messages, wire
from kvlink.control.connection import Connection
from kvlink.control.wire import Greeting, ProtocolError, Verdict
from kvlink.errors import AuthenticationError, ConnectError, IdentityMismatch, VersionMismatch

T = TypeVar("T")
CHECK_SECRETS = "give both sides the same secret: secret=, KVLINK_SECRET or secret_file"


@dataclass(frozen=True)
class Local:
    """What a channel says about itself.

    Attributes:
        channel_id: 16 random bytes, fresh for every channel instance.
        key: ``auth.secret_key`` of its secret.
        has_secret: Whether that secret is not empty.
        hello: Its HELLO.
    """

    channel_id: bytes
    key: bytes
    has_secret: bool
    hello: messages.Hello


@dataclass(frozen=True)
class Introduced:
    """An authenticated connection to a channel that may be linked to.

    Attributes:
        connection: Where to talk to it.
        peer_id: Its channel id.
        hello: Its HELLO, already compared with ours.
        keys: Keys of this connection.
    """

    connection: Connection
    peer_id: bytes
    hello: messages.Hello
    keys: auth.SessionKeys


class NotServed(ConnectError):
    """The listener dropped the connection without an answer: too many at once, or closing. Trying again may help."""


async def introduce(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, local: Local, peer: str, *, initiator: bool
) -> Introduced:
    """Authenticate, exchange HELLO and compare. The caller bounds the time and closes the socket on failure.

    Args:
        reader: A new connection's stream.
        writer: Its other direction.
        local: What to say about ourselves.
        peer: The peer's address, for messages.
        initiator: Our role.

    Raises:
        AuthenticationError: The secrets differ, or one side has none.
        VersionMismatch: Wire version or provider differ.
        IdentityMismatch: Both sides name an identity key and disagree.
        ProtocolError: The other side does not follow the protocol.
        NotServed: The listener did not take the connection.
        ConnectError: The connection broke.
    """
    transcript = auth.Transcript()
    ours = Greeting(local.channel_id, os.urandom(wire.NONCE_BYTES), local.has_secret)
    steps = _introduce_as_initiator if initiator else _introduce_as_acceptor
    theirs = await unless_closed(steps(reader, writer, local, ours, transcript, peer), peer)
    keys = auth.SessionKeys.derive(local.key, transcript)
    send, receive = (keys.initiator, keys.acceptor) if initiator else (keys.acceptor, keys.initiator)
    connection = Connection(reader, writer, send, receive)
    if theirs.channel_id == local.channel_id:
        raise ConnectError("that is this channel's own address", operation="connect", peer=peer)
    # The initiator speaks first; an acceptor answers even when it must refuse, so that both sides know why.
    if initiator:
        connection.send(local.hello)
    hello = await unless_closed(connection.receive(), peer)
    if not initiator:
        connection.send(local.hello)
    if not isinstance(hello, messages.Hello):
        raise ProtocolError(f"{type(hello).__name__} instead of HELLO", operation="connect", peer=peer)
    compare(local.hello, hello, peer)
    connection.limit = messages.MAX_SETUP_MESSAGE
    return Introduced(connection, theirs.channel_id, hello, keys)


async def unless_closed(step: Awaitable[T], peer: str) -> T:
    """Await a step of the handshake; a connection that ends meanwhile becomes a ConnectError."""
    try:
        return await step
    except (asyncio.IncompleteReadError, OSError) as error:
        if isinstance(error, ConnectError):
            raise
        reason = str(error) if isinstance(error, OSError) else "it closed the connection"
        raise ConnectError(
            f"the peer went away during the handshake: {reason}",
            operation="connect",
            peer=peer,
            hint="see the peer's log; it may have refused this side or be shutting down",
        ) from error


async def _introduce_as_initiator(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    local: Local,
    ours: Greeting,
    transcript: auth.Transcript,
    peer: str,
) -> Greeting:
    greeting = ours.encode()
    writer.write(greeting)
    transcript.add(greeting)
    data = await _unless_dropped(reader.readexactly(wire.GREETING_BYTES), peer)
    transcript.add(data)
    theirs = _check_greeting(Greeting.decode(data), local, peer)
    proof = auth.prove(local.key, "initiator", transcript)
    writer.write(proof)
    transcript.add(proof)
    verdict = await _unless_dropped(reader.readexactly(wire.VERDICT_BYTES), peer)
    if verdict[0] != Verdict.WELCOME:
        raise AuthenticationError(
            "the peer does not accept our secret", operation="connect", peer=peer, hint=CHECK_SECRETS
        )
    if not auth.proof_holds(verdict[1:], local.key, "acceptor", transcript):
        raise AuthenticationError(
            "the peer does not hold our secret", operation="connect", peer=peer, hint=CHECK_SECRETS
        )
    transcript.add(verdict)
    return theirs


async def _unless_dropped(step: Awaitable[T], peer: str) -> T:
    """Await an answer of the listener; one that closes instead of answering becomes NotServed."""
    try:
        return await step
    except (asyncio.IncompleteReadError, ConnectionResetError) as error:
        if isinstance(error, asyncio.IncompleteReadError) and error.partial:
            raise
        raise NotServed("the listener closed the connection at once", operation="connect", peer=peer) from error


async def _introduce_as_acceptor(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    local: Local,
    ours: Greeting,
    transcript: auth.Transcript,
    peer: str,
) -> Greeting:
    data = await reader.readexactly(wire.GREETING_BYTES)
    theirs = Greeting.decode(data)
    transcript.add(data)
    greeting = ours.encode()
    writer.write(greeting)
    transcript.add(greeting)
    _check_greeting(theirs, local, peer)
    proof = await reader.readexactly(wire.PROOF_BYTES)
    if not auth.proof_holds(proof, local.key, "initiator", transcript):
        writer.write(bytes([Verdict.WRONG_SECRET]) + bytes(wire.PROOF_BYTES))
        raise AuthenticationError(
            "the peer does not hold our secret", operation="accept", peer=peer, hint=CHECK_SECRETS
        )
    transcript.add(proof)
    verdict = bytes([Verdict.WELCOME]) + auth.prove(local.key, "acceptor", transcript)
    writer.write(verdict)
    transcript.add(verdict)
    return theirs


def _check_greeting(theirs: Greeting, local: Local, peer: str) -> Greeting:
    if theirs.version != wire.WIRE_VERSION:
        raise VersionMismatch(
            f"control wire version differs: ours is {wire.WIRE_VERSION}, the peer's is {theirs.version}",
            operation="connect",
            peer=peer,
            hint="install the same kvlink version on both sides",
        )
    if theirs.has_secret != local.has_secret:
        which = "this side has a secret and the peer has none"
        if theirs.has_secret:
            which = "the peer has a secret and this side has none"
        raise AuthenticationError(which, operation="connect", peer=peer, hint=CHECK_SECRETS)
    return theirs


def compare(ours: messages.Hello, theirs: messages.Hello, peer: str) -> None:
    """Compare two HELLOs.

    Raises:
        VersionMismatch: The provider, its wire version or its connect mode differ.
        IdentityMismatch: A key that both name has different values.
    """
    provider_facts: tuple[tuple[str, object, object], ...] = (
        ("transfer channel", ours.provider, theirs.provider),
        (f"wire version of channel {ours.provider!r}", ours.provider_wire, theirs.provider_wire),
        (f"connect mode of channel {ours.provider!r}", ours.connect_mode, theirs.connect_mode),
    )
    for what, mine, other in provider_facts:
        if mine != other:
            raise VersionMismatch(
                f"{what} differs: ours is {mine!r}, the peer's is {other!r}",
                operation="connect",
                peer=peer,
                hint="use the same transfer_channel and package version on both sides",
            )
    _compare_identities(ours.identity, theirs.identity, peer)


def _compare_identities(ours: Mapping[str, str | int], theirs: Mapping[str, str | int], peer: str) -> None:
    # In the order of our application, which names causes before what follows from them.
    for key in ours:
        if key in theirs and ours[key] != theirs[key]:
            raise IdentityMismatch(key, ours[key], theirs[key], peer=peer)
