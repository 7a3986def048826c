"""Engines that fail: who is asked next, with what, and what the client is told."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from proxy_servers import Engines, Proxies, events_of, wait_until

from kvlink_proxy.config import ProxyConfig
from kvlink_proxy.engines import Engine, watch
from kvlink_proxy.metrics import Metrics


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


def test_an_engine_that_cannot_even_be_asked_is_down(engines: Engines, proxies: Proxies) -> None:
    """httpx.InvalidURL is not among its HTTP errors."""
    d = engines("decode")
    proxy = proxies(["http://\u00ad:80"], [d])
    assert proxy.service.prefillers.engines[0].state == "down"
    assert "could not be asked" in str(proxy.service.prefillers.engines[0].last_error)
    assert proxy.complete().headers["x-kvlink-route"] == "recompute"


def test_no_error_ends_a_health_check() -> None:
    errors = iter([httpx.InvalidURL("odd"), RuntimeError("odder")])

    def answer(request: httpx.Request) -> httpx.Response:
        for error in errors:
            raise error
        return httpx.Response(200)

    async def until_up() -> None:
        config = ProxyConfig(("http://a:1",), ("http://b:1",), health_interval=0.01)
        engine = Engine("decode", "http://a:1", Metrics(), 1.0)
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
            watcher = asyncio.ensure_future(watch(engine, client, config))
            while engine.state != "up":
                done, _ = await asyncio.wait([watcher], timeout=0.01)
                assert not done
            watcher.cancel()
            await asyncio.wait([watcher])

    asyncio.run(asyncio.wait_for(until_up(), 20))
