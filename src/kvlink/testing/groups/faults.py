"""Peers that die, restart and are cut off: clear errors in time, no stale bytes, and the next connection works."""

from __future__ import annotations

import signal
import time
from typing import Any

from ... import errors
from ..._engine_types import Capability
from .. import resources
from ..context import Context, Pair
from ..endpoint import RemoteEndpoint
from ..layouts import scattered
from ..relay import Relay
from ..suite import NOTHING, case, check
from .semantics import any_operation

_MIB = 1 << 20
_LIMIT = 2.0
"""Seconds within which every transfer of a killed peer has to end on one host."""


def _check_lost(end: dict[str, Any], since: float, stalled: float, what: str) -> None:
    check(end["errors"], f"{what}: the stream went on")
    for error in end["errors"]:
        check(error["type"] in ("PeerLost", "TransferCancelled"), f"{what}: unexpected {error}")
        check(error["operation"] and error["text"], f"{what}: an error that says nothing: {error}")
    check(any(error["type"] == "PeerLost" for error in end["errors"]), f"{what}: nothing says that the peer is lost")
    took = time.monotonic() - since
    limit = _LIMIT + stalled
    check(took < limit, f"{what}: the transfers ended only after {took:.2f} s (limit {limit:.2f} s)")


def _streaming(context: Context, operation: str, initiator: bool) -> tuple[Pair, RemoteEndpoint, int]:
    """A fresh child that is worked on without pause by this process, which is the initiator or the acceptor."""
    here, there = context.local("here"), context.remote("there")
    here_address, there_address = here.open(), there.open()
    here.memory("a" if initiator else "b", 16 * _MIB, 1, kind=context.kind)
    there.memory("b" if initiator else "a", 16 * _MIB, 2, kind=context.kind)
    if initiator:
        pair = context.join(here, there, there_address)
        peer, own, theirs = pair.ab, "a", "b"
    else:
        pair = context.join(there, here, here_address)
        peer, own, theirs = pair.ba, "b", "a"
    here.wait_region(peer, theirs)
    layout = scattered(2 * _MIB, 5, alignment=context.alignment)
    stream = here.stream(operation, peer, own, theirs, layout.blocks, depth=6)
    here.stream_count(stream, 2)
    return pair, there, stream


@case("faults", "kill -9 of the peer in the middle of transfers", timeout=90)
def kill_peer(context: Context) -> None:
    """Whoever connected, whichever way the bytes go: every transfer ends within 2 s, and a new peer is served."""
    for operation, flag in (("put", Capability.PUT), ("get", Capability.GET)):
        for initiator in (True, False):
            if flag not in context.capabilities:
                continue
            if not initiator and Capability.ACCEPTOR_SUBMIT not in context.capabilities:
                continue
            pair, there, stream = _streaming(context, operation, initiator)
            here = pair.a if initiator else pair.b
            since = time.monotonic()
            with resources.Stalls() as stalls:
                there.signal(signal.SIGKILL)
                end = here.call("stream_end", stream=stream, timeout=10.0)
            _check_lost(end, since, stalls.seconds, f"{operation} as the {'initiator' if initiator else 'acceptor'}")
            here.wait_peers(0, timeout=5.0)
            (lost, *_) = here.call("wait_lost")
            check(lost["type"] == "PeerLost" and lost["text"], f"on_peer_lost was told {lost}")
            if initiator:
                other = context.remote("next")
                address = other.open()
                other.memory("b", 1 << 16, 2, kind=context.kind)
                context.round_trip(context.join(here, other, address))
            here.close()


@case("faults", "the peer restarts at the same address", timeout=60)
def restart(context: Context) -> None:
    """Nothing that was meant for the old process reaches the new one, though its address and names are the same."""
    here, old = context.local("here"), context.remote("old")
    here.open()
    address = old.open()
    here.memory("a", 8 * _MIB, 1, kind=context.kind)
    old.memory("b", 8 * _MIB, 2, kind=context.kind)
    pair = context.join(here, old, address)
    here.wait_region(pair.ab, "b")
    operation = any_operation(context)
    layout = scattered(_MIB, 6, alignment=context.alignment)
    stream = here.stream(operation, pair.ab, "a", "b", layout.blocks, depth=6)
    here.stream_count(stream, 1)
    old.signal(signal.SIGKILL)
    new = context.remote("new")
    new.open(listen=address)
    new.memory("b", 8 * _MIB, 3, kind=context.kind)
    end = here.stream_end(stream, timeout=10.0)
    check(end["errors"], "transfers to the dead process went on")
    here.wait_peers(0, timeout=5.0)
    with context.error(errors.PeerLost, errors.ClosedError):
        here.transfer(operation, pair.ab, "a", "b", layout.blocks)
    new.verify("b", 3, what="the new process before anyone connected to it")
    again = context.join(here, new, address)
    check(again.ab != pair.ab, "the restarted process has the id of the dead one")
    here.fill("a", 1)
    here.wait_region(again.ab, "b")
    if operation == "put":
        here.transfer("put", again.ab, "a", "b", layout.blocks)
        new.verify("b", 3, layout.patches("put", 1))
    else:
        here.transfer("get", again.ab, "a", "b", layout.blocks)
        here.verify("a", 1, layout.patches("get", 3))


@case("faults", "the control connection is cut", timeout=60)
def control_cut(context: Context) -> None:
    """Both sides notice, transfers end, and the two can connect again."""
    for hard in (True, False):
        a, b = context.local("a"), context.remote("b")
        a.open()
        address = b.open()
        relay = Relay(address)
        context.later(relay.cut)
        a.memory("a", 16 * _MIB, 1, kind=context.kind)
        b.memory("b", 16 * _MIB, 2, kind=context.kind)
        pair = context.join(a, b, relay.address)
        a.wait_region(pair.ab, "b")
        layout = scattered(2 * _MIB, 5, alignment=context.alignment)
        stream = a.stream(any_operation(context), pair.ab, "a", "b", layout.blocks, depth=4)
        a.stream_count(stream, 1)
        since = time.monotonic()
        with resources.Stalls() as stalls:
            relay.cut(hard=hard)
            end = a.stream_end(stream, timeout=10.0)
        _check_lost(end, since, stalls.seconds, "after the cut")
        a.wait_peers(0, timeout=5.0)
        b.wait_peers(0, timeout=5.0)
        context.round_trip(context.join(a, b, address))
        a.close()
        b.close()


@case("faults", "the connection breaks in the handshake", needs=Capability.INTERRUPT, proves=NOTHING, timeout=60)
def handshake_cut(context: Context) -> None:
    """An error before the deadline on one side, nothing left on the other, and the next attempt works."""
    a, b = context.local("a", through_hook=True), context.remote("b", through_hook=True)
    # In connect mode BOTH with an acceptor that never comes, the initiator stays inside link_connect.
    a.open(options={"hook_mode": "both"})
    address = b.open(options={"hook_mode": "both", "hook_connect_ms": 3600_000})
    relay = Relay(address)
    context.later(relay.cut)
    pending = a.start("connect", address=relay.address, timeout=20.0)
    resources.until(
        lambda: list(context.folder.glob("kvlink-hook-*")), bool, 10.0, lambda _: "the initiator is not in link_connect"
    )
    since = time.monotonic()
    relay.cut()
    with context.error(errors.ConnectError, errors.PeerLost):
        pending.result(15)
    check(time.monotonic() - since < 5.0, "a broken connection was noticed late")
    b.wait_peers(0)
    a.close()
    b.close()
    a.open()
    address = b.open()
    a.memory("a", 1 << 16, 1, kind=context.kind)
    b.memory("b", 1 << 16, 2, kind=context.kind)
    context.round_trip(context.join(a, b, address))


@case("faults", "a stopped peer does not hold up a close", timeout=90)
def stopped_peer(context: Context) -> None:
    """The peer is stopped, not dead: closing our region or channel still ends in time, and says what it keeps."""
    pair, there, stream = _streaming(context, any_operation(context), True)
    there.signal(signal.SIGSTOP)
    start = time.monotonic()
    try:
        pair.a.close_region("a", timeout=1.0)
    except errors.KvlinkError as error:
        check(str(error), "an error without text")
    took = time.monotonic() - start
    check(took < 10.0, f"close of the region took {took:.1f} s")
    took = pair.a.close(grace=1.0)
    check(took < 6.0, f"close of the channel took {took:.1f} s")
    pair.a.stream_end(stream, timeout=5.0)


@case("faults", "garbage on the control listener", timeout=40)
def garbage(context: Context) -> None:
    """Strangers that send nonsense, too much, or nothing harm neither the listener nor the peers."""
    pair = context.pair(two_processes=True)
    context.send_garbage(pair.b.call("address"))
    context.round_trip(pair)
    other = context.local("other")
    other.open()
    other.connect(pair.b.call("address"))
