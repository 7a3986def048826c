"""What two workers say to each other over the authenticated control connection.

The decoder's worker asks (``Peer.request``) and tells (``Peer.notify``); the prefiller's worker answers. Nothing here
comes from HTTP. Messages are msgpack structs with a tag; an unknown tag or a wrong type is refused by the decoder.
"""

from __future__ import annotations

from typing import Union

import msgspec

PROTOCOL = 1
"""Version of these messages; part of the channel identity, so two versions refuse each other at connect."""

OK = "ok"
PENDING = "pending"
UNKNOWN = "unknown"
MISMATCH = "mismatch"


class Layout(msgspec.Struct, tag="layout", frozen=True):
    """Asks how the peer's caches are laid out."""


class Claim(msgspec.Struct, tag="claim", frozen=True):
    """Asks for one hand-off and starts this peer's hold on its lease.

    Attributes:
        id: The hand-off's id.
        digest: Digest of the prompt that the decoder was asked to continue.
        tokens: Tokens of it that the decoder needs.
    """

    id: str
    digest: bytes
    tokens: int


class Checksum(msgspec.Struct, tag="checksum", frozen=True):
    """Asks for the checksum of a hand-off's blocks (``kvlink.verify`` only).

    Attributes:
        id: The hand-off's id.
        first: Index of the first block within the hand-off.
        count: How many blocks.
    """

    id: str
    first: int
    count: int


class Renew(msgspec.Struct, tag="renew", frozen=True):
    """Extends the leases of these hand-offs."""

    ids: list[str]


class Done(msgspec.Struct, tag="done", frozen=True):
    """Ends this peer's hold on these hand-offs: read, failed or dropped."""

    ids: list[str]


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """Tells a decoder that asked too early that the hand-off is here now."""

    id: str


class WirePlane(msgspec.Struct, frozen=True):
    """One evenly spaced row of block-sized pieces in a region of the peer.

    Attributes:
        key: Which layer, tensor and part it holds; both sides name their planes alike.
        region: Name of the region.
        offset: Bytes from the region's start to block 0.
        stride: Bytes from one block to the next.
        length: Bytes of a block's piece.
    """

    key: str
    region: str
    offset: int
    stride: int
    length: int


class LayoutReply(msgspec.Struct, frozen=True):
    """The peer's planes.

    Attributes:
        planes: In the order both sides build them.
        blocks: Number of blocks of its cache.
        leases: Name of the region that holds the generation words.
        lease: Seconds that a claim or a renewal gives.
    """

    planes: list[WirePlane]
    blocks: int
    leases: str
    lease: float


class ClaimReply(msgspec.Struct, frozen=True):
    """One hand-off, or why there is none.

    Attributes:
        status: One of OK, PENDING (a ``Ready`` follows when it comes), UNKNOWN, MISMATCH.
        reason: For people; empty when OK.
        blocks: Block ids as little-endian int64.
        tokens: Tokens that are valid in them.
        slot: Index of its generation word.
        generation: The word's value while the lease stands.
    """

    status: str
    reason: str = ""
    blocks: bytes = b""
    tokens: int = 0
    slot: int = 0
    generation: int = 0


class ChecksumReply(msgspec.Struct, frozen=True):
    """The checksum of the blocks asked for, or status UNKNOWN."""

    status: str
    checksum: str = ""


Request = Union[Layout, Claim, Checksum]
Notice = Union[Renew, Done, Ready]

_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(Request)
_notices = msgspec.msgpack.Decoder(Notice)
layout_reply = msgspec.msgpack.Decoder(LayoutReply)
claim_reply = msgspec.msgpack.Decoder(ClaimReply)
checksum_reply = msgspec.msgpack.Decoder(ChecksumReply)


def encode(message: msgspec.Struct) -> bytes:
    """Encodes any message of this module.

    Args:
        message: The message.

    Returns:
        Its bytes.
    """
    return _encoder.encode(message)


def decode_request(data: bytes) -> Request:
    """Decodes what ``Peer.request`` brought.

    Args:
        data: The bytes received.

    Returns:
        The message.

    Raises:
        msgspec.DecodeError: Not one of the requests above.
    """
    request: Request = _requests.decode(data)
    return request


def decode_notice(data: bytes) -> Notice:
    """Decodes what ``Peer.notify`` brought.

    Args:
        data: The bytes received.

    Returns:
        The message.

    Raises:
        msgspec.DecodeError: Not one of the notices above.
    """
    notice: Notice = _notices.decode(data)
    return notice
