"""Request bodies: what is taken from a client's, and what a prefiller and a decoder get.

Nothing here does input or output. A body is parsed once; every body that leaves the proxy is written anew, so nothing
that a client put in twice, or hid behind an odd encoding, can reach an engine unseen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvlink_proxy.errors import ProxyError

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"

UNTRUSTED_KEYS = ("kv_transfer_params", "ec_transfer_params")
"""Keys that steer memory transfers between engines. Only the proxy may set them."""

_CONTAINERS = ("vllm_xargs", "extra_args", "extra_body", "sampling_params")
"""Objects of a body whose keys an engine may merge into the request's own."""

_NOT_FOR_PREFILL = (
    "stream_options",
    "stream_interval",
    "stop",
    "logprobs",
    "top_logprobs",
    "logprob_token_ids",
    "return_token_ids",
    "return_tokens_as_token_ids",
    "best_of",
    "max_completion_tokens",
)
"""Settings of the output. The decoder makes the whole output, so the prefiller need not know them."""

PREFILL_PARAMS: Mapping[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
"""What a prefiller is told: keep this request's blocks for somebody else."""


@dataclass(frozen=True)
class Plan:
    """Whether a request is split between two engines.

    Attributes:
        split: True: a prefiller first, then a decoder. False: a decoder does all of it.
        reason: Why it is not split, as a label of metrics; empty when it is.
    """

    split: bool
    reason: str = ""


def parse(raw: bytes) -> dict[str, Any]:
    """Parse a client's body and take out what no client may set.

    Args:
        raw: The body.

    Returns:
        The request without :data:`UNTRUSTED_KEYS` and without a request id of the client's.

    Raises:
        ProxyError: It is not a JSON object (400).
    """
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ProxyError(400, f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise ProxyError(400, f"the body must be a JSON object, not {_json_type(body)}")
    strip(body)
    body.pop("request_id", None)  # an engine would key the hand-off's state by it
    return body


def strip(body: dict[str, Any]) -> None:
    """Remove :data:`UNTRUSTED_KEYS` from a request, in place.

    Only places that an engine merges into the request are searched: a tool's schema or a message may well hold a key of
    that name, and is nobody's instruction.

    Args:
        body: The parsed request.
    """
    pending = [body]
    while pending:
        current = pending.pop()
        for key in UNTRUSTED_KEYS:
            current.pop(key, None)
        pending.extend(inner for key in _CONTAINERS if isinstance(inner := current.get(key), dict))


def plan(endpoint: str, body: Mapping[str, Any]) -> Plan:
    """Decide whether a request can be split.

    Args:
        endpoint: :data:`COMPLETIONS` or :data:`CHAT`.
        body: The parsed request.

    Returns:
        The plan. Requests that an engine is going to refuse are not split, so that no prefill is spent on them.
    """
    if endpoint == COMPLETIONS:
        if body.get("prompt_embeds") is not None:
            return Plan(False, "prompt_embeds")
        if reason := _prompt_reason(body.get("prompt")):
            return Plan(False, reason)
    elif not isinstance(body.get("messages"), list) or not body["messages"]:
        return Plan(False, "no_prompt")
    if body.get("echo"):
        return Plan(False, "echo")  # the prompt's own logits are needed, which only the engine that computes it has
    if body.get("prompt_logprobs") is not None:
        return Plan(False, "prompt_logprobs")
    if body.get("use_beam_search"):
        return Plan(False, "beam_search")
    if body.get("best_of") not in (None, 1):
        return Plan(False, "best_of")
    if body.get("truncate_prompt_tokens") is not None:
        return Plan(False, "truncate_prompt")  # some versions cut at a place that depends on max_tokens
    for key in ("max_tokens", "max_completion_tokens"):
        value = body.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            return Plan(False, "max_tokens")
    return Plan(True)


def prefill_body(
    endpoint: str, body: Mapping[str, Any], params: Mapping[str, Any], *, keep_token: bool = False
) -> bytes:
    """Write the request for a prefiller: the same prompt, one token, blocks kept or sent on.

    Args:
        endpoint: :data:`COMPLETIONS` or :data:`CHAT`.
        body: The parsed request.
        params: The ``kv_transfer_params`` for the prefiller.
        keep_token: Its token is the answer's first, so it may be an end of sequence, and its prompt's ids are wanted.

    Returns:
        The body to send.
    """
    request = {key: value for key, value in body.items() if key not in _NOT_FOR_PREFILL}
    # min_tokens keeps an end-of-sequence token from ending the prefiller's request as "stopped", for which engines hand
    # nothing over; the decoder draws the first token again, from the request's own settings.
    request |= {"max_tokens": 1, "min_tokens": 1, "n": 1, "stream": False, "kv_transfer_params": params}
    if keep_token:
        request |= {"min_tokens": min(1, int(body.get("min_tokens") or 0)), "return_token_ids": True}
    if endpoint == CHAT:
        request["max_completion_tokens"] = 1
    return encode(request)


def decode_body(body: Mapping[str, Any], params: Mapping[str, Any] | None) -> bytes:
    """Write the request for a decoder: the client's own, with the hand-off where there is one.

    Args:
        body: The parsed request.
        params: The prefiller's ``kv_transfer_params``, or None for a plain request.

    Returns:
        The body to send.
    """
    return encode(body if params is None else {**body, "kv_transfer_params": params})


def clean_answer(raw: bytes) -> bytes:
    """Take the engines' transfer parameters out of an answer that is not streamed.

    Args:
        raw: The engine's body.

    Returns:
        The body for the client; anything that is not a JSON object comes back as it is.
    """
    if not any(key.encode() in raw for key in UNTRUSTED_KEYS):
        return raw
    try:
        answer = json.loads(raw)
    except (ValueError, RecursionError):
        return raw
    if not isinstance(answer, dict):
        return raw
    for key in UNTRUSTED_KEYS:
        answer.pop(key, None)
    return encode(answer)


def encode(value: Mapping[str, Any]) -> bytes:
    """Write JSON, in ASCII so that a lone surrogate from a client survives, without spaces.

    Args:
        value: The object.

    Returns:
        The bytes.
    """
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def _prompt_reason(prompt: object) -> str:
    if isinstance(prompt, str):
        return "" if prompt else "no_prompt"
    if not isinstance(prompt, list) or not prompt:
        return "no_prompt"
    if isinstance(prompt[0], int):
        return ""
    if len(prompt) > 1:
        return "batched_prompt"  # a hand-off belongs to one prompt, and an engine's answer names one hand-off
    return "" if prompt[0] and isinstance(prompt[0], str | list) else "no_prompt"


def _json_type(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
