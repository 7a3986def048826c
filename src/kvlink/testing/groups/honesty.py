"""What is claimed works, what is not claimed is refused, and errors say what a user needs."""

from __future__ import annotations

import base64
import secrets
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ... import errors
from ..._engine import INITIATOR, EngineChannel, EnginePeer, EngineProvider
from ..._engine_types import Capability
from ...config import validate_options
from .. import resources
from ..context import Context, Pair
from ..endpoint import RemoteEndpoint
from ..layouts import round_up
from ..patterns import pattern
from ..storage import open_some_memory
from ..suite import Case, ConformanceFailure, add_case, case, check
from .semantics import any_operation


def _refuse_transfer(operation: str, initiator: bool) -> Callable[[Context, Pair], None]:
    def attempt(context: Context, pair: Pair) -> None:
        actor, peer, _ = pair.side(initiator)
        own, theirs = ("a", "b") if initiator else ("b", "a")
        if initiator:
            actor.wait_region(peer, theirs)  # a side that may not submit imports nothing
        with context.error(errors.UnsupportedError, operation=operation):
            actor.transfer(operation, peer, own, theirs, [(0, 0, context.align(64))])
        pair.a.verify("a", 1)
        pair.b.verify("b", 2)

    return attempt


def _refuse_allocate(context: Context, pair: Pair) -> None:
    with context.error_text(errors.UnsupportedError):
        pair.a.memory("more", 1 << 16, 3, kind="allocated")


def _refuse_copy(context: Context, pair: Pair) -> None:
    with context.error(errors.UnsupportedError, operation="copy"):
        pair.a.call("copy", name="a", offset=0, length=64, to_region=False)


def _refuse_stream(context: Context, pair: Pair) -> None:
    operation = any_operation(context)
    pair.a.wait_region(pair.ab, "b")
    with context.error(errors.UnsupportedError, operation=operation):
        pair.a.transfer(operation, pair.ab, "a", "b", [(0, 0, context.align(64))], stream=0x1234)


def _no_statistics(context: Context, pair: Pair) -> None:
    found = pair.a.call("provider_statistics")
    check(found == {}, f"a provider without statistics gives {found}")


def _cancel_is_harmless(context: Context, pair: Pair) -> None:
    pair.a.wait_region(pair.ab, "b")
    number = pair.a.submit(any_operation(context), pair.ab, "a", "b", [(0, 0, context.align(64))])
    pair.a.call("cancel", transfer=number)
    try:
        pair.a.wait(number)
    except errors.TransferCancelled:
        pass


_REFUSALS: dict[Capability, Callable[[Context, Pair], None]] = {
    Capability.PUT: _refuse_transfer("put", True),
    Capability.GET: _refuse_transfer("get", True),
    Capability.ACCEPTOR_SUBMIT: _refuse_transfer("put", False),
    Capability.ALLOCATE: _refuse_allocate,
    Capability.COPY: _refuse_copy,
    Capability.STREAM: _refuse_stream,
    Capability.STATISTICS: _no_statistics,
    Capability.CANCEL: _cancel_is_harmless,
}


def _unclaimed(context: Context, capability: Capability) -> None:
    """The provider's own gap where it has one, else the same gap made by the hook."""
    name = str(capability.name)
    mask = {"options": {"hook_mask": name}}
    kind = "plain" if "plain" in context.kinds and capability == Capability.ALLOCATE else context.kind
    if capability == Capability.ALLOCATE and kind != "plain":
        context.need(False, "the provider serves only memory that it allocates")
    moves = capability not in (Capability.PUT, Capability.GET)
    if capability == Capability.COPY and "allocated" in context.kinds:
        kind = "allocated"  # the pattern has to get there without it; perhaps no memory that peers reach
        moves = moves and not context.settings.pair
    if capability not in context.capabilities and not context.settings.through_hook:
        pair = context.pair(kinds=(kind, kind))
    else:
        pair = context.pair(kinds=(kind, kind), through_hook=True, a=mask, b=mask)
    _REFUSALS[capability](context, pair)
    if moves:
        context.round_trip(pair)


for _capability in _REFUSALS:
    add_case(
        Case(
            "honesty",
            f"without {_capability.name} the call says UNSUPPORTED",
            lambda context, capability=_capability: _unclaimed(context, capability),  # type: ignore[misc]
        )
    )


@case("honesty", "COPY copies both ways", needs=Capability.COPY, timeout=40)
def copy(context: Context) -> None:
    """At odd offsets and lengths, and refused outside the region."""
    endpoint = context.local()
    endpoint.open()
    nbytes = round_up(100_000, max(1, context.attributes.memory_alignment))
    endpoint.memory("a", nbytes, 1, kind=context.kinds[-1])
    for offset, length in ((0, 1), (3, 4099), (0, nbytes), (nbytes - 1, 1)):
        content = base64.b64decode(endpoint.call("copy", name="a", offset=offset, length=length, to_region=False))
        check(content == pattern(1, offset, length).tobytes(), f"{length} bytes at {offset} were copied wrong")
    endpoint.call("copy", name="a", offset=5, length=999, to_region=True, seed=8)
    endpoint.verify("a", 1, [(5, 8, 0, 999)])
    with context.error(errors.ConfigError, operation="copy"):
        endpoint.call("copy", name="a", offset=nbytes - 1, length=2, to_region=False)


@case("honesty", "STATISTICS counts", needs=Capability.STATISTICS, timeout=40)
def statistics(context: Context) -> None:
    """There are named counters, and work changes some of them."""
    pair = context.pair()
    before = pair.a.call("provider_statistics")
    check(before, "the provider claims STATISTICS and has no counter")
    check(all(before), "a counter has no name")
    context.round_trip(pair)
    after = pair.a.call("provider_statistics")
    check(set(after) == set(before), "the names of the counters change")
    check(after != before, f"work changed no counter: {after}")


@case("honesty", "STREAM takes the caller's stream", needs=Capability.STREAM, timeout=40)
def stream(context: Context) -> None:
    """Needs a stream of the device: ``--stream MODULE:FUNCTION`` names what makes one in this process."""
    check(context.settings.stream, "STREAM is claimed: name a function that returns a stream handle (--stream)")
    handle = resources.call_named(context.settings.stream)
    pair = context.pair()
    pair.a.wait_region(pair.ab, "b")
    size = context.align(4096)
    for operation, flag in (("put", Capability.PUT), ("get", Capability.GET)):
        if flag in context.capabilities:
            pair.a.transfer(operation, pair.ab, "a", "b", [(0, 0, size)], stream=handle)


@contextmanager
def _raw_link(context: Context) -> Iterator[tuple[RemoteEndpoint, EnginePeer, bytes]]:
    """A link without a control plane: our initiator and an acceptor in a child, with the acceptor's blob."""
    spec, settings = context.spec, context.settings
    session, key = secrets.token_bytes(16), secrets.token_bytes(32)
    child = context.remote("raw")
    options = validate_options(spec, settings.options)
    channel = EngineChannel.open(EngineProvider.load(spec.library_path()), options=options, device=settings.device)
    held = open_some_memory(channel, settings.device)
    try:
        peer = channel.peer_open(INITIATOR, 1, session, key, "here", "there")
        blob = base64.b64decode(
            child.call(
                "raw_acceptor",
                path=spec.library_path(),
                options=options,
                device=settings.device_of(1),
                session=session.hex(),
                key=key.hex(),
                blob=base64.b64encode(peer.describe()).decode(),
            )
        )
        yield child, peer, blob
    finally:
        channel.close()
        del held


@case("honesty", "LINK_CHECK knows a dead peer", needs=Capability.LINK_CHECK, timeout=60)
def link_check(context: Context) -> None:
    """OK while the peer lives, LINK_DOWN with a reason soon after its process died."""
    with _raw_link(context) as (child, peer, blob):
        peer.connect(blob, 10.0)
        peer.check()
        child.signal(signal.SIGKILL)

        def look() -> errors.PeerLost | None:
            try:
                peer.check()
            except errors.PeerLost as error:
                return error
            return None

        lost = resources.until(look, bool, 10.0, lambda _: "link_check still says OK for a dead process")
        check(lost is not None and str(lost), "the reason is missing")


@case("honesty", "BUSY_POLL hands the link back", needs=Capability.BUSY_POLL, timeout=60)
def busy_poll(context: Context) -> None:
    """A caller that waits takes the link's events for a while; what nobody waits for completes all the same."""
    rounds = 200 if context.full else 60
    pair = context.pair(two_processes=True)
    pair.a.wait_region(pair.ab, "b")
    blocks = [(0, 0, context.align(4096))]
    operation = any_operation(context)

    def both(count: int) -> None:
        for _ in range(count):
            pair.a.transfer(operation, pair.ab, "a", "b", blocks)
            pair.a.submit(operation, pair.ab, "a", "b", blocks)

    both(rounds)
    stream = pair.a.stream(operation, pair.ab, "a", "b", blocks)  # others wait on the same link
    both(rounds)
    ended = pair.a.stream_end(stream, timeout=30, stop=True)
    check(not ended["errors"], f"transfers beside it failed: {ended['errors']}")

    def left() -> int:
        return int(pair.a.statistics()["in_flight"])

    resources.until(left, lambda count: count == 0, 10.0, lambda count: f"{count} transfers never completed")


@case("honesty", "INTERRUPT ends a connect", needs=Capability.INTERRUPT, timeout=60)
def interrupt(context: Context) -> None:
    """A link_connect to a process that is stopped, and so never answers, returns soon after link_interrupt."""
    with _raw_link(context) as (child, peer, blob):
        child.signal(signal.SIGSTOP)
        answer: list[Any] = []

        def connect() -> None:
            try:
                peer.connect(blob, 30.0)
                answer.append("connected")
            except errors.KvlinkError as error:
                answer.append(error)

        thread = threading.Thread(target=connect)
        thread.start()

        def look() -> bool:
            peer.interrupt()
            return bool(answer)

        try:
            resources.until(look, bool, 10.0, lambda _: "link_connect went on though it was interrupted")
        finally:
            child.signal(signal.SIGKILL)
            thread.join(30)
        if answer[0] == "connected":
            raise ConformanceFailure("link_connect succeeded with a process that is stopped")
        check(str(answer[0]), "an error without text")
