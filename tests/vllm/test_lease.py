"""Leases: held until done or expired, and the generation word moves before anything is freed."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from kvlink_vllm.lease import LeaseTable


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def words():
    return np.zeros(4, dtype=np.uint64)


@pytest.fixture
def table(words, clock):
    return LeaseTable(words, lease=30.0, contact=5.0, clock=clock)


def add(table, name="h1"):
    return table.add(name, f"request-{name}", [3, 4, 9], 300, b"digest")


def ended(table):
    return [(item.request_id, item.expired) for item in table.collect()]


def test_done_by_the_last_reader_ends_it(table, words):
    add(table)
    lease = table.claim("h1", "a")
    table.claim("h1", "b")
    assert lease.blocks.tolist() == [3, 4, 9]
    before = int(words[lease.slot])
    assert before == lease.generation
    table.done(["h1"], "a")
    assert ended(table) == []
    table.done(["h1"], "b")
    assert int(words[lease.slot]) == before + 1
    assert ended(table) == [("request-h1", False)]
    assert ended(table) == []
    assert len(table) == 0


def test_it_expires_without_contact_and_later_with_it(table, clock, words):
    add(table)
    add(table, "h2")
    lease = table.claim("h2", "a")
    clock.now += 5.0
    assert ended(table) == [("request-h1", True)]
    clock.now += 24.9
    assert ended(table) == []
    table.renew(["h2", "unknown"], "a")
    clock.now += 29.9
    assert ended(table) == []
    clock.now += 0.1
    assert ended(table) == [("request-h2", True)]
    assert int(words[lease.slot]) == lease.generation + 1


def test_a_claim_after_expiry_finds_nothing_even_before_collect(table, clock):
    add(table)
    clock.now += 5.0
    assert table.claim("h1", "a") is None
    assert ended(table) == [("request-h1", True)]


def test_a_lost_reader_leaves_the_contact_time(table, clock):
    add(table)
    table.claim("h1", "a")
    table.lost("b")
    clock.now += 6.0
    assert ended(table) == []
    table.lost("a")
    clock.now += 4.9
    assert ended(table) == []
    clock.now += 0.1
    assert ended(table) == [("request-h1", True)]


def test_a_lost_reader_does_not_shorten_the_others_lease(table, clock):
    add(table)
    table.claim("h1", "a")
    table.claim("h1", "b")
    table.lost("a")
    clock.now += 29.0
    assert ended(table) == []


def test_no_slot_left_reports_the_request_at_once(table):
    for number in range(4):
        assert add(table, f"h{number}")
    assert not add(table, "h9")
    assert ended(table) == [("request-h9", True)]
    assert table.claim("h9", "a") is None


def test_slots_are_reused_with_another_generation(table):
    seen = set()
    for number in range(20):
        add(table, f"h{number}")
        lease = table.claim(f"h{number}", "a")
        seen.add((lease.slot, lease.generation))
        table.done([f"h{number}"], "a")
    assert len(seen) == 20


def test_close_ends_all_and_refuses_more(table, words):
    add(table)
    lease = table.claim("h1", "a")
    table.close()
    assert int(words[lease.slot]) != lease.generation
    assert not add(table, "h2")
    assert sorted(ended(table)) == [("request-h1", True), ("request-h2", True)]


def test_done_by_a_peer_without_a_hold_ends_nothing(table, clock):
    add(table)
    table.done(["h1"], "a")
    assert ended(table) == []
    table.claim("h1", "b")
    table.done(["h1"], "a")
    assert ended(table) == []
    table.done(["h1"], "b")
    assert ended(table) == [("request-h1", False)]


def test_done_after_a_renewal_ends_it(table):
    add(table)
    table.renew(["h1"], "a")
    table.done(["h1"], "a")
    assert ended(table) == [("request-h1", False)]


def test_a_claim_that_does_not_fit_extends_nothing_and_holds_nothing(table, clock):
    add(table)
    clock.now += 4.0
    lease = table.claim("h1", "a", lambda lease: False)
    assert lease is not None
    assert not lease.readers
    table.renew(["h1"], "a")  # of the request that was refused
    table.done(["h1"], "a")
    assert ended(table) == []
    clock.now += 0.9
    assert ended(table) == []
    clock.now += 0.1
    assert ended(table) == [("request-h1", True)]


def test_a_claim_that_does_not_fit_takes_back_what_a_renewal_gave(table, clock):
    add(table)
    table.renew(["h1"], "a")
    table.claim("h1", "a", lambda lease: False)
    table.done(["h1"], "a")
    assert ended(table) == []
    clock.now += 5.0
    assert ended(table) == [("request-h1", True)]


def test_a_claim_that_does_not_fit_leaves_the_others_hold(table, clock):
    add(table)
    table.claim("h1", "b")
    table.claim("h1", "a", lambda lease: False)
    clock.now += 29.0
    assert ended(table) == []
    assert table.claim("h1", "a") is not None  # another request of the same peer, which fits
    table.done(["h1"], "b")
    assert ended(table) == []
    table.done(["h1"], "a")
    assert ended(table) == [("request-h1", False)]


def test_threads_end_each_lease_once():
    words = np.zeros(256, dtype=np.uint64)
    table = LeaseTable(words, lease=30.0, contact=5.0)
    reported = []

    def read(name):
        for number in range(200):
            if table.claim(f"h{number}", name) is not None:
                table.done([f"h{number}"], name)

    threads = [threading.Thread(target=read, args=(f"t{n}",)) for n in range(4)]
    for number in range(200):
        add(table, f"h{number}")
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    table.close()
    reported = [item.request_id for item in table.collect()]
    assert sorted(reported) == sorted(f"request-h{n}" for n in range(200))
    assert table.snapshot() == {"leases": 0, "blocks": 0}
