"""What closing means: nothing moves after it, and nobody waits for ever."""

from __future__ import annotations

from ... import errors
from ..._engine_types import Capability
from ..context import Context, Pair
from ..layouts import scattered
from ..suite import case, check
from .semantics import any_operation, end_of

_MIB = 1 << 20


@case("closing", "close the channel with work in flight", timeout=60)
def close_channel(context: Context) -> None:
    """Everything ends, with an error or in full, and close() returns within its grace."""
    operation = any_operation(context)
    for initiator in (True, False):
        if not initiator and Capability.ACCEPTOR_SUBMIT not in context.capabilities:
            continue
        pair = context.pair(two_processes=True, nbytes=16 * _MIB)
        actor, peer, other = pair.side(initiator)
        own, theirs = ("a", "b") if initiator else ("b", "a")
        actor.wait_region(peer, theirs)
        layout = scattered(2 * _MIB, 5, alignment=context.alignment)
        stream = actor.stream(operation, peer, own, theirs, layout.blocks, depth=6)
        actor.stream_count(stream, 1)
        took = actor.close(grace=1.0)
        check(took < 4.0, f"close with a grace of 1 s took {took:.1f} s")
        end = actor.stream_end(stream, timeout=3.0)
        check(end["errors"], "the stream went on after its channel was closed")
        for error in end["errors"]:
            check(error["type"] in ("ClosedError", "PeerLost", "TransferCancelled"), f"unexpected: {error}")
            check(error["text"], "an error without text")
        other.wait_peers(0)
        context.release(pair)


@case("closing", "close the peer with work in flight", timeout=60)
def close_peer(context: Context) -> None:
    """Its transfers end with an error that says who closed, and one can connect again."""
    operation = any_operation(context)
    pair = context.pair(two_processes=True, nbytes=16 * _MIB)
    pair.a.wait_region(pair.ab, "b")
    layout = scattered(2 * _MIB, 5, alignment=context.alignment)
    stream = pair.a.stream(operation, pair.ab, "a", "b", layout.blocks, depth=6)
    pair.a.stream_count(stream, 1)
    pair.a.call("close_peer", peer=pair.ab)
    end = pair.a.stream_end(stream, timeout=5.0)
    kinds = {error["type"] for error in end["errors"]}
    check(kinds and kinds <= {"ClosedError", "TransferCancelled"}, f"transfers of a closed peer ended with {kinds}")
    pair.b.wait_peers(0)
    context.round_trip(context.join(pair.a, pair.b, pair.b.call("address")))


def _revoke(context: Context, pair: Pair, operation: str, quiet: float) -> None:
    """The owner closes region b while the other side works on it without pause."""
    pair.a.wait_region(pair.ab, "b")
    layout = scattered(256 * 1024, 24, alignment=context.alignment)
    stream = pair.a.stream(operation, pair.ab, "a", "b", layout.blocks, depth=4)
    pair.a.stream_count(stream, 2)
    found = pair.b.call("watch_close", name="b", timeout=5.0, quiet=quiet)
    check(found["changed"] == 0, f"{found['changed']} bytes changed after close() of the region had returned")
    check(found["seconds"] < 6.0, f"close took {found['seconds']:.1f} s")
    end = pair.a.stream_end(stream, timeout=5.0)
    check(end["errors"], "transfers went on after the region was closed")
    for error in end["errors"]:
        check(error["type"] in ("RegionRevoked", "RangeError", "PeerLost"), f"unexpected: {error}")


@case("closing", "a region closed during a peer's put", needs=Capability.PUT, timeout=60)
def revoked_put(context: Context) -> None:
    """No byte moves after close() has returned."""
    for round_number in range(4 if context.full else 2):
        for two_processes in (True, False):
            pair = context.pair(two_processes=two_processes, nbytes=8 * _MIB)
            # Closing rewrites nothing, so what a put writes has to differ from what is there.
            pair.a.fill("a", 70 + round_number)
            _revoke(context, pair, "put", 0.3)
            context.release(pair)


@case("closing", "a region closed during a peer's get", needs=Capability.GET, timeout=60)
def revoked_get(context: Context) -> None:
    """The reader's transfers end; a new region of the same name works."""
    pair = context.pair(two_processes=True, nbytes=8 * _MIB)
    _revoke(context, pair, "get", 0.1)
    context.round_trip_of_new_region(pair)


@case("closing", "a region closed while a put waits at the peer", needs=Capability.PUT, timeout=60)
def revoked_waiting(context: Context) -> None:
    """The put is accepted and would be carried out half a second later: by then the owner has its memory back."""
    for mask in ("", "CANCEL"):
        options: dict[str, object] = {"hook_defer_ms": 600}
        if mask:
            options["hook_mask"] = mask
        pair = context.pair(two_processes=True, through_hook=True, a={"options": options})
        pair.a.wait_region(pair.ab, "b")
        number = pair.a.submit("put", pair.ab, "a", "b", [(0, 0, context.align(65_536))])
        found = pair.b.call("watch_close", name="b", timeout=8.0, quiet=0.9)
        check(found["changed"] == 0, f"{found['changed']} bytes changed after close() had returned")
        try:
            pair.a.wait(number)
        except (errors.TransferError, errors.PeerLost):
            pass
        context.release(pair)


@case("closing", "the core keeps the contract under mixed work", timeout=90)
def contract(context: Context) -> None:
    """A busy life through the hook, which checks threads, order, handles, tags and ranges of every call."""
    logs = [context.folder / "a.log", context.folder / "b.log"]
    pair = context.pair(
        two_processes=True,
        through_hook=True,
        nbytes=4 * _MIB,
        a={"options": {"hook_log": str(logs[0]), "hook_depth": 4}},
        b={"options": {"hook_log": str(logs[1])}},
    )
    pair.a.wait_region(pair.ab, "b")
    unit = context.alignment
    for operation, flag in (("put", Capability.PUT), ("get", Capability.GET)):
        if flag in context.capabilities:
            blocks = scattered(5000, 300, alignment=unit).blocks
            stream = pair.a.stream(operation, pair.ab, "a", "b", blocks, depth=8)
            pair.a.stream_count(stream, 20)
            pair.a.memory(f"extra {operation}", 1 << 16, 3, kind=context.kind)
            pair.a.close_region(f"extra {operation}")
            pair.a.stream_end(stream, timeout=10.0, stop=True)
    blocks = scattered(65_536, 20, alignment=unit).blocks
    numbers = [pair.a.submit(any_operation(context), pair.ab, "a", "b", blocks) for _ in range(20)]
    for number in numbers[::2]:
        pair.a.call("cancel", transfer=number)
    pair.b.close_region("b")
    for number in numbers:
        end_of(pair, number)
    pair.a.call("close_peer", peer=pair.ab)
    context.close_pair(pair)
    context.check_log(*logs)
