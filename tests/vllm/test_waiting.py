"""Pulls that wait hold no thread: for a hand-off, for a thread, for a connect; each ends at its time or at once."""

from __future__ import annotations

import queue
import socket
import threading
import time
from types import SimpleNamespace

import pytest
from tests.vllm.harness import Request, decode, run_all, settle, warned

from kvlink_vllm.pull import NotYet, Pull, Puller
from kvlink_vllm.waiting import Waiting

TOKENS = list(range(20))


def pulls_of(engine):
    return engine.workers[0]._runner._pulls


def early(p, d):
    """Sends a decoder to a hand-off that the prefiller's worker is not told of before its next step."""
    p.add(Request("p1", TOKENS, {"do_remote_decode": True, "do_remote_prefill": False}))
    p.run(until=lambda: "p1" in p.answers)
    return decode(d, "d1", TOKENS, p.answers["p1"])


def waits(engine, phase, count=1):
    def count_them():
        waiting = pulls_of(engine)._waiting
        with waiting._changed:
            return [entry.phase for _, entry in waiting._entries.values()].count(phase) >= count

    return count_them


@pytest.fixture
def busy():
    """Keeps the one thread for pulls of an engine busy until the test's end."""
    gate = threading.Event()

    def keep(engine):
        started = threading.Event()
        pulls_of(engine)._executor.submit(lambda: (started.set(), gate.wait(30)))
        assert started.wait(10)
        return gate

    yield keep
    gate.set()


# ---- engines


def test_guessed_hand_offs_do_not_stall_the_pulls_of_others(engines, caplog):
    p = engines("kv_producer")
    d = engines("kv_consumer", blocks=128, **{"kvlink.pulls": 1, "kvlink.handoff_wait": 20.0})
    p.add(Request("p1", TOKENS, {"do_remote_decode": True, "do_remote_prefill": False}))
    p.run(until=lambda: "p1" in p.answers)
    answer = p.answers["p1"]
    p.step()
    stuck = [decode(d, f"s{n}", TOKENS, dict(answer, kvlink_handoff=f"{n:032x}")) for n in range(8)]
    d.run(until=waits(d, "claim", 8))
    begin = time.monotonic()
    good = decode(d, "d1", TOKENS, answer)
    run_all(p, d, until=lambda: good.first_token is not None)
    assert good.computed_here == 1
    assert time.monotonic() - begin < 5
    assert waits(d, "claim", 8)()
    begin = time.monotonic()
    for request in stuck:
        d.abort(request.request_id)
    settle(p, d)
    assert time.monotonic() - begin < 5


def test_a_hand_off_that_comes_later_is_pulled(engines):
    p, d = engines("kv_producer"), engines("kv_consumer", **{"kvlink.pulls": 1, "kvlink.handoff_wait": 20.0})
    request = early(p, d)
    d.run(until=waits(d, "claim"))
    settle(p, d)
    assert request.computed_here == 1
    assert d.stats["pulls"] == 1


def test_a_hand_off_that_comes_just_before_the_pull_is_parked_is_pulled(engines, monkeypatch):
    p, d = engines("kv_producer"), engines("kv_consumer", **{"kvlink.handoff_wait": 20.0})
    run, refused = Puller.run, []

    def step_between(self, pull, link):
        try:
            run(self, pull, link)
        except NotYet:
            refused.append(pull)
            p.step()  # the worker is told, and tells the decoder
            deadline = time.monotonic() + 10
            while not pull.ready:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            raise

    monkeypatch.setattr(Puller, "run", step_between)
    request = early(p, d)
    d.run()
    settle(p, d)
    assert request.computed_here == 1
    assert len(refused) == 1


def test_an_unknown_hand_off_is_waited_for_as_long_as_agreed(engines, caplog):
    p, d = engines("kv_producer"), engines("kv_consumer", **{"kvlink.handoff_wait": 0.7})
    p.add(Request("p1", TOKENS, {"do_remote_decode": True, "do_remote_prefill": False}))
    p.run(until=lambda: "p1" in p.answers)
    request = decode(d, "d1", TOKENS, dict(p.answers["p1"], kvlink_handoff="4" * 32))
    d.run(until=waits(d, "claim"))
    pull = next(iter(pulls_of(d)._active.values()))
    d.run()
    waited = pull.begin + pull.record["total_seconds"] - pull.claimed_at
    assert 0.7 <= waited < 1.7
    assert request.computed_here == 20
    assert warned(caplog, "phase claim")


def test_the_pull_timeout_counts_while_the_hand_off_is_waited_for(engines):
    p = engines("kv_producer")
    d = engines("kv_consumer", **{"kvlink.handoff_wait": 20.0, "kvlink.pull_timeout": 0.7})
    p.add(Request("p1", TOKENS, {"do_remote_decode": True, "do_remote_prefill": False}))
    p.run(until=lambda: "p1" in p.answers)
    begin = time.monotonic()
    request = decode(d, "d1", TOKENS, dict(p.answers["p1"], kvlink_handoff="4" * 32))
    d.run()
    assert 0.7 <= time.monotonic() - begin < 5
    assert request.computed_here == 20
    assert d.stats["claim"] == 1


def test_a_pull_that_queues_for_a_thread_is_given_up_at_its_deadline(engines, busy, caplog):
    p = engines("kv_producer")
    d = engines("kv_consumer", **{"kvlink.pulls": 1, "kvlink.pull_timeout": 0.7})
    gate = busy(d)
    begin = time.monotonic()
    request = early(p, d)
    p.step()
    d.run()
    assert 0.7 <= time.monotonic() - begin < 5
    assert request.computed_here == 20
    assert d.stats["queued"] == 1
    assert warned(caplog, "phase queued")
    gate.set()
    settle(p, d)


def test_an_aborted_pull_does_not_wait_for_a_thread(engines, busy):
    p, d = engines("kv_producer"), engines("kv_consumer", **{"kvlink.pulls": 1})
    gate = busy(d)
    early(p, d)
    d.run(until=waits(d, "queued"))
    d.abort("d1")
    begin = time.monotonic()
    d.run()
    assert time.monotonic() - begin < 3
    assert d.stats["cancelled"] == 1
    gate.set()
    settle(p, d)


def test_the_pull_timeout_counts_while_the_connect_runs(engines, caplog):
    d = engines("kv_consumer", **{"kvlink.pull_timeout": 0.7, "kvlink.connect_timeout": 10.0})
    p = engines("kv_producer")
    p.add(Request("p1", TOKENS, {"do_remote_decode": True, "do_remote_prefill": False}))
    p.run(until=lambda: "p1" in p.answers)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        begin = time.monotonic()
        request = decode(d, "d1", TOKENS, dict(p.answers["p1"], kvlink_addresses=[address]))
        d.run()
        assert 0.7 <= time.monotonic() - begin < 5
    assert request.computed_here == 20
    assert warned(caplog, "phase connect")


# ---- the class alone


@pytest.fixture
def waiting():
    ends = queue.Queue()
    made = Waiting(lambda pull, error: ends.put((pull, error.phase, str(error))))
    made.ends = ends
    yield made
    made.close()


def a_pull(**changes):
    return Pull(SimpleNamespace(request_id="r"), "tcp://x:1", time.monotonic(), float("inf"), **changes)


def test_a_cancel_before_it_waits_is_not_slept_through(waiting):
    waiting.add(a_pull(), "claim", time.monotonic() + 60, "late")  # the thread sleeps for it
    pull = a_pull()
    pull.cancel()
    waiting.look()
    waiting.add(pull, "claim", time.monotonic() + 60, "late")
    assert waiting.ends.get(timeout=5)[:2] == (pull, "cancelled")


def test_an_earlier_deadline_wakes_the_thread(waiting):
    waiting.add(a_pull(), "claim", time.monotonic() + 60, "late")
    pull, begin = a_pull(), time.monotonic()
    waiting.add(pull, "queued", begin + 0.3, "too late")
    assert waiting.ends.get(timeout=5) == (pull, "queued", "too late")
    assert 0.3 <= time.monotonic() - begin < 3


def test_a_pull_goes_on_or_ends_but_never_both(waiting):
    taken = []
    pulls = [a_pull() for _ in range(300)]
    for pull in pulls:
        waiting.add(pull, "claim", time.monotonic() + 0.02, "late")

    def take():
        taken.extend(pull for pull in pulls if waiting.take(pull, "claim"))

    threads = [threading.Thread(target=take) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    ended = [waiting.ends.get(timeout=5)[0] for _ in range(len(pulls) - len(taken))]
    assert {id(pull) for pull in (*taken, *ended)} == {id(pull) for pull in pulls}
    assert waiting.ends.empty()


def test_it_is_taken_only_for_what_it_waits_for(waiting):
    pull = a_pull()
    waiting.add(pull, "connect", time.monotonic() + 60, "late")
    assert not waiting.take(pull, "claim")
    assert waiting.take(pull, "connect")
    assert not waiting.take(pull, "connect")


def test_close_ends_what_waits_and_what_comes_later(waiting):
    first, second = a_pull(), a_pull()
    waiting.add(first, "claim", time.monotonic() + 60, "late")
    waiting.close()
    assert waiting.ends.get(timeout=5)[:2] == (first, "cancelled")
    waiting.add(second, "claim", time.monotonic() + 60, "late")
    assert waiting.ends.get(timeout=5)[:2] == (second, "cancelled")


def test_an_error_at_the_end_of_one_does_not_keep_the_others(caplog):
    ended = queue.Queue()

    def over(pull, error):
        ended.put(pull)
        raise RuntimeError("odd")

    waiting = Waiting(over)
    for _ in range(2):
        pull = a_pull()
        waiting.add(pull, "claim", time.monotonic(), "late")
        assert ended.get(timeout=5) is pull
    waiting.close()
