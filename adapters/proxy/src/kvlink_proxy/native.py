"""One request's way over a prefiller and a decoder, and the native flow.

The decoder recomputes only the prompt's last token, so everything about the output (its first token, log
probabilities, ``n``, stops, usage) comes from one engine, and from the client's own settings.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx

from kvlink_proxy import rewrite
from kvlink_proxy.config import ProxyConfig
from kvlink_proxy.engines import Engine, EnginePool
from kvlink_proxy.errors import HopError, PassThrough, error_body
from kvlink_proxy.exchange import ClientGone, Exchange
from kvlink_proxy.first_token import Opening
from kvlink_proxy.headers import RawHeaders, to_client
from kvlink_proxy.metrics import Metrics
from kvlink_proxy.sse import EventFilter, error_event, first_error
from kvlink_proxy.upstream import Handoff, Stream, ask_decoder, ask_prefiller

logger = logging.getLogger(__name__)


@dataclass
class Job:
    """One client's request.

    Attributes:
        endpoint: Its path.
        body: It, parsed.
        headers: Headers for the engines.
        weight: Its size in bytes.
        exchange: Where the answer goes.
        route: How it is served: "split", "plain", or "recompute".
        opening: What the client has of the output already, and how the rest joins it; None when the decoder makes all.
        began: ``time.monotonic()`` of its arrival.
    """

    endpoint: str
    body: dict[str, Any]
    headers: RawHeaders
    weight: int
    exchange: Exchange
    route: str = "plain"
    opening: Opening | None = None
    began: float = field(default_factory=time.monotonic)

    def hop_headers(self, suffix: str) -> RawHeaders:
        """Headers for one attempt at one engine; each has an id of its own, since engines key state by it.

        Args:
            suffix: What tells the attempts of this request apart.

        Returns:
            Names and values.
        """
        return [*self.headers, (b"x-request-id", f"{self.exchange.id}-{suffix}".encode())]


class Flow:
    """Serves requests by prefilling on one engine and decoding on another; how the KV gets there is the subclass's.

    Attributes:
        prefillers: The prefill engines.
        decoders: The decode engines.
    """

    def __init__(
        self,
        config: ProxyConfig,
        client: httpx.AsyncClient,
        prefillers: EnginePool,
        decoders: EnginePool,
        metrics: Metrics,
    ) -> None:
        self.prefillers = prefillers
        self.decoders = decoders
        self._config = config
        self._client = client
        self._metrics = metrics

    async def serve(self, job: Job) -> str:
        """Serve one request.

        Args:
            job: The request.

        Returns:
            The outcome, as a label of metrics.

        Raises:
            ProxyError: No engine could serve it; nothing was sent yet.
            PassThrough: An engine refused it; nothing was sent yet.
            ClientGone: The client does not take its answer.
        """
        raise NotImplementedError

    def _prefilled(self, job: Job, result: Handoff | HopError) -> str:
        """Note how the prefill ended.

        Returns:
            Why the decoder computes the prompt; empty where it need not.

        Raises:
            ProxyError: It failed, and that is the request's end.
        """
        if isinstance(result, Handoff):
            job.route = "split"
            job.exchange.notes["x-kvlink-prefill-ms"] = f"{result.seconds * 1e3:.1f}"
            return ""
        if self._config.on_prefill_failure == "fail":
            raise result.to_client()
        job.route = "recompute"
        logger.warning("request %s: the decoder computes the prompt: %s", job.exchange.id, result)
        return result.kind

    async def _prefill(self, job: Job, ask: Callable[[Engine, str], Awaitable[Handoff]]) -> Handoff | HopError:
        """Try one prefiller after another.

        Args:
            job: The request.
            ask: Has an engine prefill; gets the engine and a suffix for the attempt's id.
        """
        config = self._config
        tried: list[Engine] = []
        last = HopError("prefill", "pool", 0.0, "unavailable", "has none that is up")
        for attempt in range(config.max_attempts):
            engine = self.prefillers.pick(tried, even_down=config.on_prefill_failure == "fail")
            if engine is None:
                break
            if tried:
                self._metrics.retries.labels("prefill", last.kind).inc()
            tried.append(engine)
            try:
                with engine.busy(job.weight):
                    handoff = await ask(engine, f"p{attempt}")
            except HopError as error:
                last = error
                if error.kind == "kv":
                    break  # it computed the prompt; a second one would meet the same decoder
                engine.failed(error)
                continue
            self._metrics.prefill.labels(engine.url).observe(handoff.seconds)
            return handoff
        return last

    async def _decode(self, job: Job, handoff: Handoff | None, reason: str, first: Engine | None = None) -> str:
        """Try one decoder after another.

        Args:
            job: The request.
            handoff: What a prefiller handed over for whichever decoder asks.
            reason: Why the prompt is not split, or is computed by the decoder.
            first: The decoder that the KV was sent to.
        """
        config = self._config
        params = handoff.params if handoff else None
        tried: list[Engine] = []
        last = HopError("decode", "pool", 0.0, "unavailable", "has none that is up")
        again: Engine | None = None  # the same engine may be asked once more, where there is no other
        for attempt in range(config.max_attempts):
            engine = first if first and not tried else self.decoders.pick(tried, even_down=True) or again
            if engine is None:
                break
            if tried:
                self._metrics.retries.labels("decode", last.kind).inc()
                logger.warning("request %s: decoding again on %s: %s", job.exchange.id, engine.url, last)
            again = None
            first_time = engine not in tried
            tried.append(engine)
            try:
                return await self._decode_on(job, engine, params, reason, f"d{attempt}")
            except HopError as error:
                engine.failed(error)
                last = error
                had_params = params is not None
                if engine is first and job.route == "split":
                    if config.on_prefill_failure == "fail":
                        break
                    job.route, reason = "recompute", "decode_failed"
                if handoff and had_params and not self._lease_stands(handoff, error):
                    if config.on_prefill_failure == "fail":
                        break
                    params, job.route, reason = None, "recompute", "decode_failed"
                spoiled_handoff = had_params and error.kind in ("status", "stream") and error.status not in (429, 503)
                if first_time and (error.kind == "transport" or spoiled_handoff):
                    again = engine
        raise last.to_client()

    def _lease_stands(self, handoff: Handoff, error: HopError) -> bool:
        """Whether the hand-off may be offered again: only if the failed decoder never answered, and not for long.

        A decoder that answers with an error has told the prefiller to let go, as vLLM's rejection path does.
        """
        return error.kind in ("connect", "transport") and time.monotonic() - handoff.at < self._config.lease_seconds

    async def _decode_on(
        self, job: Job, engine: Engine, params: Mapping[str, Any] | None, reason: str, suffix: str
    ) -> str:
        config = self._config
        body = rewrite.decode_body(job.body, params)
        timeout = config.first_byte_timeout if job.body.get("stream") else config.answer_timeout
        with engine.busy(job.weight):
            async with ask_decoder(
                self._client, engine, job.endpoint, body, job.hop_headers(suffix), timeout
            ) as answer:
                job.exchange.notes["x-kvlink-route"] = job.route
                if reason:
                    job.exchange.notes["x-kvlink-reason"] = reason
                if not answer.events:
                    headers = to_client(answer.response.headers.raw)
                    self._metrics.routes.labels(job.route, reason).inc()
                    body = rewrite.clean_answer(answer.first)
                    await self._sent(job.exchange.whole(200, headers, job.opening.join(body) if job.opening else body))
                    return "ok"
                return await self._relay(job, engine, answer, reason)

    async def _sent(self, sending: Awaitable[None]) -> None:
        """Wait for the end of an answer to be taken, as long as a client may take for a piece."""
        with anyio.move_on_after(self._config.client_timeout) as scope:
            await sending
        if scope.cancelled_caught:
            raise ClientGone

    async def _relay(self, job: Job, engine: Engine, answer: Stream, reason: str) -> str:
        """Pass a stream of events on. Up to its first bytes a failure is the attempt's, after them the client's."""
        events = EventFilter()
        rest = job.opening.rest if job.opening else bytes
        data = rest(events.feed(answer.first))
        if not answer.first:
            raise HopError("decode", engine.url, time.monotonic() - answer.began, "transport", "sent an empty stream")
        if error := first_error(answer.first):
            _refuse(engine, answer, error)
        exchange, config = job.exchange, self._config
        problem = ""
        turn = "engine"
        scope = anyio.CancelScope()
        try:
            with scope:
                scope.deadline = anyio.current_time() + config.client_timeout
                turn = "client"
                if not exchange.started:
                    await exchange.start(200, to_client(answer.response.headers.raw))
                    self._metrics.first_byte.labels(job.endpoint, job.route).observe(time.monotonic() - job.began)
                self._metrics.routes.labels(job.route, reason).inc()
                if data:
                    await exchange.write(data)
                scope.deadline = anyio.current_time() + config.chunk_timeout
                turn = "engine"
                async for chunk in answer.rest:
                    if data := rest(events.feed(chunk)):
                        scope.deadline = anyio.current_time() + config.client_timeout
                        turn = "client"
                        await exchange.write(data)
                        turn = "engine"
                    scope.deadline = anyio.current_time() + config.chunk_timeout
        except (httpx.HTTPError, ValueError) as error:
            problem = f"broke off its answer: {str(error) or type(error).__name__}"
        if scope.cancelled_caught:
            if turn == "client":
                raise ClientGone
            problem = f"sent nothing for {config.chunk_timeout:g} s"
        elif not problem and not events.done:
            problem = "ended its answer without [DONE]"
        if not problem:
            await self._sent(exchange.finish())
            return "ok"
        broken = HopError("decode", engine.url, time.monotonic() - answer.began, "transport", problem)
        engine.failed(broken)
        logger.warning("request %s: %s", exchange.id, broken)
        await self._sent(exchange.finish(error_event(error_body(502, str(broken)))))
        return "upstream_error"


class NativeFlow(Flow):
    """A prefiller's answer carries the hand-off; the decoder fetches the blocks and makes every token."""

    async def serve(self, job: Job) -> str:
        """See :meth:`Flow.serve`."""
        plan = rewrite.plan(job.endpoint, job.body)
        if not plan.split:
            return await self._decode(job, None, plan.reason)
        body = rewrite.prefill_body(job.endpoint, job.body, rewrite.PREFILL_PARAMS)

        async def ask(engine: Engine, suffix: str) -> Handoff:
            headers = job.hop_headers(suffix)
            return await ask_prefiller(self._client, engine, job.endpoint, body, headers, self._config.prefill_timeout)

        result = await self._prefill(job, ask)
        reason = self._prefilled(job, result)
        return await self._decode(job, result if isinstance(result, Handoff) else None, reason)


def _refuse(engine: Engine, answer: Stream, error: Mapping[str, object]) -> None:
    """A stream that begins with an error: nothing has been sent yet, so it is handled as a status would be."""
    code = error.get("code")
    status = code if isinstance(code, int) and 400 <= code < 600 else 500
    if status < 500 and status not in (408, 425, 429):
        raise PassThrough(status, [("content-type", "application/json")], json.dumps({"error": error}).encode())
    text = f"began its answer with an error: {str(error.get('message'))[:500]}"
    raise HopError("decode", engine.url, time.monotonic() - answer.began, "stream", text, status=status)
