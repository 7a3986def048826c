"""What the scheduler's half tells the workers' half with each step, and back once at start. All of it is pickled."""

# vLLM is not there when types are checked, so its base classes are Any.
# mypy: disallow-subclassing-any=False

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata, KVConnectorMetadata


@dataclass
class KVLinkHandshake(KVConnectorHandshakeMetadata):
    """Where one worker's channel listens.

    Attributes:
        address: "tcp://host:port" for peers.
        rank: Its tensor-parallel rank.
    """

    address: str
    rank: int


@dataclass
class Hold:
    """Prefiller: hold a finished request's blocks.

    Attributes:
        handoff: The hand-off's id.
        request_id: The request to report when the lease ends.
        blocks: Its block ids.
        tokens: Tokens that are valid in them.
        digest: Digest of the prompt.
    """

    handoff: str
    request_id: str
    blocks: list[int]
    tokens: int
    digest: bytes


@dataclass
class Track:
    """Decoder: a request that will want this hand-off has come; connect and keep its lease alive.

    Attributes:
        request_id: The decoder's request.
        handoff: The hand-off's id.
        addresses: Channel address by rank.
    """

    request_id: str
    handoff: str
    addresses: tuple[str, ...]


@dataclass
class Read:
    """Decoder: pull blocks.

    Attributes:
        request_id: The decoder's request, parked until it is reported.
        handoff: The hand-off's id.
        addresses: Channel address by rank.
        blocks: Local block ids to fill.
        first: Index, within the hand-off, of the block that goes into the first of them.
        tokens: Tokens needed from the hand-off, counted from its start.
        local_tokens: Of these, how many are here already.
        prompt_tokens: Length of the prompt.
        digest: Digest of the prompt.
    """

    request_id: str
    handoff: str
    addresses: tuple[str, ...]
    blocks: list[int]
    first: int
    tokens: int
    local_tokens: int
    prompt_tokens: int
    digest: bytes


@dataclass
class KVLinkMetadata(KVConnectorMetadata):
    """One step's instructions.

    Attributes:
        holds: Prefiller: new hand-offs.
        tracks: Decoder: requests that wait.
        reads: Decoder: pulls to start.
        drops: Decoder: requests (by id) that will not pull after all.
        idle: The step computes nothing; vLLM makes it only because something is waited for.
    """

    holds: list[Hold] = field(default_factory=list)
    tracks: list[Track] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    drops: list[str] = field(default_factory=list)
    idle: bool = False
