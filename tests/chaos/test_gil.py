"""A peer or a caller whose Python threads stand still for ten seconds delays no transfer and loses no connection."""

import threading
import time

import numpy as np
import pytest

import kvlink

HOLD = 10.0
SIZE = 16 << 20
BLOCK = 64 << 10
PATHS = ["shm", "cma", "tcp"]


@pytest.mark.parametrize("path", PATHS)
def test_a_peer_that_holds_its_gil(open_channel, start_agent, path):
    agent = start_agent(options={"path": path}, nbytes=SIZE, allocate=path == "shm")
    channel = open_channel(options={"path": path}, peer_timeout=1.0)
    local = (
        channel.allocate(SIZE, name="ours") if path == "shm" else channel.register(np.ones(SIZE, np.uint8), name="ours")
    )
    peer = channel.connect(agent.address, timeout=20)
    ranges = kvlink.ranges(local, peer.regions["agent"], [(start, start, BLOCK) for start in range(0, SIZE, BLOCK)])
    began = time.monotonic()
    peer.notify(b"gil %f" % HOLD)
    # Requests and notifications have threads of their own at the peer: one may be answered before the GIL is taken.
    with pytest.raises(kvlink.RequestTimeout):
        while time.monotonic() < began + HOLD / 2:
            peer.request(b"is it held?", timeout=1.0)
    for number in range(3000):
        peer.notify(b"meanwhile %d" % number)
    answers = []
    asking = threading.Thread(target=lambda: answers.append(peer.request(bytes(1 << 20), timeout=60)))
    asking.start()
    slowest = 0.0
    while time.monotonic() < began + HOLD - 2.0:
        for op in (peer.put, peer.get):
            transfer = op(ranges)
            assert transfer.wait(5)
            slowest = max(slowest, transfer.result().duration_s)
    assert not answers, "the peer answered, so it did not hold its GIL"
    assert slowest < 2.0
    asking.join(60)
    assert answers == [bytes(1 << 20)]
    assert peer.state == "connected"
    assert agent.call("state") == {"peers": 1, "notified": 3001, "lost": []}


@pytest.mark.parametrize("path", PATHS)
def test_a_caller_that_holds_its_gil(open_channel, start_agent, path):
    channel = open_channel(options={"path": path}, peer_timeout=1.0)
    if path == "shm":
        channel.allocate(SIZE, name="ours")
    else:
        channel.register(np.ones(SIZE, np.uint8), name="ours")
    agent = start_agent(options={"path": path}, nbytes=SIZE, allocate=path == "shm", peer_timeout=1.0)
    agent.call("connect", address=channel.address)
    work = {"op": "get", "region": "ours", "count": 20, "block": BLOCK, "blocks": SIZE // BLOCK}
    told = agent.call("start_and_hold_gil", seconds=HOLD, **work)
    assert told["started"] == told["finished"] == 20
    assert told["slowest"] < HOLD / 2
    assert agent.call("state")["peers"] == 1 and len(channel.peers()) == 1
