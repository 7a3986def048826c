"""Registering, publishing, closing: everything about memory except moving it."""

from __future__ import annotations

import time

from ... import errors
from ..._engine_types import Capability
from .. import resources
from ..context import Context
from ..layouts import round_up
from ..suite import case, check


@case("memory", "every kind registers, moves and closes", timeout=60, quiet=True)
def every_kind(context: Context) -> None:
    """Both regions of each kind the provider declares."""
    for kind in context.kinds:
        pair = context.pair(two_processes=True, kinds=(kind, kind))
        context.round_trip(pair)
        pair.b.close_region("b")
        pair.a.call("wait_no_region", peer=pair.ab, name="b")
        pair.a.close_region("a")
        context.release(pair)


@case("memory", "allocated memory is zeroed and page-aligned", needs=Capability.ALLOCATE, quiet=True)
def allocated(context: Context) -> None:
    """At least as long as asked for, and freed memory comes back zeroed."""
    endpoint = context.local()
    endpoint.open()
    kind = "allocated" if "allocated" in context.kinds else "device"
    for round_number in range(3):
        for nbytes in (1, 4096, 1_000_001):
            found = endpoint.call("probe_allocation", kind=kind, nbytes=nbytes, seed=round_number)
            check(found["nbytes"] >= nbytes, f"{found['nbytes']} bytes instead of {nbytes}")
            check(found["nonzero"] == 0, f"{found['nonzero']} bytes of fresh memory are not zero")
            check(found["address"] % 4096 == 0, f"address {found['address']:#x} is not page-aligned")


@case("memory", "double close, use after close", timeout=30)
def double_close(context: Context) -> None:
    """The second close is harmless; transfers that name a closed region are refused and move nothing."""
    pair = context.pair()
    pair.a.wait_region(pair.ab, "b")
    operation = "put" if Capability.PUT in context.capabilities else "get"
    pair.a.close_region("a")
    pair.a.close_region("a")
    size = context.align(64)
    with context.error(errors.ClosedError, errors.RegionRevoked, errors.RangeError, errors.PeerLost):
        pair.a.transfer(operation, pair.ab, "a", "b", [(0, 0, size)])
    pair.b.verify("b", 2)
    pair = context.still(pair)
    pair.a.memory("a", 1 << 16, 5, kind=context.kind)
    pair = context.settle(pair)
    pair.a.wait_region(pair.ab, "b")
    pair.a.transfer(operation, pair.ab, "a", "b", [(0, 0, size)])


@case("memory", "a name is taken once", timeout=30, quiet=True)
def names(context: Context) -> None:
    """Two open regions never share a name; a closed one gives it back, and peers see the new region."""
    pair = context.pair()
    with context.config_error():
        pair.a.memory("a", 4096, 9, kind=context.kind)
    for seed in (11, 12, 13):
        pair.b.close_region("b", keep=False)
        pair = context.still(pair)
        pair.a.call("wait_no_region", peer=pair.ab, name="b")
        nbytes = context.align(4096 * seed)
        pair.b.memory("b", round_up(nbytes, max(1, context.attributes.memory_alignment)), seed, kind=context.kind)
        pair = context.settle(pair)
        pair.a.wait_region(pair.ab, "b")
        if Capability.GET in context.capabilities:
            size = context.align(100)
            pair.a.fill("a", 1)
            pair.a.transfer("get", pair.ab, "a", "b", [(0, nbytes - size, size)])
            pair.a.verify("a", 1, [(0, seed, nbytes - size, size)])


@case("memory", "one piece of memory under two names", timeout=30, quiet=True)
def aliases(context: Context) -> None:
    """Regions may overlap: each handle gives access to its own part, and closing one leaves the other."""
    context.need("plain" in context.kinds, "only memory that the provider allocates is served")
    pair = context.pair(two_processes=True)
    pair.b.call("alias", name="b", alias="b2", offset=context.align(4096), nbytes=context.align(8192))
    pair = context.settle(pair)
    pair.a.wait_region(pair.ab, "b2")
    size = context.align(500)
    if Capability.PUT in context.capabilities:
        pair.a.transfer("put", pair.ab, "a", "b2", [(0, size, size)])
        pair.b.verify("b", 2, [(context.align(4096) + size, 1, 0, size)])
    pair.b.call("close_alias", alias="b2")
    pair = context.still(pair)
    pair.a.call("wait_no_region", peer=pair.ab, name="b2")
    context.round_trip(pair)


@case("memory", "memory registered after the connect", needs=Capability.LATE_MEMORY, timeout=30, quiet=True)
def late(context: Context) -> None:
    """It reaches peers that are connected already, and works there."""
    pair = context.pair(two_processes=True, regions=False)
    pair.a.memory("a", 1 << 16, 1, kind=context.kind)
    pair.b.memory("b", 1 << 16, 2, kind=context.kind)
    if Capability.ACCEPTOR_SUBMIT in context.capabilities:
        pair.b.wait_region(pair.ba, "a")
    context.round_trip(pair)


@case("memory", "without LATE_MEMORY a late region needs a new connection", timeout=40)
def late_refused(context: Context) -> None:
    """Registering works; on the old link its transfers are refused with what to do, on a new one they work."""
    context.need(Capability.LATE_MEMORY not in context.capabilities, "the provider takes memory at any time")
    context.need(not context.settings.through_hook, "the hook hides LATE_MEMORY and does not take it away")
    pair = context.pair(two_processes=True)
    operation = "put" if Capability.PUT in context.capabilities else "get"
    size = context.align(64)
    pair.a.memory("own", 1 << 16, 3, kind=context.kind)
    pair.b.memory("theirs", 1 << 16, 4, kind=context.kind)
    pair.a.wait_region(pair.ab, "theirs")
    for local, remote in (("own", "b"), ("a", "theirs")):
        with context.error(errors.TransferError, errors.StateError, operation=operation) as caught:
            pair.a.transfer(operation, pair.ab, local, remote, [(0, 0, size)])
        check("reconnect" in str(caught.error), f"the error does not say what to do: {caught.error}")
    context.round_trip(pair)
    pair = context.settle(pair)
    for local, remote in (("own", "b"), ("a", "theirs")):
        pair.a.wait_region(pair.ab, remote)
        pair.a.transfer(operation, pair.ab, local, remote, [(0, 0, size)])


@case("memory", "two hundred regions", timeout=60, quiet=True)
def many(context: Context) -> None:
    """All are published, by the right names, and the last works."""
    count = 200
    pair = context.pair(two_processes=True, regions=False)
    size = round_up(4096, max(1, context.attributes.memory_alignment))
    names = [f"region number {index}" for index in range(count)]
    for index, name in enumerate(names):
        pair.b.memory(name, size, 1000 + index, kind=context.kind)
    pair.a.memory("a", size, 1, kind=context.kind)
    pair = context.settle(pair)
    for name in names:
        pair.a.wait_region(pair.ab, name)
    check(pair.a.call("regions", peer=pair.ab) == sorted(names), "the peer's regions are not those published")
    if Capability.GET in context.capabilities:
        unit = context.align(128)
        pair.a.transfer("get", pair.ab, "a", names[-1], [(unit, 0, unit)])
        pair.a.verify("a", 1, [(unit, 1000 + count - 1, 0, unit)])


@case("memory", "access that was not published", timeout=40)
def access(context: Context) -> None:
    """A read-only region cannot be put to, a write-only one cannot be got from; nothing moves."""
    pair = context.pair(two_processes=True, regions=False)
    size = round_up(4096, max(1, context.attributes.memory_alignment))
    pair.a.memory("a", size, 1, kind=context.kind)
    pair.b.memory("readable", size, 2, kind=context.kind, access="r")
    pair.b.memory("writable", size, 3, kind=context.kind, access="w")
    pair = context.settle(pair)
    unit = context.align(64)
    for operation, forbidden, flag in (
        ("put", "readable", Capability.PUT),
        ("get", "writable", Capability.GET),
    ):
        if flag not in context.capabilities:
            continue
        pair.a.wait_region(pair.ab, forbidden)
        with context.error(errors.RangeError, errors.TransferError, operation=operation) as caught:
            pair.a.transfer(operation, pair.ab, "a", forbidden, [(0, 0, unit)])
        check(type(caught.error) is not errors.TransferTimeout, "the refusal is a timeout")
    pair.a.verify("a", 1)
    pair.b.verify("readable", 2)
    pair.b.verify("writable", 3)


@case("memory", "close while a transfer uses it", needs=Capability.PUT, timeout=60)
def close_in_use(context: Context) -> None:
    """close() stops the transfer, which ends with an error or in full, and returns in time."""
    pair = context.pair(through_hook=True, a={"options": {"hook_defer_ms": 1500}})
    pair.a.wait_region(pair.ab, "b")
    size = context.align(4096)
    number = pair.a.submit("put", pair.ab, "a", "b", [(0, 0, size)])
    start = time.monotonic()
    pair.a.close_region("a", timeout=8.0)
    took = time.monotonic() - start
    check(took < 10.0, f"close took {took:.1f} s")
    check(pair.a.call("done", transfer=number), "close returned before the transfer that uses the region had ended")
    try:
        pair.a.wait(number)
    except (errors.TransferError, errors.ClosedError, errors.PeerLost):
        pair.b.verify("b", 2)
    else:
        pair.b.verify("b", 2, [(0, 1, 0, size)])


def _cycles(context: Context, count: int) -> None:
    endpoint = context.local()
    endpoint.open()
    size = round_up(65_536, max(1, context.attributes.memory_alignment))
    for kind in context.kinds:
        found = endpoint.call(
            "cycle_regions",
            kind=kind,
            nbytes=size,
            warm_up=200,
            count=count,
            alignment=context.settings.plain_alignment,
            deadline=200.0,
        )
        what = f"after {count} register and close of {kind} memory"
        check(found["descriptors"] == 0, f"{found['descriptors']} more descriptors {what}")
        check(found["mappings"] <= 8, f"{found['mappings']} more mappings {what}")
        check(
            found["resident_kib"] <= 1024 or resources.sanitized(),
            f"{found['resident_kib']} KiB more resident memory {what}",
        )


@case("memory", "1,000 register and close leave nothing", timeout=60, quiet=True)
def thousand(context: Context) -> None:
    """Descriptors, mappings and resident memory stay flat."""
    _cycles(context, 1000)


@case("memory", "10,000 register and close leave nothing", profile="full", timeout=240, quiet=True)
def ten_thousand(context: Context) -> None:
    """Descriptors, mappings and resident memory stay flat."""
    _cycles(context, 10_000)


@case("memory", "what cannot be registered", timeout=30)
def invalid(context: Context) -> None:
    """Empty, read-only and null memory and bad names are refused at the call."""
    endpoint = context.local()
    endpoint.open()
    for what in ("empty", "readonly", "null", "strided", "long name", "no name", "access"):
        with context.config_error():
            endpoint.call("register_wrong", what=what)
