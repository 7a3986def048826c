"""A first token that comes from the prefiller, and the decoder's output joined to it.

The client has the prefiller's token as soon as it exists; the decoder continues behind it, with that token as part of
its prompt. This holds only where the output does not depend on knowing which token was the first: no penalties, log
probabilities, stop strings or structure. Everything else is left to the decoder, whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kvlink_proxy.rewrite import COMPLETIONS, encode
from kvlink_proxy.upstream import Handoff

_SAMPLING = {"max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "stop_token_ids", "ignore_eos"}
_FORM = {"stream", "stream_options", "skip_special_tokens", "spaces_between_special_tokens", "add_special_tokens"}
_SAFE = _SAMPLING | _FORM | {"model", "prompt", "user", "priority"}
_DEFAULT_MAX_TOKENS = 16  # of the completions endpoint


def possible(endpoint: str, body: Mapping[str, Any]) -> bool:
    """Whether a request's first token may come from the prefiller.

    Args:
        endpoint: The path.
        body: The parsed request.
    """
    if endpoint != COMPLETIONS or any(
        value is not None and key not in _SAFE and (key, value) != ("n", 1) for key, value in body.items()
    ):
        return False
    if type(body.get("min_tokens") or 0) is not int:
        return False  # the engine's to refuse
    options = body.get("stream_options")
    if options is not None and (not isinstance(options, dict) or set(options) - {"include_usage"}):
        return False
    prompt = body.get("prompt")
    single = isinstance(prompt, str) or (isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int))
    return single and int(body.get("max_tokens") or _DEFAULT_MAX_TOKENS) > 1


def opening(body: Mapping[str, Any], handoff: Handoff) -> Opening | None:
    """Take the first token out of a prefiller's answer.

    Args:
        body: The client's request.
        handoff: The prefiller's answer.

    Returns:
        The opening; None where the answer does not name its tokens, or ends within a character: then the decoder makes
        the first token too.
    """
    try:
        choice = handoff.answer["choices"][0]
        text, reason = choice["text"], choice["finish_reason"]
        tokens = choice.get("prompt_token_ids") or body["prompt"]
        first = handoff.params.get("first_tok")
        if first is None:
            first = choice["token_ids"][0]
    except (KeyError, IndexError, TypeError):
        return None
    complete = reason == "stop"
    whole = isinstance(text, str) and "\ufffd" not in text and (bool(text) or complete)
    if not whole or not isinstance(first, int) or not isinstance(tokens, list):
        return None
    return Opening(handoff.answer, text, [*tokens, first], complete)


class Opening:
    """The beginning of an answer.

    Attributes:
        complete: The token ended the output: there is nothing left to decode.
    """

    def __init__(self, answer: Mapping[str, Any], text: str, tokens: list[int], complete: bool) -> None:
        self.complete = complete
        self._answer = answer
        self._text = text
        self._tokens = tokens
        self._include_usage = False

    def remaining(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Write what the decoder has left to do.

        Args:
            body: The client's request.

        Returns:
            The request that continues behind the token.
        """
        self._include_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        rest = {**body, "prompt": self._tokens, "max_tokens": (body.get("max_tokens") or _DEFAULT_MAX_TOKENS) - 1}
        rest.pop("add_special_tokens", None)  # the prompt is tokens now, with those that the text got
        if body.get("min_tokens"):
            rest["min_tokens"] = max(0, body["min_tokens"] - 1)
        return rest

    def event(self) -> bytes:
        """Returns the stream's first event."""
        reason = "stop" if self.complete else None
        choice = {"index": 0, "text": self._text, "logprobs": None, "finish_reason": reason, "stop_reason": None}
        return self._event({"choices": [choice]} | ({"usage": None} if self._include_usage else {}))

    def ending(self, streamed: bool) -> bytes:
        """Returns what ends an answer that the token completed.

        Args:
            streamed: As events; otherwise the whole body.
        """
        usage = self._answer.get("usage")
        if not streamed:
            choice = {"index": 0, "text": self._text, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
            return encode({**self._head(), "choices": [choice], "usage": usage})
        last = self._event({"choices": [], "usage": usage}) if self._include_usage else b""
        return last + b"data: [DONE]\n\n"

    def rest(self, events: bytes) -> bytes:
        """Make the decoder's events continue this answer: its id, and usage that counts the token as output.

        Args:
            events: Whole events.

        Returns:
            Them, for the client.
        """
        return b"\n".join(self._line(line) for line in events.split(b"\n"))

    def join(self, body: bytes) -> bytes:
        """Put the token before a decoder's answer that is not streamed.

        Args:
            body: The decoder's answer.

        Returns:
            The whole answer.
        """
        answer = json.loads(body)
        choice = answer["choices"][0]
        choice["text"] = self._text + choice["text"]
        return encode({**answer, **self._head(), "usage": _counted(answer.get("usage"))})

    def _line(self, line: bytes) -> bytes:
        if not line.startswith(b"data: {"):
            return line
        event = json.loads(line[6:])
        if "error" in event:
            return line
        return b"data: " + encode({**event, **self._head()} | _usage_of(event))

    def _head(self) -> dict[str, Any]:
        return {key: self._answer.get(key) for key in ("id", "object", "created", "model")}

    def _event(self, value: Mapping[str, Any]) -> bytes:
        return b"data: " + encode({**self._head(), **value}) + b"\n\n"


def _usage_of(event: Mapping[str, Any]) -> dict[str, Any]:
    return {"usage": _counted(event["usage"])} if "usage" in event else {}


def _counted(usage: Any) -> Any:
    """The decoder's usage, with the prefiller's token as output instead of prompt."""
    if not isinstance(usage, dict):
        return usage
    prompt, output = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not isinstance(prompt, int) or not isinstance(output, int):
        return usage
    return {**usage, "prompt_tokens": prompt - 1, "completion_tokens": output + 1}
