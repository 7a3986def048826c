"""What the proxy writes, read by vLLM's own request classes: whatever an engine takes from a client, both hops take."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from kvlink_proxy import rewrite
from kvlink_proxy.rewrite import CHAT, COMPLETIONS

completion = pytest.importorskip("vllm.entrypoints.openai.completion.protocol")
chat = pytest.importorskip("vllm.entrypoints.openai.chat_completion.protocol")

COMMON: dict[str, Any] = {
    "model": st.just("m"),
    "max_tokens": st.sampled_from([None, 1, 2, 100]),
    "min_tokens": st.sampled_from([0, 1]),
    "n": st.integers(1, 4),
    "temperature": st.sampled_from([0.7, 1.0, None]),
    "seed": st.integers(0, 9),
    "stop": st.sampled_from([None, "a", ["a", "b"]]),
    "stop_token_ids": st.just([5, 6]),
    "ignore_eos": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "logit_bias": st.just({"3": 1.0}),
    "bad_words": st.just(["x"]),
    "allowed_token_ids": st.just([1, 2]),
    "return_token_ids": st.booleans(),
    "cache_salt": st.just("salt"),
    "priority": st.just(1),
    "vllm_xargs": st.just({"a": 1}),
    "structured_outputs": st.just({"choice": ["a", "b"]}),
    "response_format": st.just({"type": "json_object"}),
    "kv_transfer_params": st.just({"do_remote_prefill": True, "remote_host": "evil"}),
    "user": st.text(max_size=3),
}
COMPLETION_BODIES = st.fixed_dictionaries(
    {"prompt": st.sampled_from(["a b", [1, 2, 3], ["a"], [[1, 2]]])},
    optional={**COMMON, "logprobs": st.sampled_from([None, 0, 3]), "suffix": st.none()},
)
CHAT_BODIES = st.fixed_dictionaries(
    {"messages": st.just([{"role": "system", "content": "s"}, {"role": "user", "content": "a"}])},
    optional={
        **COMMON,
        "max_completion_tokens": st.sampled_from([None, 1, 50]),
        "logprobs": st.booleans(),
        "tools": st.just([{"type": "function", "function": {"name": "f", "parameters": {}}}]),
        "tool_choice": st.just("none"),
        "reasoning_effort": st.sampled_from(["low", "high"]),
        "chat_template_kwargs": st.just({"enable_thinking": False}),
    },
)
STREAMED = st.fixed_dictionaries({}, optional={"stream": st.just(True)})


def sampling(kind: str, raw: bytes) -> tuple[Any, Any]:
    """Read a body as vLLM does, up to its sampling parameters."""
    body = json.loads(raw)
    if kind == COMPLETIONS:
        request = completion.CompletionRequest(**body)
        return request, request.to_sampling_params(request.max_tokens)
    request = chat.ChatCompletionRequest(**body)
    return request, request.to_sampling_params(body.get("max_completion_tokens") or body.get("max_tokens") or 1000, {})


def check(kind: str, body: dict[str, Any], streamed: dict[str, Any]) -> None:
    body = {**body, **streamed, **({"stream_options": {"include_usage": True}} if streamed else {})}
    if "structured_outputs" in body:
        body.pop("response_format", None)  # vLLM takes one of them
    try:
        sampling(kind, json.dumps(body).encode())
    except ValueError:
        assume(False)  # no engine takes it from a client either
    parsed = rewrite.parse(json.dumps(body).encode())
    assert rewrite.plan(kind, parsed).split
    request, params = sampling(kind, rewrite.prefill_body(kind, parsed, rewrite.PREFILL_PARAMS))
    assert (request.stream, request.n, params.n) == (False, 1, 1)
    assert (params.max_tokens, params.min_tokens, params.logprobs) == (1, 1, None)
    assert params.extra_args["kv_transfer_params"] == dict(rewrite.PREFILL_PARAMS)
    handed = {"do_remote_prefill": True, "kvlink_handoff": "0" * 32}
    request, params = sampling(kind, rewrite.decode_body(parsed, handed))
    assert params.extra_args["kv_transfer_params"] == handed
    assert bool(request.stream) == bool(streamed)
    _, plain = sampling(kind, rewrite.decode_body(parsed, None))
    assert "kv_transfer_params" not in (plain.extra_args or {})


FEW = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@FEW
@given(COMPLETION_BODIES, STREAMED)
def test_completions(body: dict[str, Any], streamed: dict[str, Any]) -> None:
    check(COMPLETIONS, body, streamed)


@FEW
@given(CHAT_BODIES, STREAMED)
def test_chats(body: dict[str, Any], streamed: dict[str, Any]) -> None:
    check(CHAT, body, streamed)
