"""Data at every size and shape: every byte of both regions and of the guards around them is compared."""

from __future__ import annotations

import itertools

from ..._engine_types import Capability
from ..context import Context, Pair
from ..layouts import Layout, contiguous, mixed, scattered
from ..suite import Case, add_case, case, check

_MIB = 1 << 20
_OPERATIONS = {"put": Capability.PUT, "get": Capability.GET}


def shapes(context: Context) -> list[Layout]:
    """Returns the batches that every combination moves: one block and many, of every size and alignment."""
    unit = context.alignment
    batches = [
        scattered(1, 1, alignment=unit),
        scattered(1, 100, alignment=unit, shift=(1, 2)),
        scattered(7, 33, alignment=unit, shift=(3, 0)),
        scattered(4096, 1, alignment=unit),
        scattered(4096, 64, alignment=unit, shift=(0, 4096)),
        scattered(4097, 17, alignment=unit, shift=(5, 11)),
        scattered(_MIB, 1, alignment=unit),
        scattered(_MIB + 3, 2, alignment=unit, shift=(9, 1)),
        contiguous(4096, 128, alignment=unit),
        mixed(40, alignment=unit, seed=7),
    ]
    if context.full:
        batches += [
            scattered(3, 20_000, alignment=unit, seed=1),
            scattered(512, 8192, alignment=unit, shift=(8, 24)),
            scattered(65_537, 200, alignment=unit, seed=2),
            scattered(16 * _MIB + 1, 2, alignment=unit, shift=(13, 0)),
            scattered(64 * _MIB, 1, alignment=unit),
            mixed(1500, alignment=unit, seed=11),
        ]
    return batches


def move_and_compare(pair: Pair, operation: str, initiator: bool, layout: Layout) -> None:
    """Moves one batch and compares every byte of both regions."""
    actor, peer, other = pair.side(initiator)
    own, theirs = ("a", "b") if initiator else ("b", "a")
    pair.a.fill("a", 1)
    pair.b.fill("b", 2)
    result = actor.transfer(operation, peer, own, theirs, layout.blocks)
    moved = sum(length for _, _, length in layout.blocks)
    what = f"{operation} {layout.name}"
    check(result["nbytes"] == moved, f"{what}: the result says {result['nbytes']} bytes, {moved} were asked for")
    seeds = {"a": 1, "b": 2}
    written, read = (theirs, own) if operation == "put" else (own, theirs)
    for endpoint, name in ((actor, own), (other, theirs)):
        patches = layout.patches(operation, seeds[read]) if name == written else []
        endpoint.verify(name, seeds[name], patches, what=what)


def run_shapes(context: Context, operation: str, initiator: bool, two_processes: bool, kind: str) -> None:
    """Runs every shape over one connection, with regions just large enough for each size class."""
    context.need(kind in context.kinds, f"the provider serves no {kind} memory")
    batches = shapes(context)
    small = [layout for layout in batches if layout.nbytes <= 4 * _MIB]
    large = [layout for layout in batches if layout.nbytes > 4 * _MIB]
    for group in filter(None, (small, large)):
        nbytes = max(layout.nbytes for layout in group)
        pair = context.pair(two_processes=two_processes, nbytes=nbytes, kinds=(kind, kind))
        actor, peer, _ = pair.side(initiator)
        actor.wait_region(peer, "b" if initiator else "a")
        for layout in group:
            move_and_compare(pair, operation, initiator, layout)
        context.release(pair)


def _add(operation: str, initiator: bool, two_processes: bool, kind: str) -> None:
    needs = _OPERATIONS[operation]
    if not initiator:
        needs |= Capability.ACCEPTOR_SUBMIT
    if kind != "plain":
        needs |= Capability.ALLOCATE
    if kind == "device":
        needs |= Capability.COPY
    side = "initiator" if initiator else "acceptor"
    where = "two processes" if two_processes else "one process"
    add_case(
        Case(
            "data",
            f"{operation} by the {side} in {where} of {kind} memory",
            lambda context: run_shapes(context, operation, initiator, two_processes, kind),
            needs=needs,
            proves=needs,
            timeout=150.0,
            quiet=True,
        )
    )


for _combination in itertools.product(_OPERATIONS, (True, False), (False, True), ("plain", "allocated", "device")):
    _add(*_combination)


@case("data", "between kinds of memory", needs=Capability.PUT, timeout=90, quiet=True)
def between_kinds(context: Context) -> None:
    """Any local kind with any remote kind; memory that peers cannot reach serves as the local side too."""
    pairs = [(own, theirs) for own in context.local_kinds for theirs in context.kinds if own != theirs]
    context.need(pairs, f"the provider serves only {context.kinds[0]} memory")
    for kinds in pairs:
        pair = context.pair(two_processes=True, kinds=kinds)
        pair.a.wait_region(pair.ab, "b")
        for operation, capability in _OPERATIONS.items():
            if capability in context.capabilities:
                move_and_compare(pair, operation, True, mixed(10, alignment=context.alignment, seed=3))
        context.release(pair)


@case("data", "several regions in one transfer", needs=Capability.PUT, quiet=True)
def several_regions(context: Context) -> None:
    """One array of ranges over many regions on both sides, as a cache with a tensor per layer needs it."""
    size, count = context.align(5000), 12
    pair = context.pair(two_processes=True, regions=False)
    for index in range(count):
        pair.a.memory(f"layer{index}", 4 * size, 100 + index, kind=context.kind)
        pair.b.memory(f"layer{index}", 4 * size, 200 + index, kind=context.kind)
    pair = context.settle(pair)
    for index in range(count):
        pair.a.wait_region(pair.ab, f"layer{index}")
    parts = [
        {"local": f"layer{index}", "remote": f"layer{count - 1 - index}", "blocks": [[size, 2 * size, size]]}
        for index in range(count)
    ]
    pair.a.call("transfer_parts", operation="put", peer=pair.ab, parts=parts)
    for index in range(count):
        pair.b.verify(f"layer{index}", 200 + index, [(2 * size, 100 + count - 1 - index, size, size)])


@case("data", "empty batches and empty ranges", needs=Capability.PUT, quiet=True)
def nothing_to_move(context: Context) -> None:
    """No ranges, and ranges of no bytes, complete at once and move nothing."""
    pair = context.pair()
    pair.a.wait_region(pair.ab, "b")
    for blocks in ([], [(0, 0, 0)], [(0, 0, 0), (context.align(64), 0, 0)]):
        result = pair.a.transfer("put", pair.ab, "a", "b", blocks)
        check(result["nbytes"] == 0, f"a batch of nothing moved {result['nbytes']} bytes")
    pair.b.verify("b", 2)


@case("data", "the whole region, first and last byte", needs=Capability.PUT, quiet=True)
def whole_region(context: Context) -> None:
    """Ranges that end exactly at the ends of both regions."""
    pair = context.pair(two_processes=True, nbytes=context.align(300_001))
    pair.a.wait_region(pair.ab, "b")
    unit, size = context.alignment, context.align(300_001)
    move_and_compare(pair, "put", True, Layout("the whole region", [(0, 0, size)], size))
    last = [(0, size - unit, unit), (size - unit, 0, unit)]
    move_and_compare(pair, "put", True, Layout("first and last unit crossed", last, size))


@case("data", "limits that the core must respect", needs=Capability.PUT, timeout=90)
def limits(context: Context) -> None:
    """With tight limits declared, long batches and long ranges are split, and the queue may be full at times."""
    log = context.folder / "limits.log"
    unit = 64
    options = {
        "hook_alignment": unit,
        "hook_max_ranges": 5,
        "hook_max_range_bytes": 1000,
        "hook_depth": 3,
        "hook_delay_ms": 2,
        "hook_log": str(log),
    }
    pair = context.pair(through_hook=True, two_processes=True, a={"options": options}, b={"options": options})
    pair.a.wait_region(pair.ab, "b")
    for layout in (scattered(64, 99, alignment=unit), scattered(4096, 20, alignment=unit), contiguous(65_536, 3)):
        move_and_compare(pair, "put", True, layout)
    with context.refused() as caught:
        pair.a.transfer("put", pair.ab, "a", "b", [(0, 0, unit), (unit, unit, unit + 1)])
    check(f"multiple of {unit}" in (text := str(caught.error)) or f"multiples of {unit}" in text, f"unclear: {text}")
    context.close_pair(pair)
    context.check_log(log)
