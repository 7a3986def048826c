"""What authenticated channels say to each other: typed messages in msgpack, with caps on every size.

::

    HELLO / HELLO                 who each side is; both compare and stop on a difference
    OFFER -> ANSWER | BUSY | EXISTS | REJECT
    READY / READY, GO             both sides hold everything; then the providers connect
    DONE | FAIL / DONE | FAIL     the link is open only if both said DONE
    afterwards: REGION_ADD, REGION_CLOSE / REGION_CLOSED, REQUEST / REPLY, NOTIFY, BYE
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec

from kvlink.control.wire import ProtocolError

MAX_REQUEST_BYTES = 1 << 20
MAX_NOTIFY_BYTES = 1 << 16
MAX_NAME = 200
#: Caps on one message's bytes: while two sides introduce themselves, while they set up a link, and afterwards.
MAX_HELLO_MESSAGE = 64 << 10
MAX_SETUP_MESSAGE = 16 << 20
MAX_MESSAGE = 8 << 20

Name = Annotated[str, msgspec.Meta(max_length=MAX_NAME)]
Text = Annotated[str, msgspec.Meta(max_length=4096)]
Blob = Annotated[bytes, msgspec.Meta(max_length=4 << 20)]
SessionId = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Handle = Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]
Milliseconds = Annotated[int, msgspec.Meta(ge=0, le=86_400_000)]
Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class Hello(msgspec.Struct, tag=1, array_like=True, frozen=True):
    """Who the sender is."""

    name: Name
    address: Name
    provider: Name
    provider_version: Name
    provider_wire: Count
    connect_mode: Count
    host_id: Name
    identity: dict[Name, Annotated[str, msgspec.Meta(max_length=4096)] | int]


class RegionInfo(msgspec.Struct, array_like=True, frozen=True):
    """One published region."""

    handle: Handle
    name: Name
    nbytes: Count
    access: Annotated[int, msgspec.Meta(ge=0, le=3)]
    device: Name
    blob: Blob


class Offer(msgspec.Struct, tag=2, array_like=True, frozen=True):
    """The initiator's side of a link; ``dead`` are sessions that the acceptor may still believe in."""

    session: SessionId
    timeout_ms: Milliseconds
    link: Blob
    regions: list[RegionInfo]
    dead: list[SessionId]


class Answer(msgspec.Struct, tag=3, array_like=True, frozen=True):
    """The acceptor's side of a link."""

    link: Blob
    regions: list[RegionInfo]


class Busy(msgspec.Struct, tag=4, array_like=True, frozen=True):
    """Not now; offer again after about ``retry_ms``."""

    retry_ms: Milliseconds
    reason: Text


class Exists(msgspec.Struct, tag=5, array_like=True, frozen=True):
    """The acceptor holds an open link with the initiator's channel: this one."""

    session: SessionId


class Reject(msgspec.Struct, tag=6, array_like=True, frozen=True):
    """No, and asking again will not help."""

    reason: Text


class Ready(msgspec.Struct, tag=7, array_like=True, frozen=True):
    """The sender holds everything that its provider's connect needs."""


class Go(msgspec.Struct, tag=8, array_like=True, frozen=True):
    """Connect now, within ``timeout_ms``."""

    timeout_ms: Milliseconds


class Done(msgspec.Struct, tag=9, array_like=True, frozen=True):
    """The sender's side of the link is up."""


class Fail(msgspec.Struct, tag=10, array_like=True, frozen=True):
    """The sender's side of the link could not be brought up."""

    reason: Text


class RegionAdd(msgspec.Struct, tag=11, array_like=True, frozen=True):
    """A region was published while connected."""

    region: RegionInfo


class RegionClose(msgspec.Struct, tag=12, array_like=True, frozen=True):
    """A region is withdrawn: drain what uses it within ``timeout_ms``, then say REGION_CLOSED."""

    handle: Handle
    timeout_ms: Milliseconds


class RegionClosed(msgspec.Struct, tag=13, array_like=True, frozen=True):
    """Nothing on the sender's side touches that region any more, nor will."""

    handle: Handle


class Request(msgspec.Struct, tag=14, array_like=True, frozen=True):
    """A question that wants one REPLY or REQUEST_FAILED within ``timeout_ms``."""

    id: Count
    timeout_ms: Milliseconds
    body: bytes


class Reply(msgspec.Struct, tag=15, array_like=True, frozen=True):
    """The answer."""

    id: Count
    body: bytes


class RequestFailed(msgspec.Struct, tag=16, array_like=True, frozen=True):
    """The handler raised, or there is none."""

    id: Count
    reason: Text


class Notify(msgspec.Struct, tag=17, array_like=True, frozen=True):
    """A message without an answer."""

    body: bytes


class Bye(msgspec.Struct, tag=18, array_like=True, frozen=True):
    """The sender ends the link on purpose."""

    reason: Text


Message: TypeAlias = (
    Hello | Offer | Answer | Busy | Exists | Reject | Ready | Go | Done | Fail
    | RegionAdd | RegionClose | RegionClosed | Request | Reply | RequestFailed | Notify | Bye
)  # fmt: skip

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """Return a message's bytes."""
    return _encoder.encode(message)


def decode(data: bytes) -> Message:
    """Read a message.

    Raises:
        ProtocolError: The bytes are no message, or one of its fields breaks its cap.
    """
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"a message that does not decode: {error}") from error


def clip(text: str, limit: int = 4000) -> str:
    """Shorten text for a ``Text`` field."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
