"""Clients: that go away, that are slow, too many, too large; bodies of any kind."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from proxy_servers import Engines, Proxies, Proxy, events_of, wait_until

OUTCOMES = ("ok", "client_error", "upstream_error", "client_gone", "rejected", "error")


def send_raw(proxy: Proxy, body: dict[str, Any], *, length: int | None = None) -> socket.socket:
    """Send a request and leave the connection open."""
    raw = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: p\r\nContent-Length: {length or len(raw)}\r\n\r\n"
    connection = socket.create_connection(proxy.listener.getsockname(), timeout=20)
    connection.sendall(head.encode() + raw)
    return connection


def gone(proxy: Proxy) -> float:
    return proxy.metric("requests_total", endpoint="/v1/completions", outcome="client_gone")


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_while_the_prefiller_works(engines: Engines, proxies: Proxies, stream: bool) -> None:
    p, d = engines("prefill", delay=60.0), engines("decode")
    proxy = proxies([p], [d])
    connection = send_raw(proxy, {"prompt": "a", "stream": stream})
    wait_until(lambda: p.requests, 10, "the prefiller's request")
    assert proxy.service.active == 1
    connection.close()
    wait_until(lambda: p.aborted == 1, 10, "the prefiller to drop the request")
    wait_until(lambda: proxy.service.active == 0, 10, "the proxy to forget the request")
    assert d.requests == []
    assert gone(proxy) == 1
    assert proxy.service.prefillers.engines[0].in_flight == 0
    assert proxy.service.prefillers.engines[0].cooling is False, "the engine is not to blame"


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_before_the_decoders_first_byte(engines: Engines, proxies: Proxies, stream: bool) -> None:
    p, d = engines("prefill"), engines("decode", delay=60.0)
    proxy = proxies([p], [d])
    connection = send_raw(proxy, {"prompt": "a", "stream": stream})
    wait_until(lambda: d.requests, 10, "the decoder's request")
    connection.close()
    wait_until(lambda: d.aborted == 1, 10, "the decoder to drop the request")
    wait_until(lambda: gone(proxy) == 1, 10, "the proxy to forget the request")
    assert len(d.requests) == 1


def test_leaving_in_the_middle_of_a_stream(engines: Engines, proxies: Proxies) -> None:
    p, d = engines("prefill"), engines("decode", token_delay=0.05)
    proxy = proxies([p], [d])
    connection = send_raw(proxy, {"prompt": "a", "stream": True, "max_tokens": 5000})
    received = b""
    while b"w3" not in received:
        received += connection.recv(65536)
    connection.close()
    wait_until(lambda: d.aborted == 1, 10, "the decoder to drop the request")
    wait_until(lambda: gone(proxy) == 1, 10, "the proxy to forget the request")
    assert d.finished == 0
    assert proxy.service.decoders.engines[0].load == 0


def test_leaving_before_the_whole_body(engines: Engines, proxies: Proxies) -> None:
    p, d = engines("prefill"), engines("decode")
    proxy = proxies([p], [d])
    send_raw(proxy, {"prompt": "a"}, length=10_000).close()
    wait_until(lambda: gone(proxy) == 1, 10, "the proxy to forget the request")
    assert p.requests == []


def test_a_client_that_does_not_send_its_body(engines: Engines, proxies: Proxies) -> None:
    p, d = engines("prefill"), engines("decode")
    connection = send_raw(proxies([p], [d], client_timeout=0.5), {"prompt": "a"}, length=10_000)
    with connection:
        assert b"408" in connection.recv(65536).split(b"\r\n")[0]


def test_a_client_that_does_not_read(engines: Engines, proxies: Proxies) -> None:
    p, d = engines("prefill"), engines("decode", text="x" * 200_000)
    proxy = proxies([p], [d], client_timeout=0.5)
    connection = send_raw(proxy, {"prompt": "a", "stream": True, "max_tokens": 5000})
    with connection:
        wait_until(lambda: gone(proxy) == 1, 20, "the proxy to give the client up")
        wait_until(lambda: d.aborted == 1, 10, "the decoder to drop the request")


def test_too_many_at_once(engines: Engines, proxies: Proxies) -> None:
    p, d = engines("prefill", delay=60.0), engines("decode")
    proxy = proxies([p], [d], max_concurrent=2)
    waiting = [send_raw(proxy, {"prompt": "a"}) for _ in range(2)]
    wait_until(lambda: proxy.service.active == 2, 10, "two requests in work")
    refused = proxy.complete()
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert "--max-concurrent" in refused.json()["error"]["message"]
    assert proxy.http.get("/health").json()["active"] == 2
    for connection in waiting:
        connection.close()
    wait_until(lambda: proxy.service.active == 0, 10, "the proxy to forget both")
    p.behaviour.delay = 0
    assert proxy.complete().status_code == 200


def test_too_large(engines: Engines, proxies: Proxies) -> None:
    p, d = engines("prefill"), engines("decode")
    proxy = proxies([p], [d], max_body_bytes=1000)
    announced = proxy.complete(prompt="a" * 2000)
    assert announced.status_code == 413

    def pieces() -> Any:
        yield b'{"prompt": "'
        for _ in range(20):
            yield b"a" * 100
        yield b'"}'

    unannounced = httpx.post(f"{proxy.url}/v1/completions", content=pieces(), trust_env=False)
    assert unannounced.status_code == 413
    assert unannounced.json()["error"]["type"] == "RequestTooLargeError"
    assert proxy.complete(prompt="a" * 500).status_code == 200
    assert len(p.requests) == 1


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"a"', b"\xff\xfe", b"1"])
def test_bodies_that_are_no_request(engines: Engines, proxies: Proxies, body: bytes) -> None:
    p, d = engines("prefill"), engines("decode")
    answer = proxies([p], [d]).http.post("/v1/completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "BadRequestError"
    assert p.requests == d.requests == []


def test_other_media(engines: Engines, proxies: Proxies) -> None:
    p, d = engines("prefill"), engines("decode")
    answer = proxies([p], [d]).http.post("/v1/completions", data={"prompt": "a"})
    assert answer.status_code == 415


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.text(max_size=4)
    | st.floats(allow_nan=False, allow_infinity=False)
)
ANY = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=3), SCALARS, max_size=2)
PARAMS = st.just({"do_remote_prefill": True, "remote_host": "evil"})


def test_any_body_gets_an_answer_and_leaves_nothing(engines: Engines, proxies: Proxies) -> None:
    p, d = engines("prefill"), engines("decode")
    proxy = proxies([p], [d], max_attempts=2, cooldown=0)

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(
        st.fixed_dictionaries(
            {"prompt": st.text(min_size=1, max_size=5) | ANY},
            optional={
                "max_tokens": st.integers(-1, 5) | ANY,
                "n": st.integers(1, 3),
                "stream": st.booleans(),
                "stop": st.sampled_from(["w0", ["w1"], None]),
                "stream_options": st.just({"include_usage": True}),
                "echo": st.booleans(),
                "kv_transfer_params": PARAMS | ANY,
                "vllm_xargs": st.fixed_dictionaries({"kv_transfer_params": PARAMS | ANY}),
                "user": ANY,
            },
        ),
        st.sampled_from(["/v1/completions", "/v1/chat/completions"]),
    )
    def check(body: dict[str, Any], path: str) -> None:
        answer = proxy.http.post(path, json=body)
        assert answer.headers["x-request-id"]
        if answer.status_code == 200:
            assert answer.headers["x-kvlink-route"] in ("split", "plain", "recompute")
            assert "transfer_params" not in answer.text
            if body.get("stream"):
                assert events_of(answer.text)[-1] == "[DONE]"
        else:
            assert "error" in answer.json() or answer.text == "Internal Server Error"
        assert not any(b"evil" in raw for raw in (*p.raw, *d.raw))

    check()
    wait_until(lambda: proxy.service.active == 0, 10, "the last request's end")
    for engine in (*proxy.service.prefillers.engines, *proxy.service.decoders.engines):
        assert (engine.in_flight, engine.load) == (0, 0)
    total = sum(
        proxy.metric("requests_total", endpoint=path, outcome=outcome)
        for path in ("/v1/completions", "/v1/chat/completions")
        for outcome in OUTCOMES
    )
    assert total >= 60
    assert proxy.metric("requests_total", endpoint="/v1/completions", outcome="error") == 0


def test_many_at_once_each_get_their_own(engines: Engines, proxies: Proxies) -> None:
    ps = [engines("prefill", delay=0.01), engines("prefill", status=500)]
    ds = [engines("decode"), engines("decode", break_after=0)]
    proxy = proxies(ps, ds, cooldown=0)
    results: dict[int, str] = {}

    def ask(count: int) -> None:
        with httpx.Client(base_url=proxy.url, timeout=60, trust_env=False) as client:
            body = {"prompt": "a", "max_tokens": count, "stream": True}
            answer = client.post("/v1/completions", json=body)
            events = events_of(answer.text)
            results[count] = "".join(event["choices"][0]["text"] for event in events[:-1])

    threads = [threading.Thread(target=ask, args=(count,)) for count in range(1, 25)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == {count: "".join(f" w{i}" for i in range(count)) for count in range(1, 25)}
    wait_until(lambda: proxy.service.active == 0, 10, "the last request's end")
