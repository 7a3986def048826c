"""Failures: the request is computed here, with a warning; the engine goes on."""

from __future__ import annotations

import copy
import time

import pytest
from tests.vllm.harness import decode, prefill, settle, warned


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
    p, d = engines("kv_producer", **{"kvlink.contact": 1.0}), engines("kv_consumer")
    request = decode(d, "d1", list(range(1, 21)), prefill(p, "p1", list(range(20))))
    settle(p, d)
    assert request.computed_here == 20
    assert warned(caplog, "another prompt")


def test_a_longer_prompt_than_the_hand_offs_is_refused(engines):
    p, d = engines("kv_producer", **{"kvlink.contact": 1.0}), engines("kv_consumer")
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
