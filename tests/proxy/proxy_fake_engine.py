"""A fake vLLM engine: real HTTP, vLLM's request and answer forms, made-up tokens, and faults on demand.

A "token" is a word; the answer to a prompt is "w0 w1 w2 ...". ``proxy_servers.FakeEngine`` runs it in a thread;
``python proxy_fake_engine.py --port N --role decode`` is a process, for a test that wants to kill it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import uvicorn
import zmq
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


@dataclass
class Behaviour:
    """What the engine does; a test may change it at any time."""

    healthy: bool = True
    delay: float = 0.0  # before an answer begins
    token_delay: float = 0.0
    hang_after: int | None = None  # tokens, then nothing more comes
    break_after: int | None = None  # tokens, then the connection is cut
    status: int | None = None  # answer this instead
    fail_only_with_params: bool = False  # status, break and error apply to hand-offs only
    first_event_error: bool = False
    no_params: bool = False
    eos_first: bool = False
    leak_params: bool = False  # put kv_transfer_params into streamed events
    text: str | None = None  # one token's text
    no_done: bool = False
    crlf: bool = False
    keep_alive: bool = False
    api_key: str | None = None
    model: str = "fake"
    # Of a prefiller with LMCache: where it reports, what ("ready", "failed", "never" or nothing), for how many ranks.
    notify: str | None = None
    report: str | None = "ready"
    ranks: int = 1
    names_rank: bool = True


@dataclass
class Engine:
    role: str
    behaviour: Behaviour = field(default_factory=Behaviour)
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)
    aborted: int = 0
    finished: int = 0
    health_checks: int = 0


def _prompt_tokens(body: dict[str, Any]) -> int:
    if "messages" in body:
        return sum(len(str(message.get("content") or "").split()) + 1 for message in body["messages"])
    prompt = body["prompt"]
    prompts = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
    return sum(len(p.split()) if isinstance(p, str) else len(p) for p in prompts)


def _error(status: int, message: str, kind: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


def _validate(body: dict[str, Any], chat: bool) -> str | None:
    if chat and not isinstance(body.get("messages"), list):
        return "messages: field required"
    if not chat and not body.get("prompt") and not body.get("prompt_embeds"):
        return "Either prompt or prompt_embeds must be provided and non-empty."
    for key in ("max_tokens", "max_completion_tokens"):
        value = body.get(key)
        if value is not None and (not isinstance(value, int) or value < (0 if body.get("echo") else 1)):
            return f"{key} must be at least 1, got {value}."
    if body.get("stream_options") and not body.get("stream"):
        return "Stream options can only be defined when `stream=True`."
    if body.get("min_tokens", 0) > (body.get("max_tokens") or 16):
        return "min_tokens must be less than or equal to max_tokens"
    if body.get("logprob_token_ids") and body.get("logprobs") is None:
        return "when using `logprob_token_ids`, `logprobs` must be set."
    if body.get("temperature", 0) < 0:
        return "temperature must be non-negative"
    return None


def make_app(engine: Engine) -> Starlette:
    async def generate(request: Request) -> Response:
        chat = request.url.path.endswith("chat/completions")
        raw = await request.body()
        body = json.loads(raw)
        engine.requests.append(body)
        engine.raw.append(raw)
        engine.headers.append(dict(request.headers))
        how = engine.behaviour
        params = body.get("kv_transfer_params")
        faulty = not how.fail_only_with_params or params is not None
        if how.api_key and request.headers.get("authorization") != f"Bearer {how.api_key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        if body.get("model", how.model) != how.model:
            return _error(404, f"The model `{body['model']}` does not exist.", "NotFoundError")
        if how.status and faulty:
            return _error(how.status, "made to fail", "InternalServerError")
        if problem := _validate(body, chat):
            return _error(400, problem, "BadRequestError")
        if not await _unless_gone(request, how.delay):
            engine.aborted += 1
            return Response(status_code=499)
        answer = Answer(engine, body, chat, request.headers.get("x-request-id", uuid.uuid4().hex), faulty)
        if body.get("stream"):
            return StreamingResponse(answer.events(), media_type="text/event-stream")
        for _ in range(len(answer.words)):
            if not await _unless_gone(request, how.token_delay):
                engine.aborted += 1
                return Response(status_code=499)
        engine.finished += 1
        if how.notify and (spec := (params or {}).get("disagg_spec")):
            report(how, spec["req_id"])
        return JSONResponse(answer.whole())

    async def health(_: Request) -> Response:
        engine.health_checks += 1
        return Response(status_code=200 if engine.behaviour.healthy else 503)

    async def models(request: Request) -> Response:
        key = engine.behaviour.api_key
        if key and request.headers.get("authorization") != f"Bearer {key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        data = [{"id": engine.behaviour.model, "object": "model", "created": 1, "owned_by": "vllm"}]
        return JSONResponse({"object": "list", "data": data})

    return Starlette(
        routes=[
            Route("/v1/completions", generate, methods=["POST"]),
            Route("/v1/chat/completions", generate, methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
        ]
    )


def report(how: Behaviour, request_id: str) -> None:
    """Say what an LMCache prefiller says when its KV is at the decoder, or is not going to be."""
    context = zmq.Context()
    try:
        with context.socket(zmq.PUSH) as push:
            push.connect(how.notify or "")
            for rank in range(how.ranks if how.report else 0):
                place = {"rank": rank, "world_size": how.ranks} if how.names_rank else {}
                message: dict[str, Any] = {"type": "ProxyNotif", "req_id": request_id, **place}
                if how.report != "ready":
                    failure = {"reason": "no room for 24 chunks", "never": how.report == "never"}
                    message |= {"type": "KVLinkFailureNotif", **failure}
                push.send(msgspec.msgpack.encode(message))
    finally:
        context.term()


async def _unless_gone(request: Request, seconds: float) -> bool:
    """Wait, unless the client goes away: as vLLM's with_cancellation does it."""
    if seconds <= 0:
        return True

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    waiter = asyncio.ensure_future(gone())
    done, _ = await asyncio.wait({waiter}, timeout=seconds)
    waiter.cancel()
    return not done


class Answer:
    def __init__(self, engine: Engine, body: dict[str, Any], chat: bool, request_id: str, faulty: bool) -> None:
        self.engine, self.body, self.chat, self.faulty = engine, body, chat, faulty
        how = engine.behaviour
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{request_id}"
        self.object = "chat.completion" if chat else "text_completion"
        most = body.get("max_completion_tokens") or body.get("max_tokens") or 16
        eos = how.eos_first and not body.get("min_tokens")
        self.words = [""] if eos else [how.text or f" w{i}" for i in range(most)]
        self.finish = "stop" if eos else "length"
        stop = body.get("stop")
        if not eos and stop is not None:
            for at, word in enumerate(self.words):
                if word.strip() in ([stop] if isinstance(stop, str) else stop):
                    self.words, self.finish = self.words[:at], "stop"
                    break
        self.choices = body.get("n") or 1
        prompt = body.get("prompt")
        if not chat and isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            self.choices *= len(prompt)
        params = body.get("kv_transfer_params") or {}
        prompt_tokens = _prompt_tokens(body)
        made = max(1, len(self.words)) * self.choices
        self.usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": made,
            "total_tokens": prompt_tokens + made,
            "prompt_tokens_details": {"cached_tokens": prompt_tokens - 1} if params.get("do_remote_prefill") else None,
        }
        self.params = None
        if params.get("ret_first_tok"):
            self.params = {"first_tok": 1000}
        if params.get("do_remote_decode") and not how.no_params:
            self.params = {
                "do_remote_prefill": True,
                "do_remote_decode": False,
                "remote_engine_id": f"engine-{id(engine)}",
                "remote_block_ids": [[1, 2, 3]],
                "remote_request_id": self.id,
                "remote_host": "127.0.0.1",
                "remote_port": 5600,
            }

    def _head(self, streamed: bool) -> dict[str, Any]:
        kind = self.object + (".chunk" if streamed and self.chat else "")
        return {"id": self.id, "object": kind, "created": int(time.time()), "model": self.engine.behaviour.model}

    def whole(self) -> dict[str, Any]:
        text = "".join(self.words)
        common = {"finish_reason": self.finish, "stop_reason": None}
        choices: list[dict[str, Any]] = []
        for index in range(self.choices):
            choice: dict[str, Any] = {"index": index, **common, "logprobs": self._logprobs()}
            if self.chat:
                choice["message"] = {"role": "assistant", "content": text}
            else:
                choice["text"] = text
                if self.body.get("return_token_ids"):
                    choice |= {"prompt_token_ids": list(range(self.usage["prompt_tokens"])), "token_ids": [1000]}
            choices.append(choice)
        # vLLM 0.32 writes both keys into every answer, null where there is nothing.
        return {
            **self._head(False),
            "choices": choices,
            "usage": self.usage,
            "kv_transfer_params": self.params,
            "ec_transfer_params": None,
        }

    def _logprobs(self) -> dict[str, Any] | None:
        if self.body.get("logprobs") in (None, False):
            return None
        if self.chat:
            return {"content": [{"token": w, "logprob": -0.1, "bytes": None, "top_logprobs": []} for w in self.words]}
        return {
            "tokens": self.words,
            "token_logprobs": [-0.12345678901234567] * len(self.words),
            "text_offset": list(range(len(self.words))),
            "top_logprobs": None,
        }

    async def events(self) -> AsyncIterator[bytes]:
        how, end = self.engine.behaviour, b"\r\n\r\n" if self.engine.behaviour.crlf else b"\n\n"

        def event(value: dict[str, Any]) -> bytes:
            return b"data: " + json.dumps(value, ensure_ascii=False).encode() + end

        try:
            if how.first_event_error and self.faulty:
                info = {"message": "KV load failed", "type": "InternalServerError", "param": None, "code": 500}
                yield event({"error": info})
                yield b"data: [DONE]" + end
                return
            if how.keep_alive:
                yield b": keep-alive" + end
            for at, word in enumerate(self.words):
                if self.faulty and how.hang_after == at:
                    await asyncio.sleep(3600)
                if self.faulty and how.break_after == at:
                    raise ConnectionAbortedError("made to break")
                last = at == len(self.words) - 1
                for index in range(self.choices):
                    choice: dict[str, Any] = {"index": index, "finish_reason": self.finish if last else None}
                    choice |= {"delta": {"content": word}} if self.chat else {"text": word, "logprobs": None}
                    extra = {"kv_transfer_params": {"remote_host": "secret"}} if how.leak_params else {}
                    yield event({**self._head(True), "choices": [choice], **extra})
                await asyncio.sleep(how.token_delay)
            if (self.body.get("stream_options") or {}).get("include_usage"):
                yield event({**self._head(True), "choices": [], "usage": self.usage})
            if not how.no_done:
                yield b"data: [DONE]" + end
            self.engine.finished += 1
        except (asyncio.CancelledError, GeneratorExit):
            self.engine.aborted += 1
            raise


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--role", default="decode")
    parser.add_argument("--token-delay", type=float, default=0.0)
    parser.add_argument("--delay", type=float, default=0.0)
    arguments = parser.parse_args()
    state = Engine(arguments.role, Behaviour(token_delay=arguments.token_delay, delay=arguments.delay))
    uvicorn.run(make_app(state), host="127.0.0.1", port=arguments.port, log_level="warning")
