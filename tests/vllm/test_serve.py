"""The prefiller's answers to a decoder that is early."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from kvlink_vllm import serve, wire
from kvlink_vllm.lease import LeaseTable
from kvlink_vllm.metadata import Hold
from kvlink_vllm.serve import Server


class Decoder:
    def __init__(self):
        self.told = []

    def notify(self, message):
        self.told.append(wire.decode_notice(message))


def test_a_decoder_that_asks_while_the_hand_off_arrives_is_told():
    """Between its look into the table and its place among those who wait, the hand-off comes."""
    table = LeaseTable(np.zeros(4, dtype=np.uint64), lease=30.0, contact=10.0)
    server = Server(table, None, "leases", handoff_wait=10.0, verify=False, defer=lambda function: function())
    arrival = threading.Thread(target=server.hold, args=(Hold("a", "r", [1], 4, b"d"),))
    get = table.get

    def look(handoff):
        found = get(handoff)
        arrival.start()
        arrival.join(0.3)
        return found

    table.get = look
    decoder = Decoder()
    reply = wire.claim_reply.decode(server.on_request(decoder, wire.encode(wire.Claim("a", b"d", 3))))
    arrival.join(5)
    assert reply.status == wire.PENDING
    assert decoder.told == [wire.Ready("a")]


def test_no_more_waiters_are_remembered_than_agreed_even_for_one_hand_off(monkeypatch):
    monkeypatch.setattr(serve, "_MAX_WAITERS", 3)
    table = LeaseTable(np.zeros(4, dtype=np.uint64), lease=30.0, contact=10.0)
    server = Server(table, None, "leases", handoff_wait=10.0, verify=False, defer=lambda function: function())
    decoder = Decoder()
    for _ in range(9):
        server.on_request(decoder, wire.encode(wire.Claim("a", b"d", 3)))
    server.hold(Hold("a", "r", [1], 4, b"d"))
    assert decoder.told == [wire.Ready("a")] * 3


@pytest.mark.parametrize(("digest", "tokens", "reason"), [(b"x", 3, "another prompt"), (b"d", 5, "has 4")])
def test_a_claim_for_another_prompt_leaves_the_lease_to_the_right_decoder(digest, tokens, reason):
    now = [100.0]
    table = LeaseTable(np.zeros(4, dtype=np.uint64), lease=30.0, contact=10.0, clock=lambda: now[0])
    server = Server(table, None, "leases", handoff_wait=10.0, verify=False, defer=lambda function: function())
    server.hold(Hold("a", "r", [1], 4, b"d"))
    wrong, right = Decoder(), Decoder()
    server.on_notify(wrong, wire.Renew(["a"]))  # it cannot know yet
    reply = wire.claim_reply.decode(server.on_request(wrong, wire.encode(wire.Claim("a", digest, tokens))))
    assert reply.status == wire.MISMATCH
    assert reason in reply.reason
    server.on_notify(wrong, wire.Done(["a"]))
    assert table.get("a").deadline == 110.0
    reply = wire.claim_reply.decode(server.on_request(right, wire.encode(wire.Claim("a", b"d", 3))))
    assert reply.status == wire.OK
    assert table.get("a").deadline == 130.0
