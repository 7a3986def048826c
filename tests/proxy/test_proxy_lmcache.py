"""The LMCache flow: specs, KV-ready messages, deadlines, failures, and a first token from the prefiller."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import pytest
import zmq
from proxy_servers import Engines, FakeEngine, Proxies, Proxy, events_of, wait_until

from kvlink_proxy import cli, first_token, kv_ready
from kvlink_proxy.config import Receiver
from kvlink_proxy.kv_ready import KVReady
from kvlink_proxy.metrics import Metrics

Make = Callable[..., tuple[FakeEngine, FakeEngine, Proxy]]


@pytest.fixture
def lmcache(engines: Engines, proxies: Proxies) -> Make:
    """One prefiller that reports to the proxy, one decoder, and a proxy of the LMCache flow."""

    def make(*, ranks: int = 1, **settings: Any) -> tuple[FakeEngine, FakeEngine, Proxy]:
        p, d = engines("prefill"), engines("decode")
        ports = tuple(range(7300, 7300 + ranks)), tuple(range(7400, 7400 + ranks))
        defaults = {"proxy_host": "127.0.0.1", "proxy_port": 0, "kv_ready_timeout": 20.0}
        proxy = proxies(
            [p], [d], flow="lmcache", receivers=(Receiver("127.0.0.1", *ports),), **{**defaults, **settings}
        )
        p.behaviour.notify = address(proxy)
        p.behaviour.ranks = ranks
        return p, d, proxy

    return make


def address(proxy: Proxy) -> str:
    ready = proxy.service._ready
    assert ready is not None
    return f"tcp://127.0.0.1:{ready.port}"


def test_a_host_with_two_addresses_is_listened_to_on_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """LMCache's sockets reach "localhost" over IPv4, whatever else the name stands for."""

    def both(*_: Any, **__: Any) -> list[Any]:
        return [(0, 0, 0, "", (place, 0)) for place in ("::1", "127.0.0.1")]

    with monkeypatch.context() as patch:
        patch.setattr(kv_ready.socket, "getaddrinfo", both)
        ready = KVReady("localhost", 0, Metrics())
    try:
        socket.create_connection(("127.0.0.1", ready.port), 5).close()
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError:
            return  # no IPv6 here
        socket.create_connection(("::1", ready.port), 5).close()
    finally:
        ready.close()


def spec_of(engine: FakeEngine, number: int = -1) -> dict[str, Any]:
    return dict(engine.requests[number]["kv_transfer_params"]["disagg_spec"])


@pytest.mark.parametrize("names_rank", [True, False], ids=["kvlink's message", "LMCache's message"])
def test_prefill_then_ready_then_decode(lmcache: Make, names_rank: bool) -> None:
    p, d, proxy = lmcache(ranks=2)
    p.behaviour.names_rank = names_rank
    answer = proxy.complete()
    assert answer.status_code == 200
    assert answer.headers["x-kvlink-route"] == "split"
    assert answer.json()["choices"][0]["text"] == " w0 w1 w2 w3"
    spec = spec_of(p)
    assert spec["receiver_init_port"] == [7300, 7301]
    assert spec["receiver_alloc_port"] == [7400, 7401]
    assert spec["receiver_host"] == "127.0.0.1"
    assert spec["req_id"].startswith(answer.headers["x-request-id"])
    assert p.requests[0]["max_tokens"] == 1
    assert d.requests[0]["max_tokens"] == 4
    assert d.requests[0]["kv_transfer_params"] == {"kvlink.whole_prompt": True}
    assert proxy.metric("handoffs_total", outcome="ready") == 1


def test_ids_differ(lmcache: Make) -> None:
    p, _, proxy = lmcache()
    for _ in range(3):
        proxy.complete()
    assert len({spec_of(p, number)["req_id"] for number in range(3)}) == 3


def test_the_decoder_waits_for_every_rank(lmcache: Make) -> None:
    p, d, proxy = lmcache(ranks=2)
    p.behaviour.report = None
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(proxy.complete()))
    asking.start()
    wait_until(lambda: p.finished == 1, 10, "the prefill")
    with zmq.Context() as context, context.socket(zmq.PUSH) as push:
        push.connect(address(proxy))
        notif = {"type": "ProxyNotif", "req_id": spec_of(p)["req_id"], "rank": 0, "world_size": 2}
        for _ in range(2):  # a rank counts once
            push.send(msgspec.msgpack.encode(notif))
        ready = proxy.service._ready
        assert ready is not None
        (waiter,) = ready._waiting.values()
        wait_until(lambda: waiter.seen == {0}, 10, "the first rank's message")
        assert not d.requests
        push.send(msgspec.msgpack.encode({**notif, "rank": 1}))
        asking.join(20)
    assert answers[0].headers["x-kvlink-route"] == "split"
    assert len(d.requests) == 1


@pytest.mark.parametrize(
    ("report", "outcome"), [("failed", "failed"), ("never", "never")], ids=["failed", "never fits"]
)
def test_a_failure_makes_the_decoder_compute(
    lmcache: Make, report: str, outcome: str, caplog: pytest.LogCaptureFixture
) -> None:
    p, d, proxy = lmcache()
    p.behaviour.report = report
    answer = proxy.complete()
    assert answer.status_code == 200
    assert answer.headers["x-kvlink-route"] == "recompute"
    assert answer.headers["x-kvlink-reason"] == "kv"
    assert len(p.requests) == 1
    assert len(d.requests) == 1
    assert "no room for 24 chunks" in caplog.text
    assert proxy.metric("handoffs_total", outcome=outcome) == 1


def test_a_lost_message_has_a_deadline(lmcache: Make, caplog: pytest.LogCaptureFixture) -> None:
    p, _, proxy = lmcache(kv_ready_timeout=0.5)
    p.behaviour.report = None
    began = time.monotonic()
    answer = proxy.complete()
    assert answer.status_code == 200
    assert answer.headers["x-kvlink-route"] == "recompute"
    assert 0.5 <= time.monotonic() - began < 10
    assert "0 of 1 ranks reported their KV at the decoder within 0.5 s" in caplog.text


def test_fail_tells_the_client_why(lmcache: Make) -> None:
    p, d, proxy = lmcache(on_prefill_failure="fail")
    p.behaviour.report = "never"
    answer = proxy.complete()
    assert answer.status_code == 502
    assert "no room for 24 chunks" in answer.json()["error"]["message"]
    assert p.url in answer.json()["error"]["message"]
    assert not d.requests


def test_a_wrong_number_of_ranks_is_named(lmcache: Make, caplog: pytest.LogCaptureFixture) -> None:
    p, _, proxy = lmcache()
    p.behaviour.ranks = 2
    assert proxy.complete().headers["x-kvlink-route"] == "recompute"
    assert "has 2 tensor-parallel ranks, but --decoder-init-port names 1 ports" in caplog.text


def test_a_dead_prefiller_is_passed_over(lmcache: Make, engines: Engines, proxies: Proxies) -> None:
    p, d, first = lmcache()
    dead = engines("prefill")
    settings = {"flow": "lmcache", "receivers": first.config.receivers, "proxy_host": "127.0.0.1", "proxy_port": 0}
    proxy = proxies([dead, p], [d], health_interval=60.0, **settings)
    p.behaviour.notify = address(proxy)
    dead.stop()
    answer = proxy.complete()
    assert answer.headers["x-kvlink-route"] == "split"
    assert spec_of(p)["req_id"].endswith("-p1")


def test_no_prefiller_at_all(lmcache: Make) -> None:
    p, d, proxy = lmcache()
    p.stop()
    answer = proxy.complete()
    assert answer.status_code == 200
    assert answer.headers["x-kvlink-route"] == "recompute"
    assert len(d.requests) == 1


def test_the_decoder_of_the_kv_dies(lmcache: Make, engines: Engines, proxies: Proxies) -> None:
    """Another decoder computes the prompt: the KV is with the first one."""
    p, first_decoder, first = lmcache()
    other = engines("decode")
    receivers = (*first.config.receivers, Receiver("127.0.0.1", (7310,), (7410,)))
    settings = {"flow": "lmcache", "receivers": receivers, "proxy_host": "127.0.0.1", "proxy_port": 0}
    proxy = proxies([p], [first_decoder, other], health_interval=60.0, **settings)
    p.behaviour.notify = address(proxy)
    p.behaviour.delay = 0.5
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(proxy.complete()))
    asking.start()
    wait_until(lambda: p.requests, 10, "the prefill")
    chosen, rest = (first_decoder, other) if spec_of(p)["receiver_init_port"] == [7300] else (other, first_decoder)
    chosen.stop()
    asking.join(20)
    assert answers[0].status_code == 200
    assert answers[0].headers["x-kvlink-route"] == "recompute"
    assert answers[0].headers["x-kvlink-reason"] == "decode_failed"
    assert len(rest.requests) == 1


def test_kv_goes_to_the_decoder_that_decodes(lmcache: Make, engines: Engines, proxies: Proxies) -> None:
    p, first_decoder, first = lmcache()
    other = engines("decode")
    receivers = (*first.config.receivers, Receiver("127.0.0.1", (7310,), (7410,)))
    settings = {"flow": "lmcache", "receivers": receivers, "proxy_host": "127.0.0.1", "proxy_port": 0}
    proxy = proxies([p], [first_decoder, other], **settings)
    p.behaviour.notify = address(proxy)
    for _ in range(4):
        proxy.complete()
    for number in range(4):
        port = spec_of(p, number)["receiver_init_port"][0]
        assert port in (7300, 7310)
    assert len(first_decoder.requests) == len(other.requests) == 2


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode({"type": "Other", "req_id": "x"}),
        b"x" * 100_000,
        b"\x82\xa4type\xaaProxyNotif\xa6req_id\xa1\xff",
        b"\x83\xa4type\xaaProxyNotif\xa6req_id\xa1x\xa1e" + b"\x91" * 60_000 + b"\xc0",
    ],
    ids=["empty", "not msgpack", "another type", "too long", "bad UTF-8", "deeply nested"],
)
def test_junk_on_the_socket_harms_nobody(lmcache: Make, junk: bytes) -> None:
    _, _, proxy = lmcache()
    with zmq.Context() as context, context.socket(zmq.PUSH) as push:
        push.setsockopt(zmq.LINGER, 1000)
        push.connect(address(proxy))
        for _ in range(3):
            push.send(junk)
    with socket.create_connection(("127.0.0.1", int(address(proxy).rsplit(":", 1)[1]))) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\n\r\n" * 10)
    assert proxy.complete().headers["x-kvlink-route"] == "split"


def test_messages_of_many_frames_are_dropped_and_what_follows_is_heard(lmcache: Make) -> None:
    _, _, proxy = lmcache()
    with zmq.Context() as context, context.socket(zmq.PUSH) as push:
        push.setsockopt(zmq.LINGER, 1000)
        push.connect(address(proxy))
        good = msgspec.msgpack.encode({"type": "ProxyNotif", "req_id": "x"})
        for count in (2, 3, 2000):
            push.send_multipart([good] * count)
    assert proxy.complete().headers["x-kvlink-route"] == "split"


def test_a_flood_of_junk_is_one_line_with_a_count(lmcache: Make, caplog: pytest.LogCaptureFixture) -> None:
    _, _, proxy = lmcache()
    ready = proxy.service._ready
    assert ready is not None
    with zmq.Context() as context, context.socket(zmq.PUSH) as push:
        push.setsockopt(zmq.LINGER, 1000)
        push.connect(address(proxy))
        for _ in range(300):
            push.send(b"\xc1")
        wait_until(lambda: ready._complaints._unsaid == 299, 20, "the flood's end")
        assert caplog.text.count("not a prefiller's") == 1
        ready._complaints._next = 0.0  # as if some seconds had passed
        push.send(b"\xc1")
        wait_until(lambda: "299 more such lines" in caplog.text, 10, "the count")
    assert caplog.text.count("not a prefiller's") == 2
    assert proxy.complete().headers["x-kvlink-route"] == "split"


def test_an_error_of_the_socket_does_not_end_the_listening(
    lmcache: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, proxy = lmcache()
    ready = proxy.service._ready
    assert ready is not None
    receive, failed = ready._receive, threading.Event()

    async def once() -> bytes | None:
        if not failed.is_set():
            failed.set()
            raise zmq.ZMQError(zmq.EFAULT)
        return await receive()

    monkeypatch.setattr(ready, "_receive", once)
    with zmq.Context() as context, context.socket(zmq.PUSH) as push:
        push.setsockopt(zmq.LINGER, 1000)
        push.connect(address(proxy))
        # It is what is waited for now, so that the next one goes by the function above.
        push.send(msgspec.msgpack.encode({"type": "ProxyNotif", "req_id": "x"}))
        assert failed.wait(10)
    assert proxy.complete().headers["x-kvlink-route"] == "split"
    assert "could not be read" in caplog.text


def test_a_message_for_another_request_counts_for_none(lmcache: Make) -> None:
    p, _, proxy = lmcache(kv_ready_timeout=1.0)
    p.behaviour.report = None
    with zmq.Context() as context, context.socket(zmq.PUSH) as push:
        push.connect(address(proxy))
        push.send(msgspec.msgpack.encode({"type": "ProxyNotif", "req_id": "1"}))
        assert proxy.complete().headers["x-kvlink-route"] == "recompute"


def test_a_client_cannot_choose_the_receiver(lmcache: Make) -> None:
    p, d, proxy = lmcache()
    params = {"disagg_spec": {"req_id": "mine", "receiver_host": "evil", "receiver_init_port": [1]}}
    proxy.complete(kv_transfer_params=params, vllm_xargs={"kv_transfer_params": params})
    assert spec_of(p)["receiver_host"] == "127.0.0.1"
    assert "evil" not in json.dumps(p.requests + d.requests)


def test_a_client_that_goes_away_leaves_nothing(lmcache: Make) -> None:
    p, d, proxy = lmcache()
    p.behaviour.report = None
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{proxy.url}/v1/completions", json={"model": "fake", "prompt": "a"}, timeout=1, trust_env=False)
    ready = proxy.service._ready
    assert ready is not None
    wait_until(lambda: not ready._waiting and proxy.service.active == 0, 10, "the request's end")
    assert not d.requests


def test_chat_and_streams(lmcache: Make) -> None:
    p, d, proxy = lmcache()
    assert proxy.chat(max_tokens=3).headers["x-kvlink-route"] == "split"
    assert p.requests[0]["messages"] == d.requests[0]["messages"]
    answer = proxy.complete(stream=True)
    assert events_of(answer.text)[-1] == "[DONE]"


def test_the_port_is_taken(free_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", free_port)):
        line = f"--port 0 --flow lmcache --proxy-host 127.0.0.1 --proxy-port {free_port}"
        assert cli.main(line.split()) == 1


# ---- the first token from the prefiller
def test_first_token_streamed(lmcache: Make) -> None:
    p, d, proxy = lmcache(first_token="prefiller")
    answer = proxy.complete(stream=True, stream_options={"include_usage": True})
    events = events_of(answer.text)
    assert events[-1] == "[DONE]"
    assert [event["choices"][0]["text"] for event in events[:-2]] == [" w0", " w0", " w1", " w2"]
    assert len({event["id"] for event in events[:-1]}) == 1
    assert events[-2]["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 4,
        "total_tokens": 8,
        "prompt_tokens_details": None,
    }
    assert p.requests[0]["kv_transfer_params"]["ret_first_tok"] is True
    assert d.requests[0]["prompt"] == [0, 1, 2, 3, 1000]
    assert d.requests[0]["max_tokens"] == 3


def test_first_token_comes_before_the_kv(lmcache: Make) -> None:
    p, _, proxy = lmcache(first_token="prefiller")
    p.behaviour.report = None
    with proxy.http.stream(
        "POST", "/v1/completions", json={"model": "fake", "prompt": "a b", "max_tokens": 3, "stream": True}
    ) as answer:
        chunks = answer.iter_bytes()
        assert b" w0" in next(chunks)
        with zmq.Context() as context, context.socket(zmq.PUSH) as push:
            push.connect(address(proxy))
            push.send(msgspec.msgpack.encode({"type": "ProxyNotif", "req_id": spec_of(p)["req_id"]}))
            assert b"[DONE]" in b"".join(chunks)


def test_first_token_whole(lmcache: Make) -> None:
    _, _, proxy = lmcache(first_token="prefiller")
    answer = proxy.complete().json()
    assert answer["choices"][0]["text"] == " w0 w0 w1 w2"
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["usage"]["prompt_tokens"] == 4


@pytest.mark.parametrize("stream", [True, False])
def test_end_of_sequence_as_the_first_token(lmcache: Make, stream: bool) -> None:
    p, d, proxy = lmcache(first_token="prefiller")
    p.behaviour.eos_first = True
    answer = proxy.complete(stream=stream)
    assert not d.requests
    if stream:
        events = events_of(answer.text)
        assert events[0]["choices"][0]["finish_reason"] == "stop"
        assert events[-1] == "[DONE]"
    else:
        assert answer.json()["choices"][0]["finish_reason"] == "stop"
        assert answer.json()["usage"]["completion_tokens"] == 1


def test_first_token_and_then_no_kv(lmcache: Make) -> None:
    p, d, proxy = lmcache(first_token="prefiller")
    p.behaviour.report = "failed"
    answer = proxy.complete(stream=True)
    assert events_of(answer.text)[-1] == "[DONE]"
    assert d.requests[0]["prompt"][-1] == 1000


def test_first_token_and_then_no_decoder(lmcache: Make) -> None:
    p, d, proxy = lmcache(first_token="prefiller", max_attempts=1)
    p.behaviour.delay = 0.3
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(proxy.complete(stream=True)))
    asking.start()
    wait_until(lambda: p.requests, 10, "the prefill")
    d.stop()
    asking.join(20)
    events = events_of(answers[0].text)
    assert events[0]["choices"][0]["text"] == " w0"
    assert d.url in events[-1]["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"n": 2},
        {"logprobs": 1},
        {"stop": ["w2"]},
        {"presence_penalty": 0.5},
        {"max_tokens": 1},
        {"seed": 1},
        {"response_format": {"type": "json_object"}},
    ],
    ids=lambda body: next(iter(body)),
)
def test_what_needs_one_engine_gets_it(lmcache: Make, body: dict[str, Any]) -> None:
    p, d, proxy = lmcache(first_token="prefiller")
    assert proxy.complete(**body).headers["x-kvlink-route"] == "split"
    assert "ret_first_tok" not in p.requests[0]["kv_transfer_params"]
    assert d.requests[0]["prompt"] == "a b c d"


def test_a_broken_character_is_left_to_the_decoder(lmcache: Make) -> None:
    p, d, proxy = lmcache(first_token="prefiller")
    p.behaviour.text = "\ufffd"
    proxy.complete()
    assert d.requests[0]["prompt"] == "a b c d"


@pytest.mark.parametrize("value", ["3", 2.5, [1], True])
def test_an_odd_min_tokens_is_left_to_the_engine(value: object) -> None:
    body = {"prompt": "hello", "max_tokens": 9}
    assert first_token.possible("/v1/completions", {**body, "min_tokens": 2})
    assert not first_token.possible("/v1/completions", {**body, "min_tokens": value})
