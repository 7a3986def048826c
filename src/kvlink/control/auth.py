"""Who proves what: both sides show that they hold the secret, and every later frame shows it again.

The proofs are HMAC-SHA256 under a key derived from the secret, over a label that names the prover's role and the
hash of everything said so far on this connection (both greetings with both nonces, then the first proof). So a proof
holds for one role of one connection: a recorded one meets another nonce, and one sent back meets another label. The
initiator proves first; an acceptor shows nothing to a caller that does not hold the secret.

Frames carry the first 16 bytes of an HMAC under a key of their direction, over their sequence number and bytes. A
frame that is dropped, repeated, reordered, changed or sent back does not verify.

Frames are authenticated, not encrypted. Without a secret the same steps run with an empty one: they then detect
accidents, not attackers, which is why a channel without a secret stays on loopback.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass

TAG_BYTES = 16
SESSION_KEY_BYTES = 32

_SEQUENCE = struct.Struct("<Q")


def secret_key(secret: bytes) -> bytes:
    """Return the key that stands for a secret of any length (empty: none was given)."""
    return hmac.digest(b"kvlink secret v1", secret, "sha256")


class Transcript:
    """The running hash of what both sides said before they were authenticated."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256(b"kvlink transcript v1")

    def add(self, data: bytes) -> None:
        """Append a message; its length is bound too."""
        self._hash.update(_SEQUENCE.pack(len(data)))
        self._hash.update(data)

    def digest(self) -> bytes:
        """Return the hash of what was added so far."""
        return self._hash.copy().digest()


def prove(key: bytes, role: str, transcript: Transcript) -> bytes:
    """Return the 32-byte proof of ``role`` ("initiator" or "acceptor") over the transcript so far."""
    return hmac.digest(key, b"kvlink proof v1 " + role.encode() + b"\0" + transcript.digest(), "sha256")


def proof_holds(proof: bytes, key: bytes, role: str, transcript: Transcript) -> bool:
    """Return whether ``proof`` is that of ``role``; takes the same time whether or not it is."""
    return hmac.compare_digest(proof, prove(key, role, transcript))


@dataclass(frozen=True)
class SessionKeys:
    """Keys of one connection, the same on both sides.

    Attributes:
        initiator: Authenticates what the initiator sends.
        acceptor: Authenticates what the acceptor sends.
        data: Root of the keys given to providers.
    """

    initiator: bytes
    acceptor: bytes
    data: bytes

    @classmethod
    def derive(cls, key: bytes, transcript: Transcript) -> SessionKeys:
        """Derive the keys from the secret's key and the whole transcript (extract, then expand by label)."""
        root = hmac.digest(key, b"kvlink session v1\0" + transcript.digest(), "sha256")
        return cls(*(hmac.digest(root, label, "sha256") for label in (b"initiator", b"acceptor", b"data")))

    def link_key(self, session: bytes) -> bytes:
        """Return the 32-byte session key of one link attempt, which data connections prove."""
        return hmac.digest(self.data, b"link\0" + session, "sha256")


class FrameAuthenticator:
    """Tags of the frames of one direction, in order."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._sequence = 0

    def tag(self, *parts: bytes) -> bytes:
        """Return the tag of the next frame, whose bytes are ``parts`` joined."""
        data = b"".join((_SEQUENCE.pack(self._sequence), *parts))
        self._sequence += 1
        return hmac.digest(self._key, data, "sha256")[:TAG_BYTES]

    def check(self, tag: bytes, *parts: bytes) -> bool:
        """Return whether ``tag`` is that of the next frame."""
        return hmac.compare_digest(tag, self.tag(*parts))
