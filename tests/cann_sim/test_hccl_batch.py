"""Rules 5 and 20 to 25: what a batch may hold, when it happens, and how a lost peer shows."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from .conftest import Hosts
from .hccl_agent import Agent
from .hccl_client import DEVICE, HOST, MIB
from .hccl_pair import End, Pair

FP32, INT128, RESERVED = 4, 12, 255


@pytest.fixture(scope="module")
def pair(make_host: Hosts) -> Iterator[Pair]:
    """Two agents over RoCE."""
    with Pair(make_host(link="roce")) as made:
        yield made


@pytest.fixture(scope="module")
def ends(pair: Pair) -> tuple[End, End]:
    """A link between them that every test may use."""
    return pair.link()


@pytest.fixture
def fresh(make_host: Hosts) -> Iterator[Pair]:
    """A pair of its own, for tests that end a process."""
    with Pair(make_host(link="roce")) as made:
        yield made


def test_rule_05_the_stream_belongs_to_the_current_context(pair: Pair, ends: tuple[End, End]) -> None:
    one, two = ends
    pair.a.create_context(0)
    foreign = pair.a.stream()
    ops = [(one.address, two.address, 64)]
    assert pair.a.put(one.comm, 1, ops, one.stream) == 15
    assert "107003" in pair.a.error_text()
    assert pair.a.set_device(0) == 0  # back to the default context
    assert pair.a.put(one.comm, 1, ops, foreign) == 15
    assert pair.a.put(one.comm, 1, ops, one.stream) == 0
    assert pair.a.sync(one.stream) == 0


def test_rule_20_null_arguments(pair: Pair, ends: tuple[End, End]) -> None:
    one, two = ends
    ops = [(one.address, two.address, 64)]
    for call in (pair.a.put, pair.a.get):
        assert call(0, 1, ops, one.stream) == 2
        assert call(one.comm, 1, None, one.stream) == 2
        assert call(one.comm, 1, ops, 0) == 2  # the default stream too


@pytest.mark.parametrize(("soc", "limit"), [("A2", 256), ("950", 64)])
def test_rule_20_the_number_of_descriptors(
    request: pytest.FixtureRequest, make_host: Hosts, soc: str, limit: int
) -> None:
    if soc == "950":
        with Agent(make_host(soc="950")) as one:
            one.start(0)
            code, comm = one.init(Pair.table(), 0, "x")
            assert code == 0
            assert one.put(comm, 1, [(1, 1, 1)] * (limit + 1), one.stream()) == 1
            assert one.put(comm, 1, [(1, 1, 1)] * limit, one.stream()) == 6  # not connected: the next check
        return
    pair, (one, two) = request.getfixturevalue("pair"), request.getfixturevalue("ends")
    ops = [(one.address + 64 * index, two.address + 64 * index, 64) for index in range(limit + 1)]
    assert pair.a.put(one.comm, 1, ops, one.stream) == 1
    assert pair.a.put(one.comm, 1, ops[:limit], one.stream) == 0
    assert pair.a.put(one.comm, 1, [], one.stream) == 0
    assert pair.a.sync(one.stream) == 0


def test_rule_20_wrong_ranks(pair: Pair, ends: tuple[End, End]) -> None:
    one, two = ends
    for rank in (0, 2, 99):
        assert pair.a.put(one.comm, rank, [(one.address, two.address, 64)], one.stream) == 1


def test_rule_20_an_unprepared_communicator(pair: Pair, ends: tuple[End, End]) -> None:
    one, two = ends
    comm, _ = pair.comms()
    for call in (pair.a.put, pair.a.get):
        assert call(comm, 1, [(one.address, two.address, 64)], one.stream) == 6


def test_rule_20_a_range_lies_in_one_region(fresh: Pair) -> None:
    comm_a, comm_b = fresh.comms()
    local, _ = fresh.bound(fresh.a, comm_a, 2 * MIB)
    block = fresh.b.malloc(8 * MIB)
    fresh.bound(fresh.b, comm_b, 2 * MIB, DEVICE, block)
    fresh.bound(fresh.b, comm_b, 2 * MIB, DEVICE, block + 2 * MIB)  # adjacent
    assert fresh.prepare(comm_a, comm_b) == (0, 0)
    stream = fresh.a.stream()
    for op, code in {
        (local, block + 2 * MIB - 64, 64): 0,
        (local, block + 2 * MIB - 64, 128): 4,  # spans two
        (local, block + 4 * MIB - 63, 64): 4,  # one byte past the end
        (local, block - 1, 64): 4,
        (local, block + 6 * MIB, 64): 4,  # allocated, not registered
        (local + 2 * MIB - 63, block, 64): 4,
        (local - 1, block, 64): 4,
        (local, block, 2 * MIB): 0,
    }.items():
        assert fresh.a.put(comm_a, 1, [op], stream) == code, op
        assert fresh.a.get(comm_a, 1, [op], stream) == code, op
        if code:
            assert "can't find" in fresh.a.error_text()
    assert fresh.a.sync(stream) == 0


def test_rule_20_what_came_before_the_refused_descriptor_is_done(pair: Pair, ends: tuple[End, End]) -> None:
    one, two = ends
    pair.a.poke(one.address, b"firstother")
    pair.b.poke(two.address, b"x" * 10)
    ops = [(one.address, two.address, 5), (one.address, 1 << 40, 5), (one.address + 5, two.address + 5, 5)]
    assert pair.a.put(one.comm, 1, ops, one.stream) == 4
    assert pair.a.sync(one.stream) == 0
    assert pair.b.peek(two.address, 10) == b"firstxxxxx"


def test_rule_20_the_device_of_the_thread(pair: Pair, ends: tuple[End, End]) -> None:
    one, two = ends
    pair.a.set_device(1)
    assert pair.a.put(one.comm, 1, [(one.address, two.address, 64)], one.stream) == 15
    pair.a.set_device(0)


def test_rule_21_nothing_is_visible_before_completion(pair: Pair, ends: tuple[End, End]) -> None:
    one, two = ends
    pair.b.poke(two.address, b"old")
    pair.a.poke(one.address, b"new")
    pair.a.faults("op.put=delay:200")
    assert pair.a.put(one.comm, 1, [(one.address, two.address, 3)], one.stream) == 0
    assert pair.b.peek(two.address, 3) == b"old"
    # Whoever reuses the buffer now sends what it put there.
    pair.a.poke(one.address, b"bad")
    assert pair.a.sync(one.stream) == 0
    assert pair.b.peek(two.address, 3) == b"bad"
    pair.a.faults("")


def test_rule_21_one_stream_is_in_order_and_two_are_not(pair: Pair, ends: tuple[End, End]) -> None:
    one, two = ends
    pair.a.poke(one.address, b"1234")
    other = pair.a.stream()
    pair.a.faults("op.put@1=delay:200")
    for index, stream in enumerate((one.stream, one.stream, other)):
        assert pair.a.put(one.comm, 1, [(one.address + index, two.address, 1)], stream) == 0
    assert pair.a.sync(other) == 0
    assert pair.b.peek(two.address, 1) == b"3"  # the other stream's came first
    assert pair.a.sync(one.stream) == 0
    assert pair.b.peek(two.address, 1) == b"2"
    pair.a.faults("")


def test_rule_21_freed_target_is_a_violation(make_host: Hosts) -> None:
    # Logged, not aborted: the process that the rule is about is the target, the one that notices the writer.
    with Pair(make_host(), CANN_SIM_ON_VIOLATION="log") as pair:
        one, two = pair.link()
        assert pair.b.free(two.address) == 0
        assert pair.a.put(one.comm, 1, [(one.address, two.address, 64)], one.stream) == 0
        assert pair.a.sync(one.stream) != 0
        assert pair.a.violations() + pair.b.violations() > 0


def test_rule_22_the_length_is_count_times_element(pair: Pair, ends: tuple[End, End]) -> None:
    one, two = ends
    pair.a.poke(one.address, b"abcdefghijklmnop")
    pair.b.poke(two.address, b"." * 16)
    assert pair.a.put(one.comm, 1, [(one.address, two.address, 2, FP32)], one.stream) == 0
    assert pair.a.sync(one.stream) == 0
    assert pair.b.peek(two.address, 10) == b"abcdefgh.."
    count = 2 * MIB // 16
    assert pair.a.put(one.comm, 1, [(one.address, two.address, count, INT128)], one.stream) == 0
    assert pair.a.put(one.comm, 1, [(one.address, two.address, count + 1, INT128)], one.stream) == 4
    assert pair.a.put(one.comm, 1, [(one.address, two.address, 1 << 61, INT128)], one.stream) == 4  # overflows
    assert pair.a.put(one.comm, 1, [(one.address, two.address, 1, RESERVED)], one.stream) == 1
    assert pair.a.sync(one.stream) == 0


@pytest.mark.parametrize(("link", "code"), [("roce", 0), ("hccs", 1)])
def test_rule_22_a_length_of_zero(make_host: Hosts, link: str, code: int) -> None:
    with Pair(make_host(link=link)) as pair:
        one, two = pair.link()
        assert pair.a.put(one.comm, 1, [(one.address, two.address, 0)], one.stream) == code
        assert pair.a.sync(one.stream) == 0


def test_rule_23_a_lost_peer_shows_at_sync_only(fresh: Pair) -> None:
    one, two = fresh.link()
    assert fresh.a.async_error(one.comm) == (0, 0)
    fresh.b.kill()
    start = time.monotonic()
    assert fresh.a.put(one.comm, 1, [(one.address, two.address, 64)], one.stream) == 0
    assert fresh.a.sync(one.stream, 50) == 507046  # my own time is up, the work goes on
    assert fresh.a.sync(one.stream) == 507056
    assert time.monotonic() - start > 0.5  # the retry window
    assert fresh.a.async_error(one.comm) == (0, 21)
    again = fresh.a.stream()
    assert fresh.a.put(one.comm, 1, [(one.address, two.address, 64)], again) == 0
    assert fresh.a.sync(again) == 507056  # the queue pair stays in error


def test_rule_23_a_dropped_peer_shows_the_same_way(fresh: Pair) -> None:
    one, two = fresh.link()
    fresh.a.faults("peer@2=drop")
    assert fresh.a.put(one.comm, 1, [(one.address, two.address, 64)], one.stream) == 0
    assert fresh.a.sync(one.stream) == 0
    assert fresh.a.put(one.comm, 1, [(one.address, two.address, 64)], one.stream) == 0
    assert fresh.a.sync(one.stream) == 507056
    fresh.unlink(one, two)


def test_rule_23_hccs_notices_at_once(make_host: Hosts) -> None:
    with Pair(make_host(link="hccs")) as pair:
        one, two = pair.link()
        pair.b.kill()
        assert pair.a.get(one.comm, 1, [(one.address, two.address, 64)], one.stream) == 0
        assert pair.a.sync(one.stream) == 507057


def test_rule_23_an_aborted_stream_lets_go_of_the_communicator(fresh: Pair) -> None:
    one, two = fresh.link()
    fresh.b.kill()
    assert fresh.a.put(one.comm, 1, [(one.address, two.address, 64)], one.stream) == 0
    assert fresh.a.sync(one.stream, 20) == 507046
    assert fresh.a.destroy_stream_force(one.stream) == 0
    assert fresh.a.unbind(one.comm, one.handle) == 0
    deadline = time.monotonic() + 5
    while (code := fresh.a.destroy(one.comm)) == 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert code == 0


def test_rule_24_the_peers_own_work_is_not_fenced(pair: Pair, ends: tuple[End, End]) -> None:
    one, two = ends
    pair.b.poke(two.address, b"old")
    pair.a.poke(one.address, b"new")
    pair.a.faults("op.put=delay:200")
    assert pair.a.put(one.comm, 1, [(one.address, two.address, 3)], one.stream) == 0
    # A target that takes its own stream's end for the arrival reads old bytes.
    assert pair.b.sync(two.stream) == 0
    assert pair.b.async_error(two.comm) == (0, 0)
    assert pair.b.peek(two.address, 3) == b"old"
    assert pair.a.sync(one.stream) == 0
    assert pair.b.peek(two.address, 3) == b"new"
    pair.a.faults("")


@pytest.mark.parametrize("kind", [DEVICE, HOST])
def test_rule_25_a_get_needs_the_process_not_its_attention(fresh: Pair, kind: int) -> None:
    one, two = fresh.link(kinds=(DEVICE, kind))
    (fresh.b.poke if kind == DEVICE else fresh.b.write_host)(two.address, b"idle")
    pid = fresh.b.pid()
    os.kill(pid, signal.SIGSTOP)
    assert fresh.a.get(one.comm, 1, [(one.address, two.address, 4)], one.stream) == 0
    assert fresh.a.sync(one.stream) == 0
    assert fresh.a.peek(one.address, 4) == b"idle"
    os.kill(pid, signal.SIGKILL)
    fresh.b.process.wait(20)
    assert fresh.a.get(one.comm, 1, [(one.address, two.address, 4)], one.stream) == 0
    assert fresh.a.sync(one.stream) == 507056
