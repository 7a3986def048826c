"""Leases, aborts and checksums: nothing stays held, and no stale byte is taken."""

from __future__ import annotations

import json
import time

import pytest
from tests.vllm.harness import Request, decode, prefill, settle, warned
from vllm.v1.request import RequestStatus

from kvlink_vllm import wire


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
