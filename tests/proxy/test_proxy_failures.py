"""Engines that fail: who is asked next, with what, and what the client is told."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Proxy, events_of
from proxy_fake_engine import FakeEngine, wait_until

Engines = Callable[..., FakeEngine]
Proxies = Callable[..., Proxy]


def text_of(answer: Any, stream: bool) -> str:
    assert answer.status_code == 200, answer.text
    if not stream:
        return str(answer.json()["choices"][0]["text"])
    events = events_of(answer.text)
    assert events[-1] == "[DONE]"
    return "".join(event["choices"][0]["text"] for event in events[:-1])


FAILING_PREFILLERS: list[tuple[dict[str, Any], str]] = [
    ({"status": 500}, "status"),
    ({"status": 503}, "status"),
    ({"status": 429}, "status"),
    ({"delay": 30.0}, "timeout"),
    ({"no_params": True}, "no_kv_params"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("how", "reason"), FAILING_PREFILLERS)
def test_the_decoder_recomputes(
    engines: Engines, proxies: Proxies, how: dict[str, Any], reason: str, stream: bool
) -> None:
    p, d = engines("prefill", **how), engines("decode")
    proxy = proxies([p], [d], prefill_timeout=0.5)
    answer = proxy.complete(stream=stream)
    assert text_of(answer, stream) == " w0 w1 w2 w3"
    assert (answer.headers["x-kvlink-route"], answer.headers["x-kvlink-reason"]) == ("recompute", reason)
    assert "kv_transfer_params" not in d.requests[0]
    assert proxy.metric("routes_total", route="recompute", reason=reason) == 1


@pytest.mark.parametrize(("how", "reason"), FAILING_PREFILLERS)
def test_another_prefiller_is_asked(engines: Engines, proxies: Proxies, how: dict[str, Any], reason: str) -> None:
    bad, good, d = engines("prefill", **how), engines("prefill"), engines("decode")
    proxy = proxies([bad, good], [d], prefill_timeout=0.5)
    answer = proxy.complete()
    assert answer.headers["x-kvlink-route"] == "split"
    assert (len(bad.requests), len(good.requests), len(d.requests)) == (1, 1, 1)
    assert d.requests[0]["kv_transfer_params"]["remote_engine_id"] == f"engine-{id(good.engine)}"
    assert proxy.metric("retries_total", role="prefill", reason=reason) == 1
    # The one that failed is the last choice for a while.
    assert proxy.complete().status_code == 200
    assert (len(bad.requests), len(good.requests)) == (1, 2)


@pytest.mark.parametrize(
    ("how", "status", "text"),
    [
        ({"status": 500}, 502, "answered 500: made to fail"),
        ({"delay": 30.0}, 504, "did not send its answer in time"),
        ({"no_params": True}, 502, "handed no KV blocks over"),
    ],
)
def test_failure_of_prefill_may_be_an_error(
    engines: Engines, proxies: Proxies, how: dict[str, Any], status: int, text: str
) -> None:
    p, d = engines("prefill", **how), engines("decode")
    answer = proxies([p], [d], prefill_timeout=0.5, on_prefill_failure="fail").complete()
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["message"].startswith(f"prefill: engine {p.url} ")
    assert text in error["message"]
    assert error["message"].endswith(" s elapsed)")
    assert (error["code"], error["param"]) == (status, None)
    assert d.requests == []


def test_a_busy_prefillers_own_answer_reaches_the_client(engines: Engines, proxies: Proxies) -> None:
    p, d = engines("prefill", status=429), engines("decode")
    answer = proxies([p], [d], on_prefill_failure="fail").complete()
    assert (answer.status_code, answer.json()["error"]["message"]) == (429, "made to fail")


def test_a_prefiller_that_is_not_there(engines: Engines, proxies: Proxies, free_port: int) -> None:
    d = engines("decode")
    proxy = proxies([f"http://127.0.0.1:{free_port}"], [d])
    answer = proxy.complete()
    assert (answer.headers["x-kvlink-route"], answer.headers["x-kvlink-reason"]) == ("recompute", "unavailable")
    strict = proxies([f"http://127.0.0.1:{free_port}"], [d], on_prefill_failure="fail")
    answer = strict.complete()
    assert answer.status_code == 503
    assert "is not reachable" in answer.json()["error"]["message"]
    assert answer.headers["retry-after"] == "1"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prefiller_that_stops_and_comes_back(engines: Engines, proxies: Proxies, stream: bool) -> None:
    p, d = engines("prefill"), engines("decode")
    proxy = proxies([p], [d], cooldown=0)
    assert proxy.complete(stream=stream).headers["x-kvlink-route"] == "split"
    p.stop()
    assert proxy.complete(stream=stream).headers["x-kvlink-route"] == "recompute"
    wait_until(lambda: not proxy.service.prefillers.up, 10, "the proxy to notice")
    assert proxy.http.get("/health").json()["status"] == "degraded"
    p.start_again()
    wait_until(lambda: proxy.service.prefillers.up, 10, "the proxy to notice")
    assert proxy.complete(stream=stream).headers["x-kvlink-route"] == "split"


@pytest.mark.parametrize("stream", [False, True])
def test_a_decoder_that_is_not_there(engines: Engines, proxies: Proxies, free_port: int, stream: bool) -> None:
    p, d = engines("prefill"), engines("decode")
    proxy = proxies([p], [f"http://127.0.0.1:{free_port}", d], checked=False, health_interval=60)
    wait_until(lambda: proxy.service.decoders.up, 10, "the first health check")
    for engine in proxy.service.decoders.engines:
        engine.state = "unknown"  # so that the absent one is tried first
    answer = proxy.complete(stream=stream)
    assert text_of(answer, stream) == " w0 w1 w2 w3"
    assert answer.headers["x-kvlink-route"] == "split", "an unreachable decoder leaves the hand-off as it was"
    assert d.requests[0]["kv_transfer_params"]["do_remote_prefill"] is True
    assert len(p.requests) == 1
    assert proxy.metric("retries_total", role="decode", reason="connect") == 1


def test_a_hand_off_older_than_its_lease_is_not_offered_again(
    engines: Engines, proxies: Proxies, free_port: int
) -> None:
    p, d = engines("prefill"), engines("decode")
    proxy = proxies([p], [f"http://127.0.0.1:{free_port}", d], checked=False, health_interval=60, lease_seconds=0)
    wait_until(lambda: proxy.service.decoders.up, 10, "the first health check")
    for engine in proxy.service.decoders.engines:
        engine.state = "unknown"
    answer = proxy.complete()
    assert (answer.headers["x-kvlink-route"], answer.headers["x-kvlink-reason"]) == ("recompute", "decode_failed")
    assert "kv_transfer_params" not in d.requests[0]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", [{"status": 500}, {"status": 503}, {"delay": 30.0}])
def test_another_decoder_gets_a_plain_request(
    engines: Engines, proxies: Proxies, how: dict[str, Any], stream: bool
) -> None:
    p, bad, good = engines("prefill"), engines("decode", **how), engines("decode")
    proxy = proxies([p], [bad, good], first_byte_timeout=0.5, answer_timeout=0.5)
    answer = proxy.complete(stream=stream)
    assert text_of(answer, stream) == " w0 w1 w2 w3"
    assert answer.headers["x-kvlink-reason"] == "decode_failed"
    assert "kv_transfer_params" in bad.requests[0]
    assert "kv_transfer_params" not in good.requests[0]


@pytest.mark.parametrize("stream", [False, True])
def test_another_decoder_gets_the_hand_off_of_one_that_broke(engines: Engines, proxies: Proxies, stream: bool) -> None:
    p, bad, good = engines("prefill"), engines("decode", break_after=0), engines("decode")
    if not stream:
        bad.behaviour.status = 500
    answer = proxies([p], [bad, good]).complete(stream=stream)
    assert text_of(answer, stream) == " w0 w1 w2 w3"
    assert ("kv_transfer_params" in good.requests[0]) == stream


@pytest.mark.parametrize("how", [{"status": 500}, {"first_event_error": True}])
def test_the_only_decoder_is_asked_again_without_the_hand_off(
    engines: Engines, proxies: Proxies, how: dict[str, Any]
) -> None:
    p, d = engines("prefill"), engines("decode", fail_only_with_params=True, **how)
    answer = proxies([p], [d]).complete(stream=True)
    assert text_of(answer, True) == " w0 w1 w2 w3"
    assert (answer.headers["x-kvlink-route"], answer.headers["x-kvlink-reason"]) == ("recompute", "decode_failed")
    assert ["kv_transfer_params" in request for request in d.requests] == [True, False]


def test_under_fail_no_hand_off_is_replaced_by_a_recompute(engines: Engines, proxies: Proxies) -> None:
    p, d = engines("prefill"), engines("decode", fail_only_with_params=True, first_event_error=True)
    answer = proxies([p], [d], on_prefill_failure="fail").complete(stream=True)
    assert answer.status_code == 502
    assert "began its answer with an error: KV load failed" in answer.json()["error"]["message"]
    assert len(d.requests) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("how", "status", "text"),
    [
        ({"status": 500}, 502, "answered 500: made to fail"),
        ({"delay": 30.0}, 504, "did not send the first bytes of its answer in time"),
    ],
)
def test_no_decoder_can(
    engines: Engines, proxies: Proxies, how: dict[str, Any], status: int, text: str, stream: bool
) -> None:
    p, d = engines("prefill"), engines("decode", **how)
    answer = proxies([p], [d], first_byte_timeout=0.4, answer_timeout=0.4).complete(stream=stream)
    assert answer.status_code == status
    message = answer.json()["error"]["message"]
    assert message.startswith(f"decode: engine {d.url} ")
    assert text in message


def test_a_busy_decoders_own_answer_reaches_the_client(engines: Engines, proxies: Proxies) -> None:
    p, d = engines("prefill"), engines("decode", status=503)
    answer = proxies([p], [d]).complete()
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, "made to fail")
    assert len(d.requests) == 1


def test_no_decoder_is_there(engines: Engines, proxies: Proxies, free_port: int) -> None:
    p = engines("prefill")
    proxy = proxies([p], [f"http://127.0.0.1:{free_port}"])
    answer = proxy.complete()
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert f"decode: engine http://127.0.0.1:{free_port} is not reachable" in answer.json()["error"]["message"]
    health = proxy.http.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "down")
    models = proxy.http.get("/v1/models")
    assert models.status_code == 200, "the prefiller has the list too"


def test_models_when_nobody_is_there(proxies: Proxies, free_port: int) -> None:
    proxy = proxies([f"http://127.0.0.1:{free_port}"], [f"http://localhost:{free_port}"])
    answer = proxy.http.get("/v1/models")
    assert answer.status_code == 503
    assert "does not answer" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ({"break_after": 2}, "broke off its answer"),
        ({"hang_after": 2}, "sent nothing for 0.5 s"),
        ({"no_done": True}, "ended its answer without [DONE]"),
    ],
)
def test_a_stream_that_breaks_ends_with_an_error(
    engines: Engines, proxies: Proxies, how: dict[str, Any], text: str
) -> None:
    p, d = engines("prefill"), engines("decode", **how)
    proxy = proxies([p], [d], chunk_timeout=0.5)
    answer = proxy.complete(stream=True)
    assert answer.status_code == 200
    events = events_of(answer.text)
    tokens = 4 if "no_done" in how else 2
    assert [event["choices"][0]["text"] for event in events[:-1]] == [f" w{i}" for i in range(tokens)]
    error = events[-1]["error"]
    assert error["code"] == 502
    assert error["message"].startswith(f"decode: engine {d.url} ")
    assert text in error["message"]
    assert len(d.requests) == 1, "what the client saw cannot be made again"
    wait_until(
        lambda: proxy.metric("requests_total", endpoint="/v1/completions", outcome="upstream_error") == 1,
        10,
        "the count",
    )
    if "hang_after" in how:
        wait_until(lambda: d.aborted == 1, 10, "the engine to drop the request")


def test_the_openai_client_sees_a_broken_stream(engines: Engines, proxies: Proxies) -> None:
    openai = pytest.importorskip("openai")
    p, d = engines("prefill"), engines("decode", break_after=1)
    proxy = proxies([p], [d])
    with openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="k", max_retries=0) as client:
        stream = client.completions.create(model="fake", prompt="a", max_tokens=4, stream=True)
        with pytest.raises(openai.APIError, match="broke off its answer"):
            list(stream)


def test_a_first_event_refusal_passes_through(engines: Engines, proxies: Proxies) -> None:
    p, d = engines("prefill"), engines("decode", status=418)
    answer = proxies([p], [d]).complete(stream=True)
    assert answer.status_code == 418
    assert answer.json()["error"]["message"] == "made to fail"


def test_work_spreads_by_size(engines: Engines, proxies: Proxies) -> None:
    ps = [engines("prefill"), engines("prefill")]
    ds = [engines("decode"), engines("decode")]
    proxy = proxies(ps, ds)
    for _ in range(6):
        assert proxy.complete(max_tokens=1).status_code == 200
    assert [len(engine.requests) for engine in (*ps, *ds)] == [3, 3, 3, 3]
    pool = proxy.service.prefillers
    first, second = pool.engines
    with first.busy(10_000):
        chosen = [pool.pick(even_down=False) for _ in range(4)]
        assert chosen == [second] * 4
        with second.busy(100), second.busy(100):
            assert pool.pick(even_down=False) is second, "two small requests are less than a large one"
    assert (first.load, second.load, first.in_flight) == (0, 0, 0)


def test_health_checks_take_an_engine_out_and_back(engines: Engines, proxies: Proxies) -> None:
    p, d, other = engines("prefill"), engines("decode"), engines("decode")
    proxy = proxies([p], [d, other])
    page = proxy.http.get("/health")
    assert (page.status_code, page.json()["status"]) == (200, "ok")
    d.behaviour.healthy = False
    wait_until(lambda: len(proxy.service.decoders.up) == 1, 10, "the health check")
    for _ in range(3):
        assert proxy.complete().status_code == 200
    assert (len(d.requests), len(other.requests)) == (0, 3)
    told = proxy.http.get("/health").json()["decode"][0]
    assert (told["state"], told["last_error"]) == ("down", "its /health answered 503")
    assert proxy.metric("engine_up", role="decode", engine=d.url) == 0
    d.behaviour.healthy = True
    wait_until(lambda: len(proxy.service.decoders.up) == 2, 10, "the health check")
    assert proxy.metric("engine_up", role="decode", engine=d.url) == 1


def test_a_slow_prefiller_costs_its_deadline_only(engines: Engines, proxies: Proxies) -> None:
    p, d = engines("prefill", delay=30.0), engines("decode")
    began = time.monotonic()
    assert proxies([p], [d], prefill_timeout=0.3).complete().status_code == 200
    assert time.monotonic() - began < 10
    wait_until(lambda: p.aborted == 1, 10, "the prefiller to drop the request")
