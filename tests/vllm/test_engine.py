"""Scheduler and worker halves against a fake engine, with real channels in one process."""

from __future__ import annotations

import json
import socket
import time

import pytest
from tests.vllm.harness import BLOCK, Request, decode, prefill, settle, warned

LENGTHS = [2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1, 37]


@pytest.mark.parametrize("path", ["auto", "cma", "tcp"])
@pytest.mark.parametrize("length", LENGTHS)
def test_only_the_last_token_is_computed(engines, length, path):
    p = engines("kv_producer", **{"kvlink.path": path})
    d = engines("kv_consumer", blocks=48, **{"kvlink.path": path})
    tokens = list(range(7, 7 + length))
    answer = prefill(p, "p1", tokens)
    assert answer["do_remote_prefill"] is True
    assert "block" not in json.dumps(answer)
    request = decode(d, "d1", tokens, answer)
    settle(p, d)
    assert request.computed_here == 1
    assert request.first_token == sum(tokens) % 1000
    assert d.stats["pulls"] == 1
    assert d.stats["tokens"] == length - 1
    assert d.stats["blocks"] == -(-(length - 1) // BLOCK)
    assert d.stats["bytes"] == d.stats["blocks"] * 2 * 2 * BLOCK * 16 * 4


def test_a_prompt_of_one_token_is_computed_and_the_hand_off_let_go(engines):
    p, d = engines("kv_producer"), engines("kv_consumer")
    request = decode(d, "d1", [9], prefill(p, "p1", [9]))
    settle(p, d)
    assert request.computed_here == 1
    assert d.stats.get("pulls", 0) == 0


def test_plain_requests_are_served_by_both(engines):
    p, d = engines("kv_producer"), engines("kv_consumer")
    for engine in (p, d):
        engine.add(Request("plain", [1, 2, 3, 4, 5]))
        engine.add(Request("empty", [1, 2, 3], {}))
        engine.add(Request("other", [1, 2, 3], {"do_remote_prefill": False, "ret_first_tok": True}))
    settle(p, d)
    assert p.answers == d.answers == {"plain": None, "empty": None, "other": None}


def test_only_missing_blocks_are_pulled(engines):
    p, d = engines("kv_producer"), engines("kv_consumer", blocks=48)
    tokens = list(range(50, 50 + 5 * BLOCK + 2))
    d.remember_prefix(tokens[: 3 * BLOCK])
    request = decode(d, "d1", tokens, prefill(p, "p1", tokens))
    settle(p, d)
    assert request.computed_here == 1
    assert d.stats["blocks"] == 3
    assert d.stats["local_tokens"] == 3 * BLOCK
    assert d.stats["tokens"] == 2 * BLOCK + 1


def test_a_full_local_hit_lets_the_hand_off_go(engines):
    p, d = engines("kv_producer"), engines("kv_consumer", blocks=48)
    tokens = list(range(50, 50 + 3 * BLOCK + 1))
    d.remember_prefix(tokens[: 3 * BLOCK])
    request = decode(d, "d1", tokens, prefill(p, "p1", tokens))
    settle(p, d)
    assert request.computed_here == 1
    assert d.stats.get("pulls", 0) == 0


def test_many_at_once(engines):
    p = engines("kv_producer", blocks=200)
    d = engines("kv_consumer", blocks=60)
    requests = []
    for number in range(20):
        tokens = [number * 100 + i for i in range(3 + number)]
        requests.append(decode(d, f"d{number}", tokens, prefill(p, f"p{number}", tokens)))
    settle(p, d)
    assert all(request.computed_here == 1 for request in requests)
    assert d.stats["pulls"] == 20


@pytest.mark.parametrize("reverse", [(False, True), (True, False), (True, True)])
def test_blocks_in_any_order_find_their_places_and_join_where_they_can(engines, tmp_path, reverse):
    """vLLM hands freed blocks out again in falling order."""
    p = engines("kv_producer")
    d = engines("kv_consumer", blocks=40, **{"kvlink.trace_file": str(tmp_path / "trace")})
    for engine, falling in zip((p, d), reverse, strict=True):
        if falling:
            engine.free.reverse()
    tokens = list(range(5 * BLOCK))
    request = decode(d, "d1", tokens, prefill(p, "p1", tokens))
    settle(p, d)
    assert request.computed_here == 1
    planes = 2
    assert json.loads((tmp_path / "trace").read_text())["ranges"] == (planes if all(reverse) else planes * 5)


def test_tensor_parallel_pairs_ranks(engines):
    p, d = engines("kv_producer", ranks=2), engines("kv_consumer", ranks=2, blocks=40)
    tokens = list(range(30))
    answer = prefill(p, "p1", tokens)
    assert len(answer["kvlink_addresses"]) == answer["tp_size"] == 2
    request = decode(d, "d1", tokens, answer)
    settle(p, d)
    assert request.computed_here == 1
    assert d.stats["pulls"] == 2


def test_one_rank_that_fails_makes_the_request_recompute_on_all(engines, caplog):
    p = engines("kv_producer", ranks=2, **{"kvlink.contact": 0.5})
    d = engines("kv_consumer", ranks=2, blocks=40)
    tokens = list(range(30))
    answer = prefill(p, "p1", tokens)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        answer = {
            **answer,
            "kvlink_addresses": [answer["kvlink_addresses"][0], f"tcp://127.0.0.1:{closed.getsockname()[1]}"],
        }
        request = decode(d, "d1", tokens, answer)
        settle(p, d)
    assert request.computed_here == 30
    assert d.stats["pulls"] == 1
    assert warned(caplog, "phase connect")


def test_ranks_that_are_swapped_are_refused(engines, caplog):
    p, d = engines("kv_producer", ranks=2, **{"kvlink.contact": 0.5}), engines("kv_consumer", ranks=2)
    answer = prefill(p, "p1", list(range(30)))
    request = decode(d, "d1", list(range(30)), {**answer, "kvlink_addresses": answer["kvlink_addresses"][::-1]})
    settle(p, d)
    assert request.computed_here == 30
    assert warned(caplog, "'tp_rank'")


def test_both_roles_in_one_engine(engines):
    a, b = engines("kv_both"), engines("kv_both", blocks=40)
    there = decode(b, "d1", list(range(20)), prefill(a, "p1", list(range(20))))
    back = decode(a, "d2", list(range(40, 60)), prefill(b, "p2", list(range(40, 60))))
    settle(a, b)
    assert (there.computed_here, back.computed_here) == (1, 1)


def test_requests_of_one_parent_share_a_hand_off(engines):
    p, d = engines("kv_producer"), engines("kv_consumer", blocks=64)
    tokens = list(range(20))
    answer = prefill(p, "p1", tokens)
    requests = [decode(d, f"{n}_d1", tokens, answer) for n in range(4)]
    settle(p, d)
    assert [request.computed_here for request in requests] == [1, 1, 1, 1]


def test_a_decoder_that_asks_before_the_worker_knows_waits(engines):
    p, d = engines("kv_producer"), engines("kv_consumer")
    tokens = list(range(20))
    p.add(Request("p1", tokens, {"do_remote_decode": True}))
    p.run(until=lambda: "p1" in p.answers)  # the step that would tell the worker has not run
    request = decode(d, "d1", tokens, p.answers["p1"])
    for _ in range(100):
        d.step()
        time.sleep(0.002)
    assert d.stats.get("pulls", 0) == 0
    settle(p, d)
    assert request.computed_here == 1


def test_a_hand_off_is_served_during_the_forward_of_the_step_that_brings_it(engines):
    """That forward may be another request's prefill and take seconds; the decoder must not wait for it."""
    p, d = engines("kv_producer"), engines("kv_consumer")
    tokens = list(range(20))
    p.add(Request("p1", tokens, {"do_remote_decode": True}))
    p.run(until=lambda: "p1" in p.answers)
    request = decode(d, "d1", tokens, p.answers["p1"])
    p.during_forward = d.run  # the decoder runs to its end meanwhile
    p.step()
    p.during_forward = lambda: None
    assert request.computed_here == 1
    settle(p, d)


def test_a_pull_runs_beside_the_forward(engines):
    p, d = engines("kv_producer"), engines("kv_consumer")
    tokens = list(range(20))
    request = decode(d, "d1", tokens, prefill(p, "p1", tokens))

    def forward():
        deadline = time.monotonic() + 10
        while not d.workers[0]._runner._pulls._outcomes:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    d.during_forward = forward
    d.step()
    d.during_forward = lambda: None
    settle(p, d)
    assert request.computed_here == 1


def test_siblings_that_come_a_little_later_still_find_the_hand_off(engines):
    """n > 1: the requests of one parent reach the engine one after the other."""
    p, d = engines("kv_producer"), engines("kv_consumer", blocks=64)
    tokens = list(range(20))
    answer = prefill(p, "p1", tokens)
    requests = []
    for number in range(3):
        requests.append(decode(d, f"{number}_cmpl", tokens, answer))
        d.run()
    settle(p, d)
    assert [request.computed_here for request in requests] == [1, 1, 1]


def test_a_hand_off_that_is_over_is_told_at_once(engines, caplog):
    p, d = engines("kv_producer"), engines("kv_consumer")
    tokens = list(range(20))
    answer = prefill(p, "p1", tokens)
    decode(d, "d1", tokens, answer)
    settle(p, d)
    begin = time.monotonic()
    again = decode(d, "d2", tokens, answer)
    d.run()
    assert time.monotonic() - begin < 2
    assert again.computed_here == 20
    assert warned(caplog, "the hand-off has ended")
