import gc
import os
import threading
import weakref

import numpy as np
import pytest

import kvlink

from .conftest import count_descriptors, eventually


def test_a_region_registered_while_connected_becomes_visible(pair):
    late = pair.b.register(np.full(4096, 9, np.uint8), name="late", access="r")
    remote = pair.peer_b.wait_region("late", timeout=10)
    assert (remote.nbytes, remote.access, remote.closed) == (4096, "r", False)
    assert set(pair.peer_b.regions) == {"b", "late"} and set(pair.b.regions) == {"b", "late"}
    assert pair.peer_b.get(kvlink.ranges(pair.region_a, remote, [(0, 0, 4096)])).wait(10)
    assert (pair.memory_a[:4096] == 9).all()
    late.close()
    assert remote.closed and set(pair.peer_b.regions) == {"b"} and set(pair.b.regions) == {"b"}


def test_wait_region_says_what_is_published(pair):
    with pytest.raises(kvlink.RequestTimeout, match="published: b"):
        pair.peer_b.wait_region("nope", timeout=0.05)
    with pytest.raises(KeyError, match="the peer publishes b"):
        pair.peer_b.regions["nope"]


def test_a_region_that_cannot_be_imported_says_why(open_channel):
    a, b = open_channel(options={"path": "shm"}), open_channel(options={"path": "shm"})
    b.register(np.zeros(4096, np.uint8), name="plain")
    b.allocate(4096, name="shared")
    peer = a.connect(b.address, timeout=10)
    assert set(peer.regions) == {"shared"}
    with pytest.raises(kvlink.KvlinkError, match="allocate"):
        peer.wait_region("plain", timeout=5)
    with pytest.raises(KeyError, match="cannot be used from here"):
        peer.regions["plain"]


def test_the_view_of_regions_is_safe_while_they_change(pair):
    stop = threading.Event()
    errors = []

    def read():
        while not stop.is_set():
            try:
                sorted(pair.peer_b.regions)
                sorted(pair.b.regions)
            except RuntimeError as error:
                errors.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    for number in range(30):
        pair.b.register(np.zeros(4096, np.uint8), name=f"r{number}").close()
    stop.set()
    thread.join(10)
    assert not errors


@pytest.mark.parametrize("fixture", ["pair", "tcp_pair"])
def test_using_a_closed_region_fails_and_moves_nothing(fixture, request):
    pair = request.getfixturevalue(fixture)
    ranges = pair.ranges()
    pair.region_b.close()
    pair.memory_b[:] = 3
    with pytest.raises(kvlink.KvlinkError):
        pair.peer_b.put(ranges).wait(10)
    assert (pair.memory_b == 3).all()
    with pytest.raises(KeyError):
        pair.peer_b.regions["b"]
    assert pair.peer_b.state == "connected"


def test_a_name_may_be_used_again_and_old_handles_stay_dead(pair):
    old = pair.ranges()
    pair.region_b.close()
    again = np.zeros(1 << 20, np.uint8)
    pair.b.register(again, name="b")
    remote = pair.peer_b.wait_region("b", timeout=10)
    with pytest.raises(kvlink.KvlinkError):
        pair.peer_b.put(old).wait(10)
    assert not again.any()
    assert pair.peer_b.put(kvlink.ranges(pair.region_a, remote, [(0, 0, 4096)])).wait(10)
    assert (again[:4096] == pair.memory_a[:4096]).all()


@pytest.mark.parametrize("fixture", ["pair", "tcp_pair"])
def test_no_byte_moves_after_a_region_was_closed_under_puts(fixture, request):
    pair = request.getfixturevalue(fixture)
    transfers = [pair.peer_b.put(pair.ranges([(0, 0, 1 << 20)] * 64)) for _ in range(8)]
    pair.region_b.close(timeout=10)
    pair.memory_b[:] = 5
    for transfer in transfers:
        try:
            transfer.wait(20)
        except (kvlink.TransferCancelled, kvlink.RegionRevoked):
            pass
    assert (pair.memory_b == 5).all()
    assert pair.peer_b.state == "connected", "the peer itself goes on"


def test_closing_the_local_region_of_a_transfer_revokes_it(tcp_pair):
    transfers = [tcp_pair.peer_b.put(tcp_pair.ranges([(0, 0, 1 << 20)] * 256)) for _ in range(4)]
    tcp_pair.region_a.close(timeout=10)
    outcomes = []
    for transfer in transfers:
        try:
            outcomes.append(transfer.wait(10))
        except (kvlink.RegionRevoked, kvlink.TransferCancelled) as error:
            outcomes.append(error)
    assert len(outcomes) == 4 and any(isinstance(outcome, kvlink.RegionRevoked) for outcome in outcomes)
    with pytest.raises(kvlink.ClosedError):
        tcp_pair.region_a.buffer()


def test_closing_twice_and_from_two_threads(pair):
    threads = [threading.Thread(target=pair.region_b.close) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    pair.region_b.close()
    assert pair.region_b.closed and not pair.b.regions


def test_wrong_registrations(pair):
    memory = np.zeros(64, np.uint8)
    with pytest.raises(kvlink.ConfigError, match="already"):
        pair.a.register(memory, name="a")
    for name in ("", "x" * 201, 5):
        with pytest.raises(kvlink.ConfigError, match="name"):
            pair.a.register(memory, name=name)
    with pytest.raises(kvlink.ConfigError, match="access"):
        pair.a.register(memory, name="n", access="x")
    with pytest.raises(kvlink.ConfigError, match="read-only"):
        pair.a.register(b"bytes", name="n")
    with pytest.raises(kvlink.ConfigError):
        pair.a.allocate(0, name="n")
    assert pair.a.register(memory, name="n").name == "n"


def test_memory_is_kept_alive_until_the_region_closes(open_channel):
    class Array(np.ndarray):
        pass

    memory = np.zeros(4096, np.uint8).view(Array)
    reference = weakref.ref(memory)
    region = open_channel().register(memory, name="m")
    del memory
    gc.collect()
    assert reference() is not None
    region.close()
    gc.collect()
    assert reference() is None


def test_buffer_is_the_memory_itself(open_channel):
    channel = open_channel()
    memory = np.zeros(4096, np.uint8)
    region = channel.register(memory, name="m")
    region.buffer()[10] = 42
    assert memory[10] == 42 and region.address == memory.ctypes.data and region.nbytes == 4096
    region.close()


def test_allocated_memory_outlives_its_region_while_a_view_exists(open_channel):
    channel = open_channel()
    region = channel.allocate(1 << 20, name="m")
    view = np.frombuffer(region.buffer(), np.uint8)
    assert not view.any()
    view[:] = 1
    region.close()
    gc.collect()
    assert view.sum() == 1 << 20  # still mapped
    del view
    gc.collect()
    assert channel.allocate(1 << 20, name="m").buffer()[0] == 0


def test_allocated_memory_travels_as_shm(open_channel):
    a, b = open_channel(), open_channel()
    local, target = a.allocate(1 << 16, name="a"), b.allocate(1 << 16, name="b")
    local.buffer()[:] = os.urandom(1 << 16)
    peer = a.connect(b.address, timeout=10)
    transfer = peer.put(kvlink.ranges(local, peer.regions["b"], [(0, 0, 1 << 16)]))
    assert transfer.wait(10) and transfer.result().path == "shm"
    assert bytes(local.buffer()) == bytes(target.buffer())


def test_registering_and_closing_leaves_no_descriptor(open_channel):
    channel = open_channel()

    def cycle(count):
        for _ in range(count):
            channel.register(np.zeros(4096, np.uint8), name="r").close()
            channel.allocate(4096, name="s").close()

    cycle(5)
    gc.collect()
    before = count_descriptors()
    cycle(100)
    gc.collect()
    assert count_descriptors() <= before


def test_regions_registered_during_a_connect_are_all_published(open_channel):
    a, b = open_channel(), open_channel()
    names = [f"r{number}" for number in range(40)]

    def register():
        for name in names:
            b.register(np.zeros(4096, np.uint8), name=name)

    thread = threading.Thread(target=register)
    thread.start()
    peer = a.connect(b.address, timeout=10)
    thread.join(10)
    eventually(lambda: set(peer.regions) == set(names))
