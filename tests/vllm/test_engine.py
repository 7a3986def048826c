"""Scheduler and worker halves against a fake engine, with real channels in one process."""

from __future__ import annotations

import copy
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path

import pytest
from tests.vllm.harness import BLOCK, Request, prefill
from vllm.v1.request import RequestStatus

from kvlink_vllm import wire


def decode(engine, request_id, tokens, answer, **changes):
    request = Request(request_id, tokens, json.loads(json.dumps(answer)), **changes)
    engine.add(request)
    return request


def run_all(*engines, until=lambda: False):
    """Steps several engines side by side until none has work."""
    deadline = time.monotonic() + 30
    while any(engine.has_work() for engine in engines) and not until():
        assert time.monotonic() < deadline, [engine.requests for engine in engines]
        for engine in engines:
            engine.step()
        time.sleep(0.001)


def settle(prefiller, *decoders):
    """Lets everything end and checks that nothing is held any more."""
    run_all(prefiller, *decoders)
    for engine in (prefiller, *decoders):
        deadline = time.monotonic() + 10
        while any(engine.held().values()):
            assert time.monotonic() < deadline, engine.held()
            time.sleep(0.005)
        assert sorted(engine.free) == sorted(set(range(1, engine.blocks)) - set(engine.prefix.values()))
        assert engine.requests == {}


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


# ---- failures: the request is computed here, with a warning; the engine goes on


def warned(caplog, text):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and text in r.getMessage()]


def test_an_unknown_hand_off_is_recomputed(engines, caplog):
    p, d = engines("kv_producer"), engines("kv_consumer", **{"kvlink.handoff_wait": 0.2})
    tokens = list(range(20))
    answer = copy.deepcopy(prefill(p, "p1", tokens))
    answer["kvlink_handoff"] = "0" * 32
    request = decode(d, "d1", tokens, answer)
    d.run()
    assert request.computed_here == 20
    assert warned(caplog, "does not know this hand-off")
    assert d.stats["claim"] == 1
    assert d.stats["recomputed_tokens"] == 19


@pytest.mark.parametrize(
    "change",
    [
        {"kvlink_handoff": "../../etc/passwd"},
        {"kvlink_handoff": 12},
        {"kvlink_addresses": ["tcp://8.8.8.8:53"]},
        {"kvlink_addresses": None},
        {"kvlink_addresses": [["tcp://127.0.0.1:1"]]},
        {"kvlink_version": 2},
        {"remote_num_tokens": "many"},
        {"tp_size": 3},
        {"remote_engine_id": {"a": 1}},
    ],
)
def test_forged_parameters_cost_one_request_its_pull(engines, caplog, change):
    d = engines("kv_consumer")
    answer = {
        "do_remote_prefill": True,
        "kvlink_version": 1,
        "kvlink_handoff": "a" * 32,
        "kvlink_addresses": ["tcp://127.0.0.1:9"],
        "remote_engine_id": "e",
        "remote_num_tokens": 20,
        "tp_size": 1,
        **change,
    }
    request = decode(d, "d1", list(range(20)), answer)
    d.run()
    assert request.computed_here == 20
    assert warned(caplog, "kv_transfer_params are refused")


def test_parameters_of_another_connector_are_refused(engines, caplog):
    d = engines("kv_consumer")
    request = decode(
        d, "d1", [1, 2, 3], {"do_remote_prefill": True, "remote_block_ids": [[1]], "remote_host": "h", "remote_port": 1}
    )
    d.run()
    assert request.computed_here == 3
    assert warned(caplog, "not kvlink's")


def test_another_prompt_than_the_hand_offs_is_refused(engines, caplog):
    p, d = engines("kv_producer"), engines("kv_consumer")
    request = decode(d, "d1", list(range(1, 21)), prefill(p, "p1", list(range(20))))
    settle(p, d)
    assert request.computed_here == 20
    assert warned(caplog, "another prompt")


def test_a_longer_prompt_than_the_hand_offs_is_refused(engines):
    p, d = engines("kv_producer"), engines("kv_consumer")
    request = decode(d, "d1", list(range(25)), prefill(p, "p1", list(range(20))))
    settle(p, d)
    assert request.computed_here == 25


def test_nobody_listens(engines, caplog):
    p, d = engines("kv_producer"), engines("kv_consumer")
    answer = prefill(p, "p1", list(range(20)))
    p.close()
    begin = time.monotonic()
    request = decode(d, "d1", list(range(20)), answer)
    d.run()
    assert request.computed_here == 20
    assert time.monotonic() - begin < 5
    assert warned(caplog, "phase connect")


def test_the_prefiller_goes_away_between_two_pulls(engines):
    p, d = engines("kv_producer"), engines("kv_consumer")
    first = decode(d, "d1", list(range(20)), prefill(p, "p1", list(range(20))))
    settle(p, d)
    answer = prefill(p, "p2", list(range(30, 50)))
    p.close()
    second = decode(d, "d2", list(range(30, 50)), answer)
    d.run()
    assert (first.computed_here, second.computed_here) == (1, 20)
    q = engines("kv_producer")
    third = decode(d, "d3", list(range(60, 80)), prefill(q, "q1", list(range(60, 80))))
    settle(q, d)
    assert third.computed_here == 1


def test_on_load_failure_fail_leaves_the_request_to_vllm(engines):
    d = engines("kv_consumer", **{"kvlink.on_load_failure": "fail", "kvlink.handoff_wait": 0.1})
    p = engines("kv_producer")
    answer = dict(prefill(p, "p1", list(range(20))), kvlink_handoff="1" * 32)
    decode(d, "d1", list(range(20)), answer)
    d.run(until=lambda: d.errored)
    assert d.config.kv_transfer_config.kv_load_failure_policy == "fail"
    assert d.errored == ["d1"]


def test_recompute_is_the_default_policy(engines):
    assert engines("kv_consumer").config.kv_transfer_config.kv_load_failure_policy == "recompute"


def test_a_mismatch_is_refused_at_connect_by_key_and_values(engines, caplog):
    p = engines("kv_producer", **{"kvlink.model_id": "model-a"})
    d = engines("kv_consumer", **{"kvlink.model_id": "model-b"})
    request = decode(d, "d1", list(range(20)), prefill(p, "p1", list(range(20))))
    d.run()
    assert request.computed_here == 20
    messages = warned(caplog, "identity key 'model' differs")
    assert messages
    assert "model-a" in messages[0]
    assert "model-b" in messages[0]


def test_another_layout_is_refused_at_connect(engines, caplog):
    p, d = engines("kv_producer", layers=3), engines("kv_consumer")
    request = decode(d, "d1", list(range(20)), prefill(p, "p1", list(range(20))))
    d.run()
    assert request.computed_here == 20
    assert warned(caplog, "cache_lay")


def test_secrets_must_agree(engines, caplog):
    p = engines("kv_producer", **{"kvlink.secret": "one"})
    d = engines("kv_consumer", **{"kvlink.secret": "two"})
    e = engines("kv_consumer", **{"kvlink.secret": "one"})
    tokens = list(range(20))
    refused = decode(d, "d1", tokens, prefill(p, "p1", tokens))
    taken = decode(e, "e1", tokens, prefill(p, "p2", tokens))
    d.run()
    e.run()
    assert (refused.computed_here, taken.computed_here) == (20, 1)
    assert warned(caplog, "another secret")


def test_a_sealed_offer_from_a_liar_is_refused_at_connect(engines, caplog):
    """The seal fits but the process at the address does not know the secret."""
    p = engines("kv_producer")  # no secret
    d = engines("kv_consumer", **{"kvlink.secret": "one"})
    from kvlink_vllm.params import HandOff, offer

    plain = prefill(p, "p1", list(range(20)))
    sealed = offer(HandOff(plain["kvlink_handoff"], "e", tuple(plain["kvlink_addresses"]), 20), b"one")
    request = decode(d, "d1", list(range(20)), sealed)
    d.run()
    assert request.computed_here == 20
    assert warned(caplog, "phase connect")


# ---- leases


def test_a_lease_nobody_claims_ends_and_frees(engines, caplog):
    p, d = engines("kv_producer", **{"kvlink.contact": 0.2}), engines("kv_consumer", **{"kvlink.handoff_wait": 0.1})
    answer = prefill(p, "p1", list(range(20)))
    begin = time.monotonic()
    settle(p)
    assert 0.1 < time.monotonic() - begin < 5
    assert p.stats["leases_expired"] == 1
    request = decode(d, "d1", list(range(20)), answer)
    d.run()
    assert request.computed_here == 20


def test_a_queued_request_keeps_its_lease_alive(engines):
    p = engines("kv_producer", **{"kvlink.lease": 0.6, "kvlink.contact": 0.5})
    d = engines("kv_consumer", blocks=8)
    tokens = list(range(20))
    d.free, kept = d.free[:1], d.free[1:]  # too few blocks: the request queues
    request = decode(d, "d1", tokens, prefill(p, "p1", tokens))
    end = time.monotonic() + 2.5
    while time.monotonic() < end:
        p.step()
        d.step()
        time.sleep(0.002)
    assert request.status == RequestStatus.WAITING
    assert p.held()["leases"] == 1
    d.free += kept
    settle(p, d)
    assert request.computed_here == 1


def test_an_aborted_queued_request_releases_at_once(engines):
    p, d = engines("kv_producer"), engines("kv_consumer", blocks=8)
    d.free, kept = [], d.free
    tokens = list(range(20))
    decode(d, "d1", tokens, prefill(p, "p1", tokens))
    for _ in range(20):
        d.step()
    d.abort("d1")
    d.free = kept
    begin = time.monotonic()
    settle(p, d)
    assert time.monotonic() - begin < 3
    assert p.stats.get("leases_expired", 0) == 0


def test_a_request_aborted_before_its_first_step_releases(engines):
    p, d = engines("kv_producer"), engines("kv_consumer")
    decode(d, "d1", list(range(20)), prefill(p, "p1", list(range(20))))
    d.abort("d1")
    begin = time.monotonic()
    settle(p, d)
    assert time.monotonic() - begin < 3


@pytest.mark.parametrize("steps", range(6))
def test_abort_while_loading(engines, steps):
    p, d = engines("kv_producer"), engines("kv_consumer")
    decode(d, "d1", list(range(20)), prefill(p, "p1", list(range(20))))
    for _ in range(steps):
        d.step()
    d.abort("d1")
    settle(p, d)


def test_abort_while_the_prefiller_does_not_answer(engines):
    p, d = engines("kv_producer"), engines("kv_consumer", **{"kvlink.handoff_wait": 20.0})
    answer = dict(prefill(p, "p1", list(range(20))), kvlink_handoff="2" * 32)
    decode(d, "d1", list(range(20)), answer)
    for _ in range(50):
        d.step()
        time.sleep(0.002)
    begin = time.monotonic()
    d.abort("d1")
    d.run()
    assert time.monotonic() - begin < 2


def test_a_lease_that_ends_during_the_read_is_noticed(engines, caplog, monkeypatch):
    """The blocks are reused while they are read: the word has moved, so what came is thrown away."""
    from kvlink_vllm import pull as pull_module

    p, d = engines("kv_producer"), engines("kv_consumer")
    tokens = list(range(20))
    answer = prefill(p, "p1", tokens)
    original = pull_module.Puller._transfer

    def transfer(self, pull, link, ranges):
        p.workers[0]._runner._table.done([pull.read.handoff], None)
        table = p.workers[0]._runner._table
        with table._lock:
            for lease in list(table._leases.values()):
                table._end(lease, expired=True)
        for tensor in p.caches[0].values():
            tensor.fill_(123.0)
        original(self, pull, link, ranges)

    monkeypatch.setattr(pull_module.Puller, "_transfer", transfer)
    request = decode(d, "d1", tokens, answer)
    settle(p, d)
    assert request.computed_here == 20
    assert warned(caplog, "the lease ended before the blocks were read")
    assert d.stats["lease"] == 1


def test_a_lost_decoder_leaves_the_lease_to_run_out(engines):
    p = engines("kv_producer", **{"kvlink.contact": 0.3})
    d = engines("kv_consumer", blocks=8)
    d.free = []
    decode(d, "d1", list(range(20)), prefill(p, "p1", list(range(20))))
    end = time.monotonic() + 5
    while not any(lease.readers for lease in p.workers[0]._runner._table._leases.values()):
        assert time.monotonic() < end
        d.step()
        time.sleep(0.002)
    d.close()
    begin = time.monotonic()
    settle(p)
    assert time.monotonic() - begin < 5


def test_checksums_and_trace(engines, tmp_path):
    extra = {"kvlink.verify": True, "kvlink.trace_file": str(tmp_path / "trace.jsonl")}
    p, d = engines("kv_producer", **extra), engines("kv_consumer", **extra)
    tokens = list(range(21))
    decode(d, "d1", tokens, prefill(p, "p1", tokens))
    settle(p, d)
    lines = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert len(lines) == 1
    line = lines[0]
    assert line["outcome"] == "ok"
    assert line["source_checksum"] == line["destination_checksum"]
    assert (line["prompt_tokens"], line["pulled_tokens"], line["local_tokens"]) == (21, 20, 0)
    assert line["path"] in ("shm", "cma", "tcp")


def test_checksums_that_differ_are_an_error_and_recomputed(engines, caplog, monkeypatch):
    from kvlink_vllm import serve

    monkeypatch.setattr(serve, "checksum", lambda layout, blocks: "0" * 32)
    p, d = engines("kv_producer", **{"kvlink.verify": True}), engines("kv_consumer", **{"kvlink.verify": True})
    request = decode(d, "d1", list(range(20)), prefill(p, "p1", list(range(20))))
    settle(p, d)
    assert request.computed_here == 20
    assert warned(caplog, "checksums differ")


@pytest.mark.parametrize("message", [b"", b"\xc1", b"\x00" * 1000, b"{}", wire.encode(wire.Done(["x"]))])
def test_garbage_on_the_control_connection_hurts_nobody(engines, message):
    import kvlink
    from kvlink.errors import RequestError

    p, d = engines("kv_producer"), engines("kv_consumer")
    link = d.workers[0]._runner._pulls._links.get(p.workers[0].get_handshake_metadata().address).result(10)
    with pytest.raises(RequestError):
        link.peer.request(message, timeout=5)
    link.peer.notify(message)
    assert kvlink.RANGE.itemsize == 32
    request = decode(d, "d1", list(range(20)), prefill(p, "p1", list(range(20))))
    settle(p, d)
    assert request.computed_here == 1


def test_chaos_leaves_nothing_held(engines):
    """Two hundred requests: good, aborted at every state, forged, expired, and a prefiller that is killed."""
    import random

    dice = random.Random(7)
    quick = {"kvlink.contact": 0.3, "kvlink.lease": 1.0, "kvlink.handoff_wait": 0.1, "kvlink.retry_after": 0.05}
    p = engines("kv_producer", blocks=400, **quick)
    q = engines("kv_producer", blocks=400, **quick)
    d = engines("kv_consumer", blocks=120, **quick)
    requests = []
    for number in range(200):
        tokens = [dice.randrange(1000) for _ in range(dice.randrange(1, 40))]
        source = dice.choice((p, q)) if number < 120 else p
        if number == 120:
            q.close()
        answer = json.loads(json.dumps(prefill(source, f"p{number}", tokens)))
        fate = dice.choice(("good", "good", "abort", "forged", "wrong id", "expire", "plain"))
        if fate == "forged":
            answer["kvlink_addresses"] = [dice.choice(["tcp://127.0.0.1:1", "tcp://1.2.3.4:5", "x", 7])]
        elif fate == "wrong id":
            answer["kvlink_handoff"] = f"{dice.getrandbits(128):032x}"
        elif fate == "plain":
            answer = None
        request = Request(f"d{number}", tokens, answer)
        if fate == "expire":
            time.sleep(0.02)
            continue
        d.add(request)
        requests.append((request, fate))
        for _ in range(dice.randrange(4)):
            d.step()
            p.step()
        if fate == "abort":
            for _ in range(dice.randrange(5)):
                d.step()
            d.abort(request.request_id)
    settle(p, d)
    for request, fate in requests:
        assert request.first_token is not None or fate == "abort"
    assert d.stats["pulls"] > 40


# ---- manners


def test_a_silent_address_blocks_no_step_and_no_other_request(engines, caplog):
    """Something accepts the connection and never speaks: the connect runs in the background, with a deadline."""
    listener = socket.create_server(("127.0.0.1", 0))
    d = engines("kv_consumer", blocks=64, **{"kvlink.connect_timeout": 1.0})
    p = engines("kv_producer")
    tokens = list(range(20))
    silent = dict(prefill(p, "p1", tokens), kvlink_addresses=[f"tcp://127.0.0.1:{listener.getsockname()[1]}"])
    good = prefill(p, "p2", tokens)
    slowest = 0.0
    try:
        stuck, fine = decode(d, "d1", tokens, silent), decode(d, "d2", tokens, good)
        deadline = time.monotonic() + 20
        while stuck.first_token is None or fine.first_token is None:
            assert time.monotonic() < deadline
            begin = time.monotonic()
            d.step()
            slowest = max(slowest, time.monotonic() - begin)
            if fine.first_token is not None and stuck.first_token is None:
                assert stuck.status == RequestStatus.WAITING_FOR_REMOTE_KVS
            time.sleep(0.001)
        # At once, from the memory of the failed connect.
        begin = time.monotonic()
        again = decode(d, "d3", tokens, silent)
        d.run()
        assert time.monotonic() - begin < 0.8
    finally:
        listener.close()
    assert slowest < 0.8
    assert (stuck.computed_here, fine.computed_here, again.computed_here) == (20, 1, 20)
    assert len(warned(caplog, "phase connect")) == 2


def test_idle_uses_no_cpu(engines):
    p, d = engines("kv_producer"), engines("kv_consumer")
    decode(d, "d1", list(range(20)), prefill(p, "p1", list(range(20))))
    settle(p, d)
    begin = time.process_time()
    time.sleep(2.0)
    # Both engines of this process together, connected, with nothing to do.
    assert time.process_time() - begin < 0.02


def test_affinity_is_left_alone_unless_told_otherwise(engines):
    before = os.sched_getaffinity(0)
    core = max(before)
    p = engines("kv_producer")
    d = engines("kv_consumer", **{"kvlink.cpu_affinity": str(core)})
    decode(d, "d1", list(range(20)), prefill(p, "p1", list(range(20))))
    settle(p, d)
    assert os.sched_getaffinity(0) == before
    bound = [os.sched_getaffinity(t.native_id) for t in threading.enumerate() if t.name.startswith("kvlink-pull")]
    assert bound == [{core}]
    # The channel's own threads inherit it; the prefiller's keep what this process has.
    tasks = [os.sched_getaffinity(int(task.name)) for task in Path("/proc/self/task").iterdir()]
    assert sum(cores == {core} for cores in tasks) >= 3
    assert sum(cores == before for cores in tasks) >= 3


def test_listening_beyond_loopback_needs_a_secret(engines):
    from kvlink.errors import KvlinkError

    with pytest.raises(KvlinkError, match="secret"):
        engines("kv_producer", **{"kvlink.listen": "tcp://0.0.0.0:0"})
    engines("kv_producer", **{"kvlink.listen": "tcp://0.0.0.0:0", "kvlink.secret": "s"})


def timed(engine):
    begin = time.monotonic()
    engine.step()
    return time.monotonic() - begin


def test_empty_steps_sleep_only_while_something_is_open_and_wake_at_its_end(engines):
    wait = 1.0
    p = engines("kv_producer", **{"kvlink.idle_wait": wait})
    d = engines("kv_consumer", blocks=64, **{"kvlink.idle_wait": wait, "kvlink.handoff_wait": 20.0})
    assert timed(d) < wait / 2  # nothing open
    answer = prefill(p, "p1", list(range(20)))
    assert timed(p) > wait * 0.9  # a lease is held
    unknown = dict(answer, kvlink_handoff="3" * 32)
    stuck = decode(d, "d1", list(range(20)), unknown)
    d.step()
    assert timed(d) > wait * 0.9  # a pull waits
    d.add(Request("plain", [1, 2, 3]))
    assert timed(d) < wait / 2  # a step with work never sleeps
    threading.Timer(0.1, d.workers[0]._runner._pulls.cancel, (["d1"],)).start()
    assert timed(d) < wait / 2  # it wakes when the pull ends
    decode(d, "d2", list(range(20)), answer)
    settle(p, d)
    assert stuck.computed_here == 20
