"""HTTP with servers under test: whole answers with their headers, streams, and clients that go away."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tools.cluster import SERVED_NAME, Server

T = TypeVar("T")
# Far above what a loaded machine needs; it only bounds a hang.
SECONDS = 180.0


def eventually(what: str, probe: Callable[[], T], seconds: float = 60.0) -> T:
    """Waits until a probe returns something true, and returns that."""
    deadline = time.monotonic() + seconds
    while not (value := probe()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.02)
    return value


@dataclass
class Choice:
    text: str = ""
    ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    logprobs: Any = None


@dataclass
class Answer:
    """A whole answer; of a stream, what its events add up to."""

    status: int
    headers: dict[str, str]
    choices: list[Choice] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    raw: str = ""
    events: int = 0
    params: dict[str, Any] | None = None
    complete: bool = False

    @property
    def ids(self) -> list[int]:
        return self.choices[0].ids

    @property
    def route(self) -> str | None:
        return self.headers.get("x-kvlink-route")

    def take(self, event: dict[str, Any]) -> None:
        self.usage = event.get("usage") or self.usage
        self.params = event.get("kv_transfer_params") or self.params
        for item in event.get("choices", []):
            while len(self.choices) <= item["index"]:
                self.choices.append(Choice())
            choice = self.choices[item["index"]]
            message = item.get("message") or item.get("delta") or item
            choice.text += message.get("text") or message.get("content") or ""
            choice.ids += item.get("token_ids") or []
            choice.finish_reason = item.get("finish_reason") or choice.finish_reason
            choice.logprobs = item.get("logprobs") or choice.logprobs


class Exchange:
    """One request: sent at once, read when wanted, and dropped by ``close``, as a client does that goes away."""

    def __init__(self, server: Server, body: dict[str, Any], *, path: str = "/v1/completions") -> None:
        self.answer: Answer | None = None
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
        try:
            content = json.dumps({"model": SERVED_NAME, **body}).encode()
            self._connection.request("POST", path, content, {"Content-Type": "application/json"})
        except BaseException:
            self._connection.close()
            raise

    def events(self) -> Iterator[dict[str, Any]]:
        """Waits for the headers, then yields the events of a stream (or the one object of another answer)."""
        response = self._connection.getresponse()
        answer = self.answer = Answer(response.status, {k.lower(): v for k, v in response.getheaders()})
        if not answer.headers.get("content-type", "").startswith("text/event-stream"):
            answer.raw = response.read().decode()
            answer.complete = True
            if response.status == 200:
                answer.take(json.loads(answer.raw))
                yield json.loads(answer.raw)
            return
        for line in response:
            answer.raw += line.decode()
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                answer.complete = True
                response.read()
                return
            answer.events += 1
            answer.take(json.loads(data))
            yield json.loads(data)

    def read(self) -> Answer:
        """Reads to the end."""
        with self:
            for _ in self.events():
                pass
        assert self.answer is not None
        return self.answer

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Exchange:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def body_of(prompt: str | list[int], *, stream: bool = False, **extra: Any) -> dict[str, Any]:
    """A greedy completion's body; ``extra`` overrides."""
    body = {"prompt": prompt, "max_tokens": 16, "temperature": 0, "return_token_ids": True, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    return {**body, **extra}


def ask(server: Server, prompt: str | list[int], *, stream: bool = False, **extra: Any) -> Answer:
    """Asks for a greedy completion that must succeed."""
    answer = Exchange(server, body_of(prompt, stream=stream, **extra)).read()
    assert answer.status == 200 and answer.complete, f"{server.name} answered {answer.status}: {answer.raw[:2000]}"
    return answer


def chat(server: Server, content: str, *, stream: bool = False, **extra: Any) -> Answer:
    """Asks for a greedy chat answer that must succeed."""
    body = body_of("", stream=stream, messages=[{"role": "user", "content": content}], **extra)
    del body["prompt"]
    answer = Exchange(server, body, path="/v1/chat/completions").read()
    assert answer.status == 200 and answer.complete, f"{server.name} answered {answer.status}: {answer.raw[:2000]}"
    return answer


def hand_off(prefill: Server, prompt: list[int]) -> dict[str, Any]:
    """What a proxy does first: the prefiller computes the prompt and offers it."""
    marks = {"do_remote_decode": True, "do_remote_prefill": False}
    answer = ask(prefill, prompt, max_tokens=1, kv_transfer_params=marks)
    assert answer.params is not None, f"no hand-off in {answer.raw[:2000]}"
    return answer.params
