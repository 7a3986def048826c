"""What is taken from a request, and what each engine gets."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlink_proxy import headers, rewrite
from kvlink_proxy.errors import ProxyError
from kvlink_proxy.rewrite import CHAT, COMPLETIONS

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)
KEYS = st.sampled_from(
    ["model", "prompt", "messages", "max_tokens", "max_completion_tokens", "n", "stream", "stream_options", "stop",
     "logprobs", "echo", "min_tokens", "kv_transfer_params", "ec_transfer_params", "vllm_xargs", "extra_args",
     "extra_body", "request_id", "tools"]
)  # fmt: skip
FORGED = st.dictionaries(st.sampled_from(["kv_transfer_params", "vllm_xargs", "ok"]), JSON, max_size=3)
BODIES = st.dictionaries(KEYS, JSON | FORGED, max_size=10)


def steering(value: object, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of transfer parameters that an engine would take for instructions."""
    if not isinstance(value, dict):
        return []
    found = [(*path, key) for key in value if key in rewrite.UNTRUSTED_KEYS]
    for key in ("vllm_xargs", "extra_args", "extra_body", "sampling_params"):
        found += steering(value.get(key), (*path, key))
    return found


@given(BODIES)
def test_any_body_comes_out_without_the_clients_steering(body: dict[str, Any]) -> None:
    parsed = rewrite.parse(json.dumps(body).encode())
    assert steering(parsed) == []
    assert "request_id" not in parsed
    kept = {key for key in body if key not in (*rewrite.UNTRUSTED_KEYS, "request_id")}
    assert set(parsed) == kept
    for key in kept - {"vllm_xargs", "extra_args", "extra_body"}:
        assert parsed[key] == body[key]


@given(BODIES, st.sampled_from([COMPLETIONS, CHAT]))
def test_each_engine_gets_only_the_proxys_parameters(body: dict[str, Any], endpoint: str) -> None:
    parsed = rewrite.parse(json.dumps(body).encode())
    plan = rewrite.plan(endpoint, parsed)
    assert plan.split == (plan.reason == "")
    prefill = json.loads(rewrite.prefill_body(endpoint, parsed, rewrite.PREFILL_PARAMS))
    assert prefill["kv_transfer_params"] == rewrite.PREFILL_PARAMS
    assert (prefill["max_tokens"], prefill["min_tokens"], prefill["n"], prefill["stream"]) == (1, 1, 1, False)
    assert not {"stream_options", "stop", "logprobs", "best_of"} & set(prefill)
    assert ("max_completion_tokens" in prefill) == (endpoint == CHAT)
    for key in ("prompt", "messages", "tools"):
        assert prefill.get(key) == body.get(key)
    assert json.loads(rewrite.decode_body(parsed, None)) == parsed
    handed = json.loads(rewrite.decode_body(parsed, {"remote_host": "h"}))
    assert handed == {**parsed, "kv_transfer_params": {"remote_host": "h"}}


@given(st.binary(max_size=60))
def test_bytes_that_are_no_object_are_refused(raw: bytes) -> None:
    try:
        expected = json.loads(raw)
    except (ValueError, RecursionError):
        expected = None
    if isinstance(expected, dict):
        assert isinstance(rewrite.parse(raw), dict)
    else:
        with pytest.raises(ProxyError) as caught:
            rewrite.parse(raw)
        assert caught.value.status == 400


def test_odd_json_is_refused_or_kept() -> None:
    with pytest.raises(ProxyError, match="not JSON"):
        rewrite.parse(b"[" * 200_000)
    with pytest.raises(ProxyError, match="not JSON"):
        rewrite.parse(b'{"a": ' + b"9" * 10_000 + b"}")
    assert rewrite.encode(rewrite.parse(b'{"prompt": "\\ud800"}')) == b'{"prompt":"\\ud800"}'
    twice = b'{"kv_transfer_params": 1, "kv_transfer_params": {"remote_host": "x"}, "prompt": "a"}'
    assert rewrite.parse(twice) == {"prompt": "a"}
    assert math.isinf(rewrite.parse(b'{"temperature": Infinity}')["temperature"])


def test_a_tools_schema_keeps_its_keys() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"kv_transfer_params": {"type": "string"}}}}
    body = {"messages": [{"role": "user", "content": "kv_transfer_params"}], "tools": [tool]}
    assert rewrite.parse(json.dumps(body).encode()) == body


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"prompt": "a"}, ""),
        ({"prompt": ["a"]}, ""),
        ({"prompt": [1, 2]}, ""),
        ({"prompt": [[1, 2]]}, ""),
        ({"prompt": "a", "max_tokens": 1, "n": 3, "logprobs": 2, "stop": ["x"]}, ""),
        ({"prompt": "a", "max_tokens": None, "best_of": 1}, ""),
        ({"prompt": ["a", "b"]}, "batched_prompt"),
        ({"prompt": [[1], [2]]}, "batched_prompt"),
        ({"prompt": ""}, "no_prompt"),
        ({"prompt": []}, "no_prompt"),
        ({"prompt": [""]}, "no_prompt"),
        ({"prompt": [[]]}, "no_prompt"),
        ({"prompt": {"a": 1}}, "no_prompt"),
        ({}, "no_prompt"),
        ({"prompt_embeds": "AA"}, "prompt_embeds"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "prompt_logprobs": 0}, "prompt_logprobs"),
        ({"prompt": "a", "use_beam_search": True}, "beam_search"),
        ({"prompt": "a", "best_of": 4}, "best_of"),
        ({"prompt": "a", "truncate_prompt_tokens": -1}, "truncate_prompt"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": "5"}, "max_tokens"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens"),
    ],
)
def test_which_completions_are_split(body: dict[str, Any], reason: str) -> None:
    assert rewrite.plan(COMPLETIONS, body) == rewrite.Plan(reason == "", reason)


def test_which_chats_are_split() -> None:
    messages = [{"role": "user", "content": "a"}]
    assert rewrite.plan(CHAT, {"messages": messages}).split
    assert rewrite.plan(CHAT, {"messages": messages, "max_completion_tokens": 1}).split
    assert rewrite.plan(CHAT, {"messages": []}).reason == "no_prompt"
    assert rewrite.plan(CHAT, {"messages": messages, "max_completion_tokens": 0}).reason == "max_tokens"
    assert rewrite.plan(CHAT, {"messages": messages, "prompt_logprobs": 1}).reason == "prompt_logprobs"


def test_answers_lose_transfer_parameters_and_nothing_else() -> None:
    answer = {"choices": [{"text": '"kv_transfer_params"', "logprobs": {"x": [-0.12345678901234567]}}], "usage": {}}
    raw = json.dumps({**answer, "kv_transfer_params": None, "ec_transfer_params": {"a": 1}}).encode()
    assert json.loads(rewrite.clean_answer(raw)) == answer
    assert rewrite.clean_answer(b'{"choices": [ ]}') == b'{"choices": [ ]}'
    assert rewrite.clean_answer(b'not "kv_transfer_params"') == b'not "kv_transfer_params"'


def test_headers_go_on_but_not_the_ones_that_are_the_proxys() -> None:
    sent = [
        (b"authorization", b"Bearer k"), (b"x-session-id", b"s"), (b"traceparent", b"00-1"), (b"host", b"proxy"),
        (b"x-request-id", b"1"), (b"X-Data-Parallel-Rank", b"7"), (b"content-length", b"9"), (b"te", b"trailers"),
        (b"connection", b"keep-alive, X-Private"), (b"x-private", b"p"), (b"accept-encoding", b"gzip"),
    ]  # fmt: skip
    assert headers.to_engine(sent) == [
        (b"authorization", b"Bearer k"),
        (b"x-session-id", b"s"),
        (b"traceparent", b"00-1"),
        (b"accept-encoding", b"identity"),
        (b"content-type", b"application/json"),
    ]
    answered = [(b"Content-Type", b"a/b"), (b"Server", b"u"), (b"Content-Length", b"3"), (b"X-Request-Id", b"e")]
    assert headers.to_client(answered) == [("content-type", "a/b")]
