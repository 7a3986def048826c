"""Providers whose connect both sides call at once (connect mode BOTH), through the hook provider over host."""

import threading
import time

import numpy as np
import pytest

import kvlink

from .conftest import SECRET, eventually


@pytest.fixture
def open_both(tmp_path):
    from kvlink.testing import hook

    name = hook.install("host")
    opened = []

    def open_one(**options):
        options = {"hook_mode": "both", "hook_rendezvous": str(tmp_path), **options}
        opened.append(kvlink.open(name, secret=SECRET, options=options))
        return opened[-1]

    yield open_one
    for channel in reversed(opened):
        channel.close()


def test_connect_and_transfer(open_both):
    a, b = open_both(), open_both()
    assert a.attributes.connect_both
    local = a.register(np.full(4096, 3, np.uint8), name="a")
    target = np.zeros(4096, np.uint8)
    b.register(target, name="b")
    peer = a.connect(b.address, timeout=20)
    assert peer.put(kvlink.ranges(local, peer.regions["b"], [(0, 0, 4096)])).wait(10)
    assert (target == 3).all()


def test_a_ring_with_one_connect_at_a_time_does_not_deadlock(open_both):
    channels = [open_both(hook_max_connects=1, hook_connect_ms=30) for _ in range(4)]
    barrier = threading.Barrier(4)
    errors = []

    def connect(number):
        barrier.wait()
        try:
            for step in (1, 2, 3):
                channels[number].connect(channels[(number + step) % 4].address, timeout=30)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=connect, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert [len(channel.peers()) for channel in channels] == [3] * 4


@pytest.mark.parametrize("failing", ["initiator", "acceptor"])
def test_a_connect_that_fails_on_one_side_fails_on_both_soon_and_the_next_one_works(open_both, failing):
    options = {"hook_fail": "link_connect:1"}
    a = open_both(**(options if failing == "initiator" else {}))
    b = open_both(**(options if failing == "acceptor" else {}))
    started = time.monotonic()
    with pytest.raises(kvlink.ConnectError):
        a.connect(b.address, timeout=20)
    assert time.monotonic() - started < 10
    eventually(lambda: not b._hub.accepting and not a._hub.offering)
    assert not a.peers() and not b.peers()
    assert a.connect(b.address, timeout=20).state == "connected"


@pytest.mark.parametrize("function", ["link_open", "link_describe", "link_connect", "rmem_open"])
@pytest.mark.parametrize("mode", ["both", "provider"])
@pytest.mark.parametrize("side", ["a", "b"])
def test_every_failing_step_leaves_both_sides_able_to_try_again(open_both, function, mode, side):
    fail = {"hook_fail": f"{function}:1", "hook_mode": mode}
    a = open_both(**(fail if side == "a" else {"hook_mode": mode}))
    b = open_both(**(fail if side == "b" else {"hook_mode": mode}))
    local = a.register(np.zeros(4096, np.uint8), name="a")
    b.register(np.zeros(4096, np.uint8), name="b")
    try:
        a.connect(b.address, timeout=20).close()  # a region that cannot be imported does not fail the connect
    except kvlink.KvlinkError as error:
        assert str(error)
    eventually(lambda: not b._hub.accepting and not a._hub.attempts and not b._hub.attempts)
    eventually(lambda: not a.peers() and not b.peers())
    peer = a.connect(b.address, timeout=20)
    assert peer.put(kvlink.ranges(local, peer.regions["b"], [(0, 0, 4096)])).wait(10)


def test_a_region_closed_during_a_connect_is_revoked_before_close_returns(open_both):
    a = open_both(hook_mode="provider", hook_connect_ms=400)
    b = open_both(hook_mode="provider")
    local = a.register(np.full(4096, 3, np.uint8), name="a")
    target = np.zeros(4096, np.uint8)
    region = b.register(target, name="b")
    peers = []
    thread = threading.Thread(target=lambda: peers.append(a.connect(b.address, timeout=20)))
    thread.start()
    eventually(lambda: any(attempt.publishes(region.handle) for attempt in b._hub.attempts))
    region.close(timeout=10)
    target[:] = 9
    thread.join(20)
    assert peers and "b" not in peers[0].regions
    with pytest.raises(kvlink.KvlinkError):
        peers[0].put(kvlink.ranges(local, 1 << 20, [(0, 0, 4096)])).wait(5)
    assert (target == 9).all()


def test_a_region_closed_during_a_connect_that_takes_too_long_is_kept(open_both):
    a = open_both(hook_mode="provider", hook_connect_ms=1500)
    b = open_both(hook_mode="provider")
    b.register(np.zeros(4096, np.uint8), name="other")
    region = b.register(np.zeros(4096, np.uint8), name="b")
    thread = threading.Thread(target=lambda: a.connect(b.address, timeout=20))
    thread.start()
    eventually(lambda: any(attempt.publishes(region.handle) for attempt in b._hub.attempts))
    with pytest.raises(kvlink.TransferTimeout, match="may still write"):
        region.close(timeout=0.1)
    assert b.statistics().held_bytes == 4096
    thread.join(20)
    eventually(lambda: b.statistics().held_bytes == 0)
    eventually(lambda: set(next(iter(a.peers().values())).regions) == {"other"})


@pytest.mark.parametrize("when", ["submit:2:LINK_DOWN", "submit:2+:LINK_DOWN"])
def test_a_dead_data_path_ends_the_peer_on_both_sides(open_both, when):
    a = open_both(hook_mode="provider", hook_fail=when)
    b = open_both(hook_mode="provider")
    local = a.register(np.zeros(4096, np.uint8), name="a")
    b.register(np.zeros(4096, np.uint8), name="b")
    peer = a.connect(b.address, timeout=20)
    ranges = kvlink.ranges(local, peer.regions["b"], [(0, 0, 4096)])
    assert peer.put(ranges).wait(10)
    with pytest.raises(kvlink.PeerLost):
        peer.put(ranges).wait(10)
    eventually(lambda: peer.state == "lost" and not a.peers() and not b.peers())
    assert isinstance(peer.error, kvlink.PeerLost) and "data path" in str(peer.error)
    with pytest.raises(kvlink.PeerLost):
        peer.put(ranges)
    again = a.connect(b.address, timeout=20)
    assert again is not peer and again.state == "connected"
