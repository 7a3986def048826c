"""What two PD backends tell each other on their kvlink connection, and what a prefiller tells the proxy."""

from __future__ import annotations

from typing import Union

import msgspec

KIND = b"P"
#: Of a hand-off's id and of a key's text; a longer one is not LMCache's.
MAX_TEXT = 1024


class _Message(msgspec.Struct, tag=True):
    pass


class Chunks(msgspec.Struct):
    """The chunks of one batch: all have the full chunk's shape, only the last may have fewer tokens.

    Attributes:
        keys: LMCache's keys as text.
        shape: Of the first memory object.
        dtype: LMCache's name of the element type.
        fmt: Number of LMCache's memory format.
        last_tokens: Tokens of the last one.
    """

    keys: list[str]
    shape: list[int]
    dtype: str
    fmt: int
    last_tokens: int


class Reserve(_Message):
    """Prefiller: pages for a batch, please. The first of a hand-off reserves room for all its chunks.

    Attributes:
        handoff: The request's id, as the proxy gave it.
        batch: Number of this batch in the hand-off.
        total: Chunks of the whole hand-off, 0 when not known.
        chunks: What will be written.
    """

    handoff: str
    batch: int
    total: int
    chunks: Chunks


class Granted(_Message):
    """Decoder: write each chunk to its page.

    Attributes:
        pages: One page a chunk; -1 where the chunk is there already.
        within: Seconds, counted from when the prefiller asked, after which nothing may write there any more.
    """

    pages: list[int]
    within: float


class Wait(_Message):
    """Decoder: no room now; ask again when :class:`Go` comes."""


class Refused(_Message):
    """Decoder: no.

    Attributes:
        reason: Why, with numbers.
        never: It can never fit, however long one waits.
    """

    reason: str
    never: bool = False


class Commit(_Message):
    """Prefiller: the batch is written.

    Attributes:
        handoff: The hand-off.
        batch: Number of the batch.
        complete: All its chunks are written.
    """

    handoff: str
    batch: int
    complete: bool


class Cancel(_Message):
    """Prefiller: forget this hand-off; nothing of it is being written."""

    handoff: str


class Offer(_Message):
    """Prefiller, pull mode: read a batch from here.

    Attributes:
        handoff: The hand-off.
        batch: Number of the batch.
        total: Chunks of the whole hand-off, 0 when not known.
        complete: No further batch will follow.
        chunks: What stands there.
        pages: Where, one page a chunk.
    """

    handoff: str
    batch: int
    total: int
    complete: bool
    chunks: Chunks
    pages: list[int]


class Done(_Message):
    """The answer where there is nothing more to say."""


class Go(_Message):
    """Decoder: room is reserved for this hand-off now."""

    handoff: str


class Pulled(_Message):
    """Decoder: these pages were read, or given up.

    Attributes:
        handoff: The hand-off.
        batch: Number of the batch.
        pages: Which pages.
        failure: Why it was given up; empty when it was read.
    """

    handoff: str
    batch: int
    pages: list[int]
    failure: str = ""


class Held(_Message):
    """Prefiller: whether all those pages were held unchanged until now; if not, what was read is worthless."""

    held: bool


Message = Union[Reserve, Granted, Wait, Refused, Commit, Cancel, Offer, Done, Go, Pulled, Held]
_decoder = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """Returns a message with its kind, as it goes into a request or notification."""
    return KIND + msgspec.msgpack.encode(message)


def decode(body: bytes) -> Message:
    """Reads a message without its kind.

    Raises:
        msgspec.DecodeError: It is none.
    """
    message: Message = _decoder.decode(body)
    return message


class ProxyNotif(msgspec.Struct, tag=True):
    """To the proxy: this rank's part of a request's KV is at the decoder. LMCache's own message, with two more fields.

    Attributes:
        req_id: The request's id, as the proxy gave it.
        rank: This rank.
        world_size: Ranks that will say so.
    """

    req_id: str
    rank: int = 0
    world_size: int = 1


class KVLinkFailureNotif(msgspec.Struct, tag=True):
    """To the proxy: this rank's part will not arrive.

    Attributes:
        req_id: The request's id, as the proxy gave it.
        rank: This rank.
        world_size: Ranks of the request.
        reason: Why.
        never: It can never fit: do not try that again, not even later.
    """

    req_id: str
    rank: int
    world_size: int
    reason: str
    never: bool = False
