"""A network namespace whose link is cut: a dead host, as far as TCP can tell. Needs root."""

import contextlib
import os
import secrets
import subprocess
import time

import pytest

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

PEER_TIMEOUT = 2.0
#: Keepalive needs one more interval to notice, then Python has to run.
SLACK = 1.8


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)


@pytest.fixture
def namespaces():
    """Two namespaces joined by a bridge in a third; yields their names and a function that cuts the cable.

    Neither end's interface goes down, so that nothing but silence tells them.
    """
    tag = secrets.token_hex(3)
    one, two, middle = (f"kvl-{tag}-{end}" for end in ("1", "2", "m"))
    try:
        for name in (one, two, middle):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", middle, "link", "add", "bridge", "type", "bridge")
        ip("-n", middle, "link", "set", "bridge", "up")
        for name, port, address in ((one, "port1", "10.231.7.1/24"), (two, "port2", "10.231.7.2/24")):
            ip("link", "add", "net", "netns", name, "type", "veth", "peer", "name", port, "netns", middle)
            ip("-n", middle, "link", "set", port, "master", "bridge")
            ip("-n", middle, "link", "set", port, "up")
            ip("-n", name, "addr", "add", address, "dev", "net")
            ip("-n", name, "link", "set", "net", "up")
        yield one, two, lambda: ip("-n", middle, "link", "set", "port2", "nomaster")
    finally:
        for name in (one, two, middle):
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)


def start_both(start_agent, one, two):
    common = {"options": {"path": "tcp"}, "nbytes": 64 << 20, "peer_timeout": PEER_TIMEOUT}
    first = start_agent(("ip", "netns", "exec", one), listen="tcp://10.231.7.1:0", **common)
    second = start_agent(("ip", "netns", "exec", two), listen="tcp://10.231.7.2:0", **common)
    first.call("connect", address=second.address)
    return first, second


def test_transfers_end_within_the_peer_timeout_when_the_link_is_cut(start_agent, namespaces):
    one, two, cut = namespaces
    first, second = start_both(start_agent, one, two)
    first.call("start", op="put", region="agent", count=40, block=64 << 10, blocks=1024)
    cut()
    began = time.monotonic()
    told = first.call("outcomes", limit=PEER_TIMEOUT + SLACK + 5)
    assert time.monotonic() - began < PEER_TIMEOUT + SLACK
    assert set(told["outcomes"]) <= {"ok", "PeerLost"} and told["outcomes"][-1] == "PeerLost"
    assert second.call("wait_lost", limit=PEER_TIMEOUT + SLACK)["seconds"] < PEER_TIMEOUT + SLACK
    assert first.call("state")["peers"] == second.call("state")["peers"] == 0
    assert first.call("close") < 5 and second.call("close") < 5


def test_an_idle_connection_is_noticed_too(start_agent, namespaces):
    one, two, cut = namespaces
    first, second = start_both(start_agent, one, two)
    cut()
    for agent in (first, second):
        agent.send("wait_lost", limit=PEER_TIMEOUT + SLACK + 5)
    for agent in (first, second):
        told = agent.answer()
        assert told is not None and told["seconds"] < PEER_TIMEOUT + SLACK
        assert "did not answer" in told["why"]
