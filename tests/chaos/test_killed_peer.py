"""SIGKILL and SIGSTOP of a peer process on this host."""

import asyncio
import gc
import os
import signal
import threading
import time
import weakref

import numpy as np
import pytest

import kvlink

from .conftest import eventually

PATHS = ["shm", "cma", "tcp"]
SIZE = 64 << 20
BLOCK = 64 << 10


def outcome(transfer, timeout):
    try:
        return "ok" if transfer.wait(timeout) else "running"
    except kvlink.KvlinkError as error:
        return type(error).__name__


def register(channel, path):
    """A region that the path can reach."""
    if path == "shm":
        return channel.allocate(SIZE, name="ours")
    return channel.register(np.ones(SIZE, np.uint8), name="ours")


def blocks(local, remote):
    ranges = kvlink.ranges(local, remote, [(start, start, BLOCK) for start in range(0, SIZE, BLOCK)])
    return np.ascontiguousarray(ranges[::-1])


@pytest.mark.parametrize("op", ["put", "get"])
@pytest.mark.parametrize("path", PATHS)
def test_every_transfer_ends_soon_after_the_peer_was_killed(open_channel, start_agent, path, op):
    agent = start_agent(options={"path": path}, nbytes=SIZE, allocate=path == "shm")
    bystander = start_agent()
    channel = open_channel(options={"path": path})
    local = register(channel, path)
    peer = channel.connect(agent.address, timeout=20)
    other = channel.connect(bystander.address, timeout=20)
    lost = []
    channel.on_peer_lost = lambda who, error: lost.append((who, error))
    transfers = [getattr(peer, op)(blocks(local, peer.regions["agent"])) for _ in range(20)]
    awaited = []

    async def wait(transfer):
        try:
            await transfer
            awaited.append("ok")
        except kvlink.KvlinkError as error:
            awaited.append(type(error).__name__)

    thread = threading.Thread(target=lambda: asyncio.run(wait(transfers[-1])))
    thread.start()
    outcome(transfers[0], 20)  # some work is done and more is under way
    agent.kill()
    killed = time.monotonic()
    outcomes = [outcome(transfer, 5) for transfer in transfers]
    thread.join(5)
    assert time.monotonic() - killed < 2
    assert set(outcomes) <= {"ok", "PeerLost"} and len(awaited) == 1
    if path != "shm":  # there the dead peer's memory is still mapped here
        assert outcomes[-1] == "PeerLost"
    eventually(lambda: lost, 2)
    assert lost[0][0] is peer and peer.state == "lost" and isinstance(lost[0][1], kvlink.PeerLost)
    with pytest.raises(kvlink.PeerLost):
        peer.put(blocks(local, other.regions.get("agent", 0)))
    assert other.request(b"still here", timeout=10) == b"still here"


def test_a_request_and_a_wait_end_when_the_peer_is_killed(open_channel, start_agent):
    agent = start_agent()
    channel = open_channel()
    peer = channel.connect(agent.address, timeout=20)
    agent.stop()
    ended = []

    def expect(call):
        try:
            call()
        except kvlink.PeerLost:
            ended.append(time.monotonic())

    calls = [lambda: peer.request(b"x", timeout=30), lambda: peer.wait_region("never", timeout=30)]
    threads = [threading.Thread(target=expect, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    agent.kill()
    killed = time.monotonic()
    for thread in threads:
        thread.join(5)
    assert len(ended) == 2 and max(ended) - killed < 2


@pytest.mark.parametrize("path", PATHS)
def test_a_killed_initiator_frees_our_side(open_channel, start_agent, path):
    channel = open_channel(options={"path": path})
    local = register(channel, path)
    agent = start_agent(options={"path": path}, nbytes=SIZE, allocate=path == "shm")
    agent.call("connect", address=channel.address)
    agent.call("start", op="get", region="ours", count=20, block=BLOCK, blocks=SIZE // BLOCK)
    peer = eventually(lambda: next(iter(channel.peers().values()), None))
    transfers = [peer.put(blocks(local, peer.wait_region("agent"))) for _ in range(10)]
    agent.kill()
    killed = time.monotonic()
    assert {outcome(transfer, 5) for transfer in transfers} <= {"ok", "PeerLost"}
    eventually(lambda: not channel.peers(), 2)
    assert time.monotonic() - killed < 2
    local.close(timeout=5)


def test_a_peer_restarted_at_the_same_address_is_new(open_channel, start_agent):
    agent = start_agent()
    channel = open_channel()
    local = channel.register(np.zeros(1 << 20, np.uint8), name="ours")
    peer = channel.connect(agent.address, timeout=20)
    stale = kvlink.ranges(local, peer.regions["agent"], [(0, 0, 4096)])
    agent.kill()
    again = start_agent(listen=agent.address)
    assert again.address == agent.address
    eventually(lambda: peer.state == "lost", 2)
    new = channel.connect(again.address, timeout=20)
    assert new.id != peer.id
    for one in (peer, new):
        with pytest.raises(kvlink.KvlinkError):
            one.put(stale).wait(5)
    fresh = kvlink.ranges(local, new.regions["agent"], [(0, 0, 4096)])
    assert new.get(fresh).wait(10)
    assert (np.frombuffer(local.buffer(), np.uint8)[:4096] == 1).all(), "not a byte was written by the stale ranges"


def test_memory_is_kept_while_a_stopped_peer_may_still_write_into_it(open_channel, start_agent):
    class Array(np.ndarray):
        pass

    memory = np.zeros(8 << 20, np.uint8).view(Array)
    reference = weakref.ref(memory)
    channel = open_channel(options={"path": "cma"})
    region = channel.register(memory, name="ours")
    agent = start_agent(options={"path": "cma"}, nbytes=8 << 20)
    agent.call("connect", address=channel.address)
    agent.call("fill", region="ours")
    last = region.buffer()[-1:]
    eventually(lambda: last[0] == 1)
    last.release()
    agent.stop()
    del memory
    started = time.monotonic()
    with pytest.raises(kvlink.TransferTimeout, match="may still write"):
        region.close(timeout=0.5)
    assert time.monotonic() - started < 5
    gc.collect()
    assert reference() is not None and channel.statistics().held_bytes == 8 << 20
    assert not channel.regions and not channel.peers()
    with pytest.raises(kvlink.TransferTimeout):
        region.close(timeout=0.1)
    agent.resume()
    region.close(timeout=10)
    eventually(lambda: gc.collect() >= 0 and reference() is None)
    assert channel.statistics().held_bytes == 0
    assert agent.call("state")["peers"] == 0


def test_memory_is_given_back_when_the_stopped_peer_is_killed(open_channel, start_agent):
    channel = open_channel()
    region = channel.register(np.zeros(1 << 20, np.uint8), name="ours")
    agent = start_agent()
    agent.call("connect", address=channel.address)
    agent.stop()
    with pytest.raises(kvlink.TransferTimeout):
        region.close(timeout=0.3)
    agent.kill()
    eventually(lambda: channel.statistics().held_bytes == 0, 2)


def test_closing_a_channel_with_a_stopped_peer_takes_no_longer_than_its_grace(open_channel, start_agent):
    channel = open_channel()
    channel.register(np.zeros(1 << 20, np.uint8), name="ours")
    agent = start_agent()
    peer = channel.connect(agent.address, timeout=20)
    agent.stop()
    peer.notify(b"x")
    started = time.monotonic()
    channel.close(grace=0.5)
    assert time.monotonic() - started < 4


def test_a_stopped_peer_is_not_a_lost_peer(open_channel, start_agent):
    channel = open_channel(peer_timeout=0.5)
    agent = start_agent()
    peer = channel.connect(agent.address, timeout=20)
    agent.stop()
    for _ in range(2000):  # more than fits into the kernel's buffers without flow control
        peer.notify(bytes(1000))
    with pytest.raises(kvlink.RequestTimeout):
        peer.request(bytes(1 << 20), timeout=3)
    assert peer.state == "connected"
    agent.resume()
    assert peer.request(b"x", timeout=20) == b"x"
    eventually(lambda: agent.call("state")["notified"] == 2000)


def test_a_forked_child_does_not_hide_its_parents_death(open_channel, start_agent):
    agent = start_agent()
    channel = open_channel()
    peer = channel.connect(agent.address, timeout=20)
    child = agent.call("fork")
    try:
        assert peer.request(b"x", timeout=10) == b"x"
        agent.kill()
        eventually(lambda: peer.state == "lost", 2)
    finally:
        os.kill(child, signal.SIGKILL)
