"""What crosses the wire before a peer is authenticated: fixed-size binary, so there is nothing to parse wrongly.

::

    initiator                                 acceptor
    GREETING  magic version flags id nonce ->
                                           <- GREETING  (also on a version that differs, so that both can name both)
    PROOF     HMAC                         ->
                                           <- VERDICT   code HMAC

Everything after that is framed and authenticated, see ``connection``.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

from kvlink.errors import ConnectError

#: Version of the control protocol; peers must agree on it exactly.
WIRE_VERSION = 1
MAGIC = b"kvlink\r\n"
NONCE_BYTES = 32
ID_BYTES = 16
PROOF_BYTES = 32

_GREETING = struct.Struct(f"<8sHH{ID_BYTES}s{NONCE_BYTES}s")
GREETING_BYTES = _GREETING.size
VERDICT_BYTES = 1 + PROOF_BYTES


class GreetingFlag(enum.IntFlag):
    """What a greeting says about its sender."""

    HAS_SECRET = 1


class Verdict(enum.IntEnum):
    """The acceptor's answer to a proof."""

    WELCOME = 0
    WRONG_SECRET = 1


@dataclass(frozen=True)
class Greeting:
    """The first bytes of either side.

    Attributes:
        channel_id: Random id of the sender's channel instance; a restarted process has another.
        nonce: Fresh random bytes of this connection.
        has_secret: Whether the sender was given a secret.
        version: The sender's ``WIRE_VERSION``.
    """

    channel_id: bytes
    nonce: bytes
    has_secret: bool
    version: int = WIRE_VERSION

    def encode(self) -> bytes:
        """Return the greeting's bytes."""
        flags = GreetingFlag.HAS_SECRET if self.has_secret else 0
        return _GREETING.pack(MAGIC, self.version, flags, self.channel_id, self.nonce)

    @classmethod
    def decode(cls, data: bytes) -> Greeting:
        """Read a greeting.

        Args:
            data: Exactly ``GREETING_BYTES`` bytes.

        Raises:
            ProtocolError: The sender does not speak this protocol at all.
        """
        magic, version, flags, channel_id, nonce = _GREETING.unpack(data)
        if magic != MAGIC:
            raise ProtocolError(f"the other side is no kvlink channel: it began with {magic!r}")
        return cls(channel_id, nonce, bool(flags & GreetingFlag.HAS_SECRET), version)


class ProtocolError(ConnectError):
    """The other side sent what this protocol does not allow. Ends that connection, nothing else."""
