"""Requests that work: both endpoints, streamed and not, and what each engine saw."""

from __future__ import annotations

from typing import Any

import pytest
from proxy_servers import Engines, Proxies, Setup, events_of, wait_until


def test_a_completion_is_split(pd: Setup) -> None:
    p, d, proxy = pd
    answer = proxy.complete(max_tokens=3)
    assert answer.status_code == 200
    body = answer.json()
    assert body["choices"][0]["text"] == " w0 w1 w2"
    assert body["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 3,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 3},
    }
    assert "kv_transfer_params" not in body
    assert "ec_transfer_params" not in body
    assert answer.headers["x-kvlink-route"] == "split"
    assert float(answer.headers["x-kvlink-prefill-ms"]) > 0
    (asked,), (decoded,) = p.requests, d.requests
    assert asked == {
        "model": "fake",
        "prompt": "a b c d",
        "max_tokens": 1,
        "min_tokens": 1,
        "n": 1,
        "stream": False,
        "kv_transfer_params": {
            "do_remote_decode": True,
            "do_remote_prefill": False,
            "remote_engine_id": None,
            "remote_block_ids": None,
            "remote_host": None,
            "remote_port": None,
        },
    }
    params = decoded.pop("kv_transfer_params")
    assert decoded == {"model": "fake", "prompt": "a b c d", "max_tokens": 3}
    assert params["do_remote_prefill"] is True
    assert params["remote_block_ids"] == [[1, 2, 3]]


def test_a_streamed_completion(pd: Setup) -> None:
    _, d, proxy = pd
    answer = proxy.complete(max_tokens=3, stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = events_of(answer.text)
    assert events[-1] == "[DONE]"
    assert "".join(event["choices"][0]["text"] for event in events[:-2]) == " w0 w1 w2"
    assert events[-2]["usage"]["prompt_tokens"] == 4
    assert events[-2]["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    assert d.requests[0]["stream_options"] == {"include_usage": True}
    assert proxy.metric("ttft_seconds_count", endpoint="/v1/completions", route="split") == 1


@pytest.mark.parametrize("stream", [False, True])
def test_chat(pd: Setup, stream: bool) -> None:
    p, d, proxy = pd
    answer = proxy.chat(max_completion_tokens=2, stream=stream)
    assert answer.status_code == 200
    if stream:
        events = events_of(answer.text)[:-1]
        assert "".join(event["choices"][0]["delta"]["content"] for event in events) == " w0 w1"
    else:
        assert answer.json()["choices"][0]["message"]["content"] == " w0 w1"
    assert (p.requests[0]["max_tokens"], p.requests[0]["max_completion_tokens"]) == (1, 1)
    assert d.requests[0]["max_completion_tokens"] == 2
    assert "max_tokens" not in d.requests[0]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [None, 1])
def test_max_tokens_absent_or_one(pd: Setup, stream: bool, max_tokens: int | None) -> None:
    _, d, proxy = pd
    body: dict[str, Any] = {"model": "fake", "prompt": "a", "stream": stream}
    if max_tokens:
        body["max_tokens"] = max_tokens
    answer = proxy.http.post("/v1/completions", json=body)
    wanted = "".join(f" w{i}" for i in range(max_tokens or 16))
    if stream:
        assert "".join(event["choices"][0]["text"] for event in events_of(answer.text)[:-1]) == wanted
    else:
        assert answer.json()["choices"][0]["text"] == wanted
        assert answer.json()["usage"]["completion_tokens"] == (max_tokens or 16)
    assert d.requests[0].get("max_tokens") == max_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_end_of_sequence_as_first_token(engines: Engines, proxies: Proxies, stream: bool) -> None:
    p, d = engines("prefill", eos_first=True), engines("decode", eos_first=True)
    answer = proxies([p], [d]).complete(stream=stream)
    choice = (events_of(answer.text)[0] if stream else answer.json())["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")
    assert d.requests[0]["kv_transfer_params"]["do_remote_prefill"] is True


def test_a_stop_on_the_first_token_is_the_decoders(pd: Setup) -> None:
    p, d, proxy = pd
    answer = proxy.complete(stop=["w0"])
    assert answer.json()["choices"][0]["text"] == ""
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    assert "stop" not in p.requests[0]
    assert d.requests[0]["stop"] == ["w0"]


def test_n_and_logprobs_come_from_the_decoder(pd: Setup) -> None:
    p, d, proxy = pd
    answer = proxy.complete(n=3, logprobs=2, max_tokens=2).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == [-0.12345678901234567] * 2
    assert answer["usage"]["completion_tokens"] == 6
    assert p.requests[0]["n"] == 1
    assert "logprobs" not in p.requests[0]
    assert (d.requests[0]["n"], d.requests[0]["logprobs"]) == (3, 2)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"prompt": ["a b", "c"]}, "batched_prompt"),
        ({"prompt": [[1, 2], [3]]}, "batched_prompt"),
        ({"echo": True}, "echo"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"use_beam_search": True, "n": 2}, "beam_search"),
    ],
)
def test_what_goes_to_the_decoder_alone(pd: Setup, extra: dict[str, Any], reason: str) -> None:
    p, d, proxy = pd
    answer = proxy.complete(**extra)
    assert answer.status_code == 200
    assert (answer.headers["x-kvlink-route"], answer.headers["x-kvlink-reason"]) == ("plain", reason)
    assert p.requests == []
    assert d.requests[0] == {"model": "fake", "prompt": "a b c d", "max_tokens": 4, **extra}
    if reason == "batched_prompt":
        assert [choice["index"] for choice in answer.json()["choices"]] == [0, 1]
    assert proxy.metric("routes_total", route="plain", reason=reason) == 1


@pytest.mark.parametrize("prompt", [["a b"], [7, 8], [[7, 8, 9]]])
def test_one_prompt_in_any_form_is_split(pd: Setup, prompt: Any) -> None:
    p, d, proxy = pd
    assert proxy.complete(prompt=prompt).headers["x-kvlink-route"] == "split"
    assert p.requests[0]["prompt"] == d.requests[0]["prompt"] == prompt


@pytest.mark.parametrize("how", [{"crlf": True}, {"keep_alive": True}])
def test_other_forms_of_streams(engines: Engines, proxies: Proxies, how: dict[str, Any]) -> None:
    p, d = engines("prefill"), engines("decode", **how)
    answer = proxies([p], [d]).complete(stream=True, max_tokens=2)
    assert [event["choices"][0]["text"] for event in events_of(answer.text)[:-1]] == [" w0", " w1"]


def test_refusals_of_the_engine_pass_through(pd: Setup) -> None:
    p, d, proxy = pd
    wrong_model = proxy.complete(model="other")
    assert wrong_model.status_code == 404
    assert wrong_model.json()["error"]["type"] == "NotFoundError"
    assert d.requests == []
    negative = proxy.complete(temperature=-1)
    assert (negative.status_code, negative.json()["error"]["message"]) == (400, "temperature must be non-negative")
    zero = proxy.complete(max_tokens=0)
    assert (zero.status_code, zero.json()["error"]["message"]) == (400, "max_tokens must be at least 1, got 0.")
    options = proxy.complete(stream_options={"include_usage": True})
    assert options.status_code == 400
    wait_until(
        lambda: proxy.metric("requests_total", endpoint="/v1/completions", outcome="client_error") == 4, 10, "the count"
    )
    assert len(p.requests) == 3
    assert proxy.service.prefillers.engines[0].cooling is False


def test_the_openai_client_takes_the_answers(pd: Setup) -> None:
    openai = pytest.importorskip("openai")
    _, _, proxy = pd
    with openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="k", max_retries=0) as client:
        whole = client.completions.create(model="fake", prompt="a b", max_tokens=2, logprobs=1)
        assert whole.choices[0].text == " w0 w1"
        assert whole.usage.prompt_tokens_details.cached_tokens == 1
        chat = client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "a"}], max_tokens=2)
        assert chat.choices[0].message.content == " w0 w1"
        pieces = client.chat.completions.create(
            model="fake",
            messages=[{"role": "user", "content": "a"}],
            max_tokens=2,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(pieces)
        assert "".join(chunk.choices[0].delta.content for chunk in chunks if chunk.choices) == " w0 w1"
        assert chunks[-1].usage.completion_tokens == 2
        assert [model.id for model in client.models.list()] == ["fake"]
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="other", prompt="a")


def test_other_paths_and_methods(pd: Setup) -> None:
    _, _, proxy = pd
    for method, path, status in (("GET", "/v1/embeddings", 404), ("GET", "/v1/completions", 405)):
        answer = proxy.http.request(method, path)
        assert answer.status_code == status
        assert answer.json()["error"]["code"] == status


def test_metrics_page(pd: Setup) -> None:
    p, d, proxy = pd
    proxy.complete()
    wait_until(lambda: proxy.service.active == 0, 10, "the request's end")
    page = proxy.http.get("/metrics").text
    for line in (
        'kvlink_proxy_requests_total{endpoint="/v1/completions",outcome="ok"} 1.0',
        'kvlink_proxy_routes_total{reason="",route="split"} 1.0',
        f'kvlink_proxy_engine_up{{engine="{p.url}",role="prefill"}} 1.0',
        f'kvlink_proxy_engine_in_flight{{engine="{d.url}",role="decode"}} 0.0',
        f'kvlink_proxy_prefill_seconds_count{{engine="{p.url}"}} 1.0',
        "kvlink_proxy_active_requests 0.0",
    ):
        assert line in page
