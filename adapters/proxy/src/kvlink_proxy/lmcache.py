"""The LMCache flow: the proxy chooses the decoder, the prefiller's LMCache sends the KV there and says so.

The order of LMCache's own example proxy: prefill with a ``disagg_spec``, wait until every rank's KV is at the decoder,
decode. What it waits for has a deadline, what fails has a reason, and the decoder then computes the prompt.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import Any

import httpx

from kvlink_proxy import first_token, rewrite
from kvlink_proxy.config import ProxyConfig, Receiver
from kvlink_proxy.engines import Engine, EnginePool
from kvlink_proxy.errors import HopError
from kvlink_proxy.first_token import Opening
from kvlink_proxy.kv_ready import HandoffFailed, KVReady, Waiter
from kvlink_proxy.metrics import Metrics
from kvlink_proxy.native import Flow, Job
from kvlink_proxy.upstream import Handoff, ask_prefiller

logger = logging.getLogger(__name__)


# For kvlink's LMCache adapter: the prompt ends where the prefiller's did. LMCache itself ignores it.
_WHOLE_PROMPT = {"kvlink.whole_prompt": True}


class LMCacheFlow(Flow):
    """Serves requests over engines that run LMCache."""

    def __init__(
        self,
        config: ProxyConfig,
        client: httpx.AsyncClient,
        prefillers: EnginePool,
        decoders: EnginePool,
        metrics: Metrics,
        *,
        ready: KVReady,
    ) -> None:
        super().__init__(config, client, prefillers, decoders, metrics)
        self._ready = ready
        self._receivers = dict(zip(decoders.engines, config.receivers, strict=True))

    async def serve(self, job: Job) -> str:
        """See :meth:`Flow.serve`."""
        plan = rewrite.plan(job.endpoint, job.body)
        decoder = self.decoders.pick(even_down=False) if plan.split else None
        if decoder is None:  # with no decoder up a prompt is not prefilled for nobody
            return await self._decode(job, None, plan.reason or "no_decoder")
        opens = self._config.first_token == "prefiller" and first_token.possible(job.endpoint, job.body)
        receiver = self._receivers[decoder]

        async def ask(engine: Engine, suffix: str) -> Handoff:
            return await self._hand_over(job, engine, suffix, receiver, opens)

        with decoder.busy(job.weight):
            result = await self._prefill(job, ask)
        reason = self._prefilled(job, result)
        if job.opening and job.opening.complete:
            await self._sent(job.exchange.finish(job.opening.ending(bool(job.body.get("stream")))))
            return "ok"
        handoff: Handoff | None = None
        if isinstance(result, Handoff) and job.opening is None:
            handoff = dataclasses.replace(result, params=_WHOLE_PROMPT)
        return await self._decode(job, handoff, reason, first=decoder)

    async def _hand_over(self, job: Job, engine: Engine, suffix: str, receiver: Receiver, opens: bool) -> Handoff:
        """Have one prefiller compute the prompt and send its KV to the decoder."""
        config = self._config
        request_id = f"{job.exchange.id}-{suffix}"
        params: dict[str, Any] = {
            "disagg_spec": {
                "req_id": request_id,
                "receiver_host": receiver.host,
                "receiver_init_port": list(receiver.init_ports),
                "receiver_alloc_port": list(receiver.alloc_ports),
            },
        }
        if opens:
            params["ret_first_tok"] = True
        body = rewrite.prefill_body(job.endpoint, job.body, params, keep_token=opens)
        with self._ready.expect(request_id, len(receiver.init_ports)) as waiter:
            handoff = await ask_prefiller(
                self._client,
                engine,
                job.endpoint,
                body,
                job.hop_headers(suffix),
                config.prefill_timeout,
                params_needed=False,
            )
            if opens and (opening := first_token.opening(job.body, handoff)):
                await self._open(job, opening)
                if opening.complete:
                    return handoff
            await self._arrive(engine, handoff, waiter)
        return handoff

    async def _arrive(self, engine: Engine, handoff: Handoff, waiter: Waiter) -> None:
        try:
            await self._ready.arrival(waiter, self._config.kv_ready_timeout)
        except HandoffFailed as error:
            elapsed = time.monotonic() - handoff.at + handoff.seconds
            text = f"computed the prompt, but its KV is not at the decoder: {error}"
            raise HopError("prefill", engine.url, elapsed, "kv", text) from None

    async def _open(self, job: Job, opening: Opening) -> None:
        """Give the client the prefiller's token, and make the rest of the request the decoder's."""
        streamed = bool(job.body.get("stream"))
        job.opening, job.route = opening, "split"
        job.body = opening.remaining(job.body)
        if streamed or opening.complete:
            kind = "text/event-stream; charset=utf-8" if streamed else "application/json"
            job.exchange.notes["x-kvlink-route"] = "split"
            await self._sent(job.exchange.start(200, [("content-type", kind)]))
            self._metrics.first_byte.labels(job.endpoint, job.route).observe(time.monotonic() - job.began)
            if streamed:
                await self._sent(job.exchange.write(opening.event()))
