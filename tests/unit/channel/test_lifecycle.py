import asyncio
import gc
import os
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

import kvlink

from .conftest import SECRET, Recorder, count_descriptors, eventually


def run_python(source, timeout=30):
    """Runs a script in a fresh interpreter and returns it; its output must be empty but for what it prints."""
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(source)],
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_every_call_on_a_closed_channel_is_a_closed_error(pair):
    pair.a.close()
    pair.a.close()
    for call in (
        lambda: pair.a.connect(pair.b.address),
        lambda: pair.a.register(np.zeros(8, np.uint8), name="x"),
        lambda: pair.a.allocate(8, name="x"),
        pair.a.statistics,
        lambda: asyncio.run(pair.a.connect_async(pair.b.address)),
        lambda: pair.peer_b.put(np.empty(0, kvlink.RANGE)),
        lambda: pair.peer_b.get(np.empty(0, kvlink.RANGE)),
        lambda: pair.peer_b.request(b"", timeout=1),
        lambda: pair.peer_b.notify(b""),
        lambda: pair.peer_b.wait_region("b", timeout=1),
    ):
        with pytest.raises(kvlink.ClosedError):
            call()
    assert pair.a.closed and pair.peer_b.state == "closed" and not pair.a.peers()
    pair.region_a.close()
    pair.peer_b.close()


def test_the_other_side_sees_a_clean_end(pair):
    lost = Recorder()
    pair.b.on_peer_lost = lost
    pair.a.close()
    lost.wait(1)
    assert lost.calls[0][0] is pair.peer_a and isinstance(lost.calls[0][1], kvlink.PeerLost)
    assert "closed by the peer" in str(pair.peer_a.error) and pair.peer_a.state == "lost"
    with pytest.raises(kvlink.PeerLost, match="closed by the peer"):
        pair.peer_a.request(b"", timeout=5)
    assert not pair.b.peers()


def test_closing_a_peer_ends_both_sides_and_a_new_connect_makes_a_new_link(pair):
    ours, theirs = Recorder(), Recorder()
    pair.a.on_peer_lost, pair.b.on_peer_lost = ours, theirs
    old, old_ranges = pair.peer_b, pair.ranges()
    old.close()
    old.close()
    theirs.wait(1)
    assert old.state == "closed" and not ours.calls
    assert not old.regions
    again = pair.a.connect(pair.b.address, timeout=10)
    assert again is not old and again.id == old.id
    with pytest.raises(kvlink.KvlinkError):
        again.put(old_ranges).wait(5)
    assert not pair.memory_b.any()
    assert again.put(kvlink.ranges(pair.region_a, again.regions["b"], [(0, 0, 64)])).wait(10)


def test_notifications_sent_before_close_arrive(pair, recorder):
    pair.b.on_notify = recorder
    for number in range(200):
        pair.peer_b.notify(b"%d" % number)
    pair.peer_b.close()
    recorder.wait(200)
    assert recorder.messages == [b"%d" % number for number in range(200)]


def test_close_ends_every_wait(open_channel):
    a, b = open_channel(), open_channel()
    entered, release = threading.Event(), threading.Event()

    def handler(peer, message):
        entered.set()
        release.wait(20)
        return b""

    b.on_request = handler
    peer = a.connect(b.address, timeout=10)
    outcomes = []

    def expect(call):
        try:
            outcomes.append(call())
        except kvlink.KvlinkError as error:
            outcomes.append(error)

    calls = [
        lambda: peer.request(b"", timeout=30),
        lambda: asyncio.run(peer.request_async(b"", timeout=30)),
        lambda: peer.wait_region("never", timeout=30),
    ]
    threads = [threading.Thread(target=expect, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    assert entered.wait(10)
    started = time.monotonic()
    a.close()
    for thread in threads:
        thread.join(10)
    release.set()
    assert time.monotonic() - started < 5
    assert len(outcomes) == 3 and all(isinstance(outcome, kvlink.ClosedError) for outcome in outcomes), outcomes


def test_close_ends_a_connect_under_way(open_channel):
    import socket

    a = open_channel()
    outcomes = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"

        def connect():
            try:
                a.connect(address, timeout=30)
            except kvlink.KvlinkError as error:
                outcomes.append(error)

        thread = threading.Thread(target=connect)
        thread.start()
        sock, _ = silent.accept()
        with sock:
            a.close()
            thread.join(10)
    assert len(outcomes) == 1 and isinstance(outcomes[0], kvlink.ClosedError)


def test_transfers_in_flight_end_when_their_side_closes(tcp_pair):
    transfers = [tcp_pair.peer_b.put(tcp_pair.ranges([(0, 0, 1 << 20)] * 512)) for _ in range(3)]
    called = Recorder()
    transfers[0].add_done_callback(called)

    async def wait():
        return await transfers[1]

    tasks = []

    def in_loop():
        try:
            tasks.append(asyncio.run(wait()))
        except kvlink.KvlinkError as error:
            tasks.append(error)

    thread = threading.Thread(target=in_loop)
    thread.start()
    tcp_pair.a.close()
    thread.join(10)
    assert len(tasks) == 1
    for transfer in transfers:
        assert transfer.done()
        try:
            transfer.wait(5)
        except kvlink.ClosedError:
            pass
    called.wait(1)


def test_callbacks_and_awaits_after_close_run_at_once(pair):
    transfer = pair.peer_b.put(pair.ranges())
    assert transfer.wait(10)
    pair.a.close()
    called = Recorder()
    transfer.add_done_callback(called)
    assert called.messages == [transfer]

    async def wait():
        return await transfer

    assert asyncio.run(wait()).nbytes == 4096


def test_close_from_a_callback(pair):
    closed = threading.Event()

    def on_notify(peer, message):
        pair.b.close()
        closed.set()

    pair.b.on_notify = on_notify
    pair.peer_b.notify(b"go")
    assert closed.wait(10)
    eventually(lambda: pair.peer_b.state == "lost")


def test_close_from_a_request_handler(pair):
    def on_request(peer, message):
        pair.b.close()
        return b""

    pair.b.on_request = on_request
    with pytest.raises(kvlink.PeerLost):
        pair.peer_b.request(b"", timeout=10)


def test_concurrent_closes(pair):
    threads = [threading.Thread(target=channel.close) for channel in (pair.a, pair.b) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(15)
    assert not any(thread.is_alive() for thread in threads)


def test_a_restarted_channel_at_the_same_address_is_a_new_peer(open_channel):
    a = open_channel()
    b = open_channel()
    local = a.register(np.full(4096, 7, np.uint8), name="a")
    b.register(np.zeros(4096, np.uint8), name="b")
    old = a.connect(b.address, timeout=10)
    stale = kvlink.ranges(local, old.regions["b"], [(0, 0, 4096)])
    address = b.address
    b.close()
    again = open_channel(listen=address)
    memory = np.zeros(4096, np.uint8)
    again.register(memory, name="b")
    assert again.address == address and again.id != b.id
    eventually(lambda: old.state == "lost")
    new = a.connect(address, timeout=10)
    assert new.id == again.id and new is not old
    for peer in (old, new):
        with pytest.raises(kvlink.KvlinkError):
            peer.put(stale).wait(5)
    assert not memory.any()
    assert new.put(kvlink.ranges(local, new.regions["b"], [(0, 0, 4096)])).wait(10)
    assert (memory == 7).all()


def test_a_link_lost_on_one_side_only_is_replaced(pair):
    """One side believes in a link that the other has lost: a new connect must not be told that it exists."""
    session = pair.peer_b._session
    hub = pair.a._hub
    forgotten = threading.Event()

    def forget():  # as if the end of the link had not reached b yet
        hub.sessions.pop(session.peer_id)
        hub.peers = {}
        forgotten.set()

    hub.loop.call(forget)
    assert forgotten.wait(5)
    again = pair.a.connect(pair.b.address, timeout=10)
    assert again is not pair.peer_b and again.state == "connected"
    eventually(lambda: pair.peer_a.state == "lost")
    eventually(lambda: pair.a.id in pair.b.peers())  # b takes it up right after its word that let a go on
    assert pair.b.peers()[pair.a.id].state == "connected"


def test_nothing_is_left_after_close(open_channel):
    def cycle():
        a, b = kvlink.open("host", secret=SECRET), kvlink.open("host", secret=SECRET)
        b.on_request = lambda peer, message: message
        peer = a.connect(b.address, timeout=10)
        assert peer.request(b"x", timeout=10) == b"x"
        a.close()
        b.close()

    def quiet():
        gc.collect()
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("kvlink-")] == []

    cycle()
    eventually(quiet)
    before = count_descriptors()
    for _ in range(5):
        cycle()
    eventually(quiet)
    eventually(lambda: gc.collect() >= 0 and count_descriptors() <= before)


def test_the_interpreter_ends_without_close():
    started = time.monotonic()
    done = run_python(
        """
        import kvlink, numpy as np
        a, b = kvlink.open("host"), kvlink.open("host")
        region = a.register(np.zeros(1 << 20, np.uint8), name="a")
        b.register(np.zeros(1 << 20, np.uint8), name="b")
        b.on_request = lambda peer, message: message
        peer = a.connect(b.address)
        peer.request(b"x")
        peer.put(kvlink.ranges(region, peer.regions["b"], [(0, 0, 1 << 20)] * 64))
        print("end")
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", ""), done
    assert time.monotonic() - started < 15


def test_the_interpreter_ends_while_a_handler_hangs():
    started = time.monotonic()
    done = run_python(
        """
        import kvlink, threading
        a, b = kvlink.open("host"), kvlink.open("host")
        entered = threading.Event()
        def hang(peer, message):
            entered.set()
            threading.Event().wait()
        b.on_request = b.on_notify = hang
        peer = a.connect(b.address)
        threading.Thread(target=lambda: peer.request(b"x", timeout=60), daemon=True).start()
        peer.notify(b"x")
        entered.wait()
        print("end")
        """
    )
    assert done.returncode == 0 and done.stdout == "end\n", done
    assert time.monotonic() - started < 15


def test_after_fork_every_call_raises_and_the_parent_goes_on(pair):
    transfer = pair.peer_b.put(pair.ranges())
    assert transfer.wait(10)
    calls = {
        "connect": lambda: pair.a.connect(pair.b.address),
        "register": lambda: pair.a.register(np.zeros(8, np.uint8), name="x"),
        "allocate": lambda: pair.a.allocate(8, name="x"),
        "peers": pair.a.peers,
        "statistics": pair.a.statistics,
        "put": lambda: pair.peer_b.put(pair.ranges()),
        "get": lambda: pair.peer_b.get(pair.ranges()),
        "request": lambda: pair.peer_b.request(b"", timeout=1),
        "notify": lambda: pair.peer_b.notify(b""),
        "wait_region": lambda: pair.peer_b.wait_region("b", timeout=1),
        "peer close": pair.peer_b.close,
        "buffer": pair.region_a.buffer,
        "region close": pair.region_a.close,
        "done": transfer.done,
        "wait": lambda: transfer.wait(1),
        "result": transfer.result,
        "cancel": transfer.cancel,
    }
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - the child
        wrong = []
        try:
            for name, call in calls.items():
                try:
                    call()
                    wrong.append(name)
                except kvlink.ForkedError:
                    pass
                except BaseException as error:
                    wrong.append(f"{name}: {error!r}")
            pair.a.close()
            pair.b.close()
            os.write(write_end, ",".join(wrong).encode() or b"fine")
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    assert answer == b"fine"
    pair.b.on_request = lambda peer, message: message
    assert pair.peer_b.request(b"still here", timeout=10) == b"still here"
    assert pair.peer_b.put(pair.ranges()).wait(10)


def test_a_child_may_open_its_own_channel(pair):
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - the child
        try:
            channel = kvlink.open("host", secret=SECRET)
            peer = channel.connect(pair.b.address, timeout=10)
            os.write(write_end, peer.state.encode())
            channel.close()
        except BaseException as error:
            os.write(write_end, repr(error).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    assert answer == b"connected"


def test_idle_channels_use_no_cpu(pair):
    pair.b.on_request = lambda peer, message: message
    assert pair.peer_b.request(b"x", timeout=10) == b"x"
    before = time.process_time()
    threading.Event().wait(2.0)  # the condition is the passing of time itself
    assert time.process_time() - before < 0.02
