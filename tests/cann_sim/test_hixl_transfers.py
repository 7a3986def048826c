"""Rules 26, 28 and 29: what a HIXL link may transfer, the buffer pool, asynchronous requests, notifies."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Hosts
from .hccl_client import DEVICE, HOST, MIB
from .hixl_client import ABSENT, COMPLETED, READ, WAITING, WRITE
from .hixl_client import FAILED as STATUS_FAILED
from .hixl_pair import HixlPair

PARAM, TIMEOUT, NOT_CONNECTED, UNSUPPORTED, FAILED = 103900, 103901, 103902, 103905, 503900
FLAVOURS = ["8.5.0", "9.0", "9.1"]
POOL = {"BufferPool": "2:2"}


@pytest.fixture(scope="module", params=FLAVOURS)
def linked(request: pytest.FixtureRequest, make_host: Hosts, libs: Path) -> Iterator[tuple[str, HixlPair, int, int]]:
    """A flavour, its pair, and the memory of a link from a to b."""
    with HixlPair(make_host(request.param), libs) as pair:
        local, remote, *_ = pair.link()
        yield request.param, pair, local, remote


def relink(pair: HixlPair) -> None:
    """Makes the link usable again."""
    assert pair.a.hx_disconnect(pair.name_b) == 0
    assert pair.a.hx_connect(pair.name_b) == 0, pair.a.error_text()


def test_rule_26_bytes_go_both_ways(linked: tuple[str, HixlPair, int, int]) -> None:
    _, pair, local, remote = linked
    pair.a.poke(local, b"written")
    assert pair.a.hx_transfer(pair.name_b, WRITE, [(local, remote + 1, 7)]) == 0  # no alignment wanted
    assert pair.b.peek(remote + 1, 7) == b"written"
    assert pair.a.hx_transfer(pair.name_b, READ, [(local + 64, remote + 1, 7)]) == 0
    assert pair.a.peek(local + 64, 7) == b"written"
    ops = [(local + 64 * index, remote + 64 * index, 64) for index in range(1000)]  # cut into batches inside
    assert pair.a.hx_transfer(pair.name_b, WRITE, ops) == 0
    assert pair.b.peek(remote + 1, 7) == pair.a.peek(local + 1, 7)


def test_rule_26_bad_arguments_leave_the_link(linked: tuple[str, HixlPair, int, int]) -> None:
    flavour, pair, local, remote = linked
    good = (local, remote, 64)
    assert pair.a.hx_transfer(pair.name_b, WRITE, [good], 0) == PARAM
    assert pair.a.hx_transfer(pair.name_b, WRITE, [good, (0, remote, 64)]) == PARAM
    assert pair.a.hx_transfer(pair.name_b, WRITE, [(local, 0, 64)]) == PARAM
    assert pair.a.hx_transfer(pair.name_b, WRITE, []) == (PARAM if flavour == "9.1" else 0)
    assert pair.a.hx_start(pair.name_b, WRITE, [(0, remote, 64)])[0] == PARAM
    assert pair.a.hx_transfer("127.0.0.1:1", WRITE, [good]) == NOT_CONNECTED
    assert pair.a.hx_transfer(pair.name_b, WRITE, [good]) == 0


@pytest.mark.parametrize("side", ["local", "remote"])
def test_rule_28_memory_registered_after_connect(linked: tuple[str, HixlPair, int, int], side: str) -> None:
    flavour, pair, local, remote = linked
    late, handle = pair.memory(pair.a if side == "local" else pair.b)
    op = (late, remote, 64) if side == "local" else (local, late, 64)
    assert pair.a.hx_transfer(pair.name_b, WRITE, [op]) == FAILED
    # A failed link stays so in 9.1; before, the next good transfer works.
    assert pair.a.hx_transfer(pair.name_b, WRITE, [(local, remote, 64)]) == (FAILED if flavour == "9.1" else 0)
    relink(pair)
    assert pair.a.hx_transfer(pair.name_b, WRITE, [op]) == 0
    assert pair.a.hx_disconnect(pair.name_b) == 0
    assert (pair.a if side == "local" else pair.b).hx_deregister(handle) == 0
    assert pair.a.hx_connect(pair.name_b) == 0


def test_rule_28_a_range_past_the_region(linked: tuple[str, HixlPair, int, int]) -> None:
    _, pair, local, remote = linked
    assert pair.a.hx_transfer(pair.name_b, WRITE, [(local, remote + 1, 2 * MIB)]) == FAILED
    assert pair.a.hx_start(pair.name_b, WRITE, [(local, remote + 1, 2 * MIB)])[0] == FAILED
    relink(pair)


@pytest.mark.parametrize("flavour", ["8.5.0", "9.1"])
def test_rule_28_the_pool_carries_what_is_not_registered(make_host: Hosts, libs: Path, flavour: str) -> None:
    with HixlPair(make_host(flavour), libs, POOL) as pair:
        registered, target, *_ = pair.link()
        loose_a, loose_b = pair.a.plain_host(8 * MIB), pair.b.plain_host(8 * MIB)
        text = bytes(range(256)) * (5 * MIB // 256)  # more than the pool holds at once
        pair.a.write_host(loose_a, text)
        assert pair.a.hx_transfer(pair.name_b, WRITE, [(loose_a, loose_b, len(text))]) == 0, pair.a.error_text()
        assert pair.b.read_host(loose_b, len(text)) == text
        assert pair.a.hx_transfer(pair.name_b, READ, [(registered, loose_b + 3, 1000)]) == 0
        assert pair.a.peek(registered, 1000) == text[3:1003]
        # TransferAsync never uses it.
        assert pair.a.hx_start(pair.name_b, WRITE, [(loose_a, target, 64)])[0] == FAILED


@pytest.mark.parametrize(("flavour", "bounces"), [("8.5.0", True), ("9.0", False)])
def test_rule_28_in_8_5_short_pieces_take_the_pool(make_host: Hosts, libs: Path, flavour: str, bounces: bool) -> None:
    with HixlPair(make_host(flavour), libs, POOL) as pair:
        local, remote, *_ = pair.link()
        short, long = [(local, remote, 4096)], [(local, remote, MIB)]
        with_pool, without = (_pool_copies(pair, ops) for ops in (short, long))
        assert (with_pool > 0) == bounces
        assert without == 0


def _pool_copies(pair: HixlPair, ops: list[tuple[int, int, int]]) -> int:
    """How many bounce copies of b a write takes."""
    before = pair.b.live("hixl_pool_copies")
    assert pair.a.hx_transfer(pair.name_b, WRITE, ops) == 0
    copies: int = pair.b.live("hixl_pool_copies") - before
    return copies


def test_rule_28_the_pool_takes_unregistered_device_memory_for_host_memory(make_host: Hosts, libs: Path) -> None:
    with HixlPair(make_host(), libs, POOL) as pair:
        _, remote, *_ = pair.link()
        loose = pair.a.malloc(2 * MIB)
        assert pair.a.hx_transfer(pair.name_b, WRITE, [(loose, remote, MIB)]) not in (0, PARAM)
        assert "CheckMemCpyAttr" in pair.a.error_text()


def test_rule_28_the_pool_does_not_mix_kinds(make_host: Hosts, libs: Path) -> None:
    with HixlPair(make_host(), libs, POOL) as pair:
        local, remote, *_ = pair.link()
        loose = pair.a.plain_host(MIB)
        ops = [(local, remote, MIB), (loose, remote + MIB, MIB)]
        assert pair.a.hx_transfer(pair.name_b, WRITE, ops) == PARAM


def test_rule_28_host_memory_over_roce(make_host: Hosts, libs: Path) -> None:
    with HixlPair(make_host(), libs) as pair:
        local, _ = pair.memory(pair.a, MIB, HOST)
        remote, _ = pair.memory(pair.b, MIB, HOST)
        assert pair.a.hx_connect(pair.name_b) == 0
        pair.a.write_host(local, b"host to host")
        assert pair.a.hx_transfer(pair.name_b, WRITE, [(local, remote, 12)]) == 0
        assert pair.b.read_host(remote, 12) == b"host to host"


def test_rule_28_host_memory_over_hccs(make_host: Hosts, libs: Path) -> None:
    with HixlPair(make_host(soc="A3", link="hccs"), libs) as pair:
        local, _ = pair.memory(pair.a, 2 * MIB, DEVICE)
        remote, _ = pair.memory(pair.b, MIB, HOST)
        assert pair.a.hx_connect(pair.name_b) == 0, pair.a.error_text()
        assert pair.a.hx_transfer(pair.name_b, WRITE, [(local, remote, 64)]) == FAILED


def test_rule_29_a_request_is_consumed_by_its_end(linked: tuple[str, HixlPair, int, int]) -> None:
    _, pair, local, remote = linked
    pair.a.faults("op.put=delay:150")
    code, request = pair.a.hx_start(pair.name_b, WRITE, [(local, remote, 64)])
    assert code == 0
    assert pair.a.hx_status(request) == (0, WAITING)
    assert pair.a.hx_wait(request) == (0, COMPLETED)
    assert pair.a.hx_status(request) == (PARAM, STATUS_FAILED)
    assert pair.a.hx_status(987654) == (PARAM, STATUS_FAILED)
    assert pair.a.hx_status(0) == (FAILED, STATUS_FAILED)
    pair.a.faults("")


def test_rule_29_a_failed_request_is_consumed_too(linked: tuple[str, HixlPair, int, int]) -> None:
    _, pair, local, remote = linked
    pair.a.faults("op.put=fail:507013")
    code, request = pair.a.hx_start(pair.name_b, WRITE, [(local, remote, 64)])
    assert code == 0
    assert pair.a.hx_wait(request) == (507013, STATUS_FAILED)
    assert pair.a.hx_status(request) == (PARAM, STATUS_FAILED)
    pair.a.faults("")
    relink(pair)


def test_rule_29_each_release_has_its_own_status_call(linked: tuple[str, HixlPair, int, int]) -> None:
    flavour, pair, _, _ = linked
    assert pair.a.hx_batch_status() == (UNSUPPORTED if flavour == "9.1" else ABSENT)
    assert pair.a.hx_capability(0) == ((0, 1) if flavour == "9.1" else (ABSENT, -1))
    if flavour == "9.1":
        assert pair.a.hx_capability(77) == (0, 0)
        assert pair.a.hx_capability(-1)[0] == PARAM


def test_rule_29_a_request_whose_peer_died_fails(make_host: Hosts, libs: Path) -> None:
    with HixlPair(make_host(), libs) as pair:
        local, remote, *_ = pair.link()
        pair.b.kill()
        code, request = pair.a.hx_start(pair.name_b, WRITE, [(local, remote, 64)])
        assert code == 0
        assert pair.a.hx_wait(request) == (507056, STATUS_FAILED)  # never TIMEOUT
        assert pair.a.hx_transfer(pair.name_b, WRITE, [(local, remote, 64)]) not in (0, PARAM)
        assert pair.a.hx_disconnect(pair.name_b) == 0


def test_rule_26_notifies_go_to_the_server(linked: tuple[str, HixlPair, int, int]) -> None:
    _, pair, _, _ = linked
    assert pair.b.hx_notifies() == []
    assert pair.a.hx_notify(pair.name_b, "one", "1") == 0
    assert pair.a.hx_notify(pair.name_b, "two", "x" * 1024) == 0
    assert pair.a.hx_notify(pair.name_b, "three", "x" * 1025) == PARAM
    assert pair.a.hx_notify(pair.name_b, "four", "4", 0) == PARAM
    assert pair.b.hx_notifies() == ["one=1", "two=" + "x" * 1024]
    assert pair.b.hx_notifies() == []
    assert pair.a.hx_notifies() == []
    assert pair.a.hx_notify(pair.name_b, "lost", "") == 0
    relink(pair)
    assert pair.b.hx_notifies() == []  # the client went before the server asked


def test_rule_26_asynchronous_connects_of_9_1(make_host: Hosts, libs: Path) -> None:
    with HixlPair(make_host("9.1"), libs) as pair:
        assert pair.a.hx_connect_status(pair.name_b) == (0, 0)
        assert pair.a.hx_connect_async(pair.name_b) == 0
        end = time.monotonic() + 10
        while pair.a.hx_connect_status(pair.name_b)[1] == 2 and time.monotonic() < end:
            time.sleep(0.01)
        assert pair.a.hx_connect_status(pair.name_b) == (0, 3)
        assert pair.a.hx_disconnect(pair.name_b) == 0
    with HixlPair(make_host("9.0"), libs) as pair:
        assert pair.a.hx_connect_async(pair.name_b) == ABSENT
