"""What completion, cancel and deadline mean, and that one slow side delays nobody."""

from __future__ import annotations

import random
import time

from ... import errors
from ..._engine_types import Capability
from ..context import Context, Pair
from ..layouts import mixed, scattered
from ..suite import case, check

_MIB = 1 << 20
_ENDED = (errors.TransferError, errors.LinkError, errors.ClosedError)


def any_operation(context: Context) -> str:
    """Returns "put", or "get" for a provider that cannot put."""
    return "put" if Capability.PUT in context.capabilities else "get"


def end_of(pair: Pair, number: int) -> str:
    """Waits for a transfer of the initiator; returns "ok" or the name of its error."""
    try:
        pair.a.wait(number)
    except _ENDED as error:
        return type(error).__name__
    return "ok"


@case("semantics", "every transfer ends exactly once", timeout=60, quiet=True)
def exactly_once(context: Context) -> None:
    """Hundreds at once: one callback each, counters that add up, nothing in flight."""
    pair = context.pair(two_processes=True)
    pair.a.wait_region(pair.ab, "b")
    layout = scattered(512, 8, alignment=context.alignment)
    count = 600 if context.full else 200
    numbers = [pair.a.submit(any_operation(context), pair.ab, "a", "b", layout.blocks) for _ in range(count)]
    for number in numbers:
        pair.a.wait(number)
    calls = pair.a.call("callbacks", transfers=numbers)
    check(set(calls) == {1}, f"callbacks per transfer: {sorted(set(calls))}")
    found = pair.a.statistics()
    check(found["in_flight"] == 0, f"{found['in_flight']} transfers are in flight after all have ended")
    check(found["submitted"] == found["succeeded"] == count, f"{count} transfers, but the counters say {found}")


@case("semantics", "a completed put is visible to whoever is told", needs=Capability.PUT, timeout=90, quiet=True)
def visibility(context: Context) -> None:
    """The peer compares its whole region inside the handler of the notification that comes with the put."""
    pair = context.pair(two_processes=True, nbytes=4 * _MIB)
    pair.a.wait_region(pair.ab, "b")
    layout = mixed(30, alignment=context.alignment, seed=5)
    for round_number in range(40 if context.full else 12):
        seed = 50 + round_number
        pair.a.fill("a", seed)
        pair.b.fill("b", 2)
        patches = layout.patches("put", seed)
        pair.b.call("watch", name="b", seed=2, patches=[list(patch) for patch in patches])
        number = pair.a.submit("put", pair.ab, "a", "b", layout.blocks, notify=f"round {round_number}")
        (note,) = pair.b.call("notes", count=1)
        check(note["message"] == f"round {round_number}", f"the notification is {note['message']!r}")
        check(note["difference"] is None, f"told, but not visible: {note['difference']}")
        pair.a.wait(number)


@case("semantics", "notifications come after the puts before them", needs=Capability.PUT, timeout=60, quiet=True)
def notify_order(context: Context) -> None:
    """Many notifications and puts: the order of the calls is the order of arrival."""
    pair = context.pair(two_processes=True)
    pair.a.wait_region(pair.ab, "b")
    size = context.align(256)
    count = 50
    for index in range(count):
        pair.a.transfer("put", pair.ab, "a", "b", [(index * size, index * size, size)])
        pair.a.call("notify", peer=pair.ab, message=str(index))
    notes = pair.b.call("notes", count=count)
    check([note["message"] for note in notes] == [str(index) for index in range(count)], "the order is lost")
    pair.b.verify("b", 2, [(0, 1, 0, count * size)])


@case("semantics", "a failed put notifies nobody", needs=Capability.PUT, timeout=40)
def no_notify_on_failure(context: Context) -> None:
    """A notification says that the bytes are there, so there is none when they are not."""
    pair = context.pair(two_processes=True, through_hook=True, a={"options": {"hook_fail": "poll:1"}})
    pair.a.wait_region(pair.ab, "b")
    size = context.align(100)
    number = pair.a.submit("put", pair.ab, "a", "b", [(0, 0, size)], notify="lost")
    with context.error(errors.TransferError, operation="put"):
        pair.a.wait(number)
    pair.a.transfer("put", pair.ab, "a", "b", [(0, 0, size)], notify="found")
    notes = pair.b.call("notes", count=1)
    check([note["message"] for note in notes] == ["found"], f"notifications: {notes}")


@case("semantics", "the ranges may change as soon as the call returned", timeout=40, quiet=True)
def ranges_spoiled(context: Context) -> None:
    """The caller's array is overwritten at once; the right bytes move all the same."""
    pair = context.pair(two_processes=True, nbytes=2 * _MIB)
    pair.a.wait_region(pair.ab, "b")
    operation = any_operation(context)
    layout = scattered(4096, 200, alignment=context.alignment, seed=9)
    for _ in range(5):
        pair.a.fill("a", 1)
        pair.b.fill("b", 2)
        pair.a.wait(pair.a.submit(operation, pair.ab, "a", "b", layout.blocks, spoil=True))
        if operation == "put":
            pair.b.verify("b", 2, layout.patches("put", 1))
        else:
            pair.a.verify("a", 1, layout.patches("get", 2))


@case("semantics", "wrong ranges are refused and move nothing", timeout=40)
def wrong_ranges(context: Context) -> None:
    """Out of bounds, overflowing and negative ranges name the row; the good ranges beside them do not move either."""
    pair = context.pair(two_processes=True)
    nbytes = pair.a.wait_region(pair.ab, "b")
    unit = context.align(64)
    good = (0, 0, unit)
    top = (2**63 - 1) // unit * unit
    wrong = {
        "beyond the remote end": (0, nbytes - unit, 2 * unit),
        "beyond the local end": (nbytes - unit, 0, 2 * unit),
        "far away": (0, top - unit, unit),
        "longer than memory": (0, 0, top),
        "negative offset": (0, -unit, unit),
        "negative length": (0, 0, -unit),
    }
    for operation, flag in (("put", Capability.PUT), ("get", Capability.GET)):
        if flag not in context.capabilities:
            continue
        for what, block in wrong.items():
            with context.error_text(errors.RangeError) as caught:
                pair.a.transfer(operation, pair.ab, "a", "b", [good, good, block, good])
            check("2" in str(caught.error), f"{what}: the row is not named: {caught.error}")
    pair.a.verify("a", 1)
    pair.b.verify("b", 2)
    for what in ("dtype", "shape", "strided", "list", "local handle", "remote handle"):
        with context.error_text(errors.RangeError, errors.RegionRevoked):
            pair.a.call("put_malformed", peer=pair.ab, what=what)
    context.round_trip(pair)


@case("semantics", "cancel races with completion", timeout=90)
def cancel_race(context: Context) -> None:
    """Cancelled at any moment: OK means all bytes, cancelled means no later byte; the connection goes on."""
    operation = any_operation(context)
    pair = context.pair(two_processes=True, nbytes=8 * _MIB)
    pair.a.wait_region(pair.ab, "b")
    order = random.Random(4)
    layout = scattered(_MIB, 6, alignment=context.alignment)
    ends: dict[str, int] = {}
    for round_number in range(40 if context.full else 15):
        seed = 300 + round_number
        source, target = (("a", pair.a), ("b", pair.b)) if operation == "put" else (("b", pair.b), ("a", pair.a))
        source[1].fill(source[0], seed)
        target[1].fill(target[0], 2)
        number = pair.a.submit(operation, pair.ab, "a", "b", layout.blocks)
        pause = time.monotonic() + order.choice((0.0, 0.0, 0.0005, 0.002, 0.01))
        while time.monotonic() < pause:
            pass
        pair.a.call("cancel", transfer=number)
        end = end_of(pair, number)
        ends[end] = ends.get(end, 0) + 1
        check(end in ("ok", "TransferCancelled"), f"a cancelled transfer ended with {end}")
        if end == "ok":
            target[1].verify(target[0], 2, layout.patches(operation, seed), what="a transfer that beat its cancel")
    found = pair.a.statistics()
    check(found["in_flight"] == 0, f"{found['in_flight']} transfers never ended; ends: {ends}")
    context.round_trip(pair)


@case("semantics", "a cancelled get touches our memory no more", needs=Capability.GET, timeout=60)
def cancelled_get(context: Context) -> None:
    """After the completion the memory is the caller's again: what it writes then stays."""
    pair = context.pair(two_processes=True, nbytes=16 * _MIB)
    pair.a.wait_region(pair.ab, "b")
    layout = scattered(2 * _MIB, 6, alignment=context.alignment)
    for _ in range(10):
        number = pair.a.submit("get", pair.ab, "a", "b", layout.blocks)
        pair.a.call("cancel", transfer=number)
        end_of(pair, number)
        pair.a.fill("a", 9)
        pair.a.verify("a", 9, what="after a cancelled get had ended")
    pair.a.verify("a", 9, what="some time after a cancelled get had ended")


@case("semantics", "cancel stops what waits", needs=Capability.CANCEL, timeout=40)
def cancel_waiting(context: Context) -> None:
    """A transfer that has not begun ends at once, and moves nothing, though its deadline is far."""
    operation = any_operation(context)
    pair = context.pair(two_processes=True, through_hook=True, a={"options": {"hook_defer_ms": 4000}})
    pair.a.wait_region(pair.ab, "b")
    number = pair.a.submit(operation, pair.ab, "a", "b", [(0, 0, context.align(4096))])
    start = time.monotonic()
    pair.a.call("cancel", transfer=number)
    with context.error(errors.TransferCancelled, operation=operation):
        pair.a.wait(number)
    check(time.monotonic() - start < 2.0, "the cancelled transfer took its time")
    pair.a.verify("a", 1)
    pair.b.verify("b", 2)


@case("semantics", "a deadline passes", timeout=60)
def deadline(context: Context) -> None:
    """The transfer ends with a timeout soon after its deadline; with CANCEL the connection goes on."""
    operation = any_operation(context)
    for mask in ("", "CANCEL"):
        can_cancel = not mask and Capability.CANCEL in context.capabilities
        # Beyond deadline and grace where nothing can be cancelled, else a late success would be the true end.
        options: dict[str, object] = {"hook_defer_ms": 1200 if can_cancel else 2500}
        if mask:
            options["hook_mask"] = mask
        pair = context.pair(two_processes=True, through_hook=True, a={"options": options})
        pair.a.wait_region(pair.ab, "b")
        start = time.monotonic()
        number = pair.a.submit(operation, pair.ab, "a", "b", [(0, 0, context.align(4096))], timeout=0.3)
        with context.error(errors.TransferTimeout, operation=operation):
            pair.a.wait(number)
        took = time.monotonic() - start
        # Without CANCEL only closing the link stops the provider: then the grace is added.
        check(0.25 <= took < (1.5 if can_cancel else 3.0), f"a deadline of 0.3 s ended after {took:.2f} s")
        pair.a.verify("a", 1)
        if can_cancel:
            context.round_trip(pair)
        context.release(pair)


@case("semantics", "deadlines race with completion", timeout=60)
def deadline_race(context: Context) -> None:
    """Tiny deadlines on real work: each transfer ends, as a timeout or in full."""
    operation = any_operation(context)
    pair = context.pair(two_processes=True, nbytes=16 * _MIB)
    pair.a.wait_region(pair.ab, "b")
    layout = scattered(4 * _MIB, 3, alignment=context.alignment)
    for timeout in (0.001, 0.002, 0.004, 0.008, 0.05) * (3 if context.full else 1):
        if pair.a.call("peers").get(pair.ab) != "connected":
            # Work that could not be stopped in time has cost the link: that is allowed, hanging is not.
            pair = context.join(pair.a, pair.b, pair.b.call("address"))
            pair.a.wait_region(pair.ab, "b")
        try:
            number = pair.a.submit(operation, pair.ab, "a", "b", layout.blocks, timeout=timeout)
        except errors.PeerLost:
            continue
        start = time.monotonic()
        end = end_of(pair, number)
        check(end in ("ok", "TransferTimeout", "PeerLost"), f"a transfer with a deadline ended with {end}")
        check(time.monotonic() - start < 5.0, "a transfer outlived its deadline by seconds")


@case("semantics", "requests and their failures", timeout=40)
def requests(context: Context) -> None:
    """Answers come to who asked; a failing handler costs one request."""
    pair = context.pair(two_processes=True, regions=False)
    for endpoint, peer in ((pair.a, pair.ab), (pair.b, pair.ba)):
        check(endpoint.call("request", peer=peer, message="hello") == "echo hello", "a wrong answer")
        with context.error(errors.RequestError, operation="request") as caught:
            endpoint.call("request", peer=peer, message="fail")
        check("on purpose" in str(caught.error), f"the handler's reason is lost: {caught.error}")
        check(endpoint.call("request", peer=peer, message="again") == "echo again", "a wrong answer")


@case("semantics", "a peer that holds its interpreter delays nobody", timeout=60)
def gil_held(context: Context) -> None:
    """Transfers to and from it go on, and it stays connected."""
    seconds = 10.0 if context.full else 3.5
    pair = context.pair(two_processes=True)
    pair.a.wait_region(pair.ab, "b")
    held = pair.b.start("hold_gil", seconds=seconds)
    start = time.monotonic()
    size = context.align(65_536)
    rounds = 0
    while time.monotonic() - start < seconds - 0.5:
        begin = time.monotonic()
        pair.a.transfer(any_operation(context), pair.ab, "a", "b", [(0, 0, size)])
        check(time.monotonic() - begin < 1.0, "a transfer waited for the peer's interpreter")
        rounds += 1
    check(not held.done(), "the peer's interpreter was not held")
    held.result(20)
    check(pair.a.call("peers").get(pair.ab) == "connected", "the peer was lost")
    check(pair.a.call("request", peer=pair.ab, message="hello") == "echo hello", "a wrong answer")
    check(rounds > 20, f"only {rounds} transfers in {seconds} s")
