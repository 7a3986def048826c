"""The prefiller's record of one hand-off."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any


class HandOffFailed(Exception):
    """A hand-off ends without its KV at the decoder.

    Attributes:
        never: It can never fit.
    """

    def __init__(self, reason: str, never: bool = False) -> None:
        super().__init__(reason)
        self.never = never


@dataclass(eq=False)
class Job:
    """One batch of chunks, with a reference on each object.

    Attributes:
        handoff: Whose.
        number: Number of the batch.
        keys: LMCache's keys.
        objects: Its memory objects.
        last: No further batch will follow.
        started: When LMCache handed it over.
        moved: Resolves to the number of objects when the batch is at the decoder or offered there.
    """

    handoff: Outgoing
    number: int
    keys: list[Any]
    objects: list[Any]
    last: bool
    started: float
    moved: Any

    def release(self) -> None:
        """Drops the references, once."""
        objects, self.objects = self.objects, []
        for item in objects:
            item.ref_count_down()


@dataclass(eq=False)
class Outgoing:
    """One request's way to its decoder. Used on the loop, but for what the constructor sets.

    Attributes:
        req_id: The request's id, as the proxy gave it.
        wire_id: What the decoder calls it: the same id used twice gets two of them.
        peer_id: LMCache's id of the decoder.
        url: "host:port" of the decoder's channel.
        total: Chunks in all, 0 when not known.
        batches: Batches handed over so far.
        chunks: Chunks at the decoder.
        running: Batches under way.
        offered: Pages that the decoder has yet to read, by batch (pull modes).
        uncommitted: Batches that the decoder has yet to show (pull).
        last_seen: The last batch was handed over.
        told: The proxy was told that all is there.
        failure: Why it failed, or None.
        peer: The decoder, once connected.
        go: Set when the decoder has room.
        touched: When something last happened.
    """

    req_id: str
    wire_id: str
    peer_id: str
    url: str
    total: int
    batches: int = 0
    chunks: int = 0
    running: int = 0
    offered: dict[int, tuple[Job, set[int]]] = field(default_factory=dict)
    uncommitted: set[int] = field(default_factory=set)
    last_seen: bool = False
    told: bool = False
    failure: HandOffFailed | None = None
    peer: Any = None
    go: asyncio.Event = field(default_factory=asyncio.Event)
    touched: float = field(default_factory=time.monotonic)
