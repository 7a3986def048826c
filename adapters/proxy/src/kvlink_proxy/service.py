"""The proxy's endpoints: admission, the life of one request, health, metrics, models."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator

import anyio
import httpx
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from kvlink_proxy import headers, metrics, rewrite
from kvlink_proxy.config import ProxyConfig
from kvlink_proxy.engines import Engine, EnginePool, watch
from kvlink_proxy.errors import PassThrough, ProxyError, error_body
from kvlink_proxy.exchange import ClientGone, Exchange, disconnected, read_body
from kvlink_proxy.kv_ready import KVReady
from kvlink_proxy.lmcache import LMCacheFlow
from kvlink_proxy.native import Flow, Job, NativeFlow
from kvlink_proxy.upstream import make_client

logger = logging.getLogger(__name__)


class Service:
    """One proxy: its engines, its settings, and what it is doing.

    Raises:
        OSError: The lmcache flow's port for prefillers' messages cannot be had.

    Attributes:
        config: The settings.
        metrics: Its counters.
        prefillers: The prefill engines.
        decoders: The decode engines.
        active: Requests in work.
        draining: True once it shuts down.
    """

    def __init__(self, config: ProxyConfig) -> None:
        self.config = config
        self.metrics = metrics.Metrics()
        self.prefillers = EnginePool("prefill", config.prefillers, self.metrics, config.cooldown)
        self.decoders = EnginePool("decode", config.decoders, self.metrics, config.cooldown)
        self.active = 0
        self.draining = False
        self._client: httpx.AsyncClient | None = None
        self._flow: Flow | None = None
        self._ready = KVReady(config.proxy_host, config.proxy_port, self.metrics) if config.flow == "lmcache" else None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Hold the connections to engines and watch their health, as long as the context lasts.

        Yields:
            Nothing.
        """
        async with make_client(self.config) as client:
            self._client = client
            parts = (self.config, client, self.prefillers, self.decoders, self.metrics)
            self._flow = NativeFlow(*parts) if self._ready is None else LMCacheFlow(*parts, ready=self._ready)
            listening = asyncio.ensure_future(self._ready.listen()) if self._ready else None
            engines = [*self.prefillers.engines, *self.decoders.engines]
            watchers = [asyncio.ensure_future(watch(engine, client, self.config)) for engine in engines]
            try:
                yield
            finally:
                tasks = [*watchers, listening] if listening else watchers
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                if self._ready:
                    self._ready.close()

    async def serve(self, endpoint: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request for text, from its body to the end of its answer.

        Args:
            endpoint: Its path.
            scope: ASGI scope.
            receive: ASGI receive.
            send: ASGI send.
        """
        exchange = Exchange(str(uuid.uuid4()), send)
        limit = self.config.max_concurrent
        if self.active >= limit:
            self.metrics.requests.labels(endpoint, "rejected").inc()
            text = f"{self.active} requests are in work, at most {limit} are taken (--max-concurrent)"
            await exchange.fail(ProxyError(503, text, retry_after=1))
            return
        self.active += 1
        self.metrics.active.set(self.active)
        outcome = "client_gone"
        job: Job | None = None
        began = time.monotonic()
        try:
            config = self.config
            try:
                raw = await read_body(scope, receive, config.max_body_bytes, config.client_timeout)
                body = rewrite.parse(raw)
            except ProxyError as error:
                outcome = "client_error"
                await exchange.fail(error)
                return
            except ClientGone:
                return
            if b"_transfer_params" in raw:
                self.metrics.stripped.inc()
            outcome = "error"
            job = Job(endpoint, body, headers.to_engine(scope["headers"]), len(raw), exchange)
            outcome = await self._until_gone(job, receive)
        finally:
            self.active -= 1
            self.metrics.active.set(self.active)
            self.metrics.requests.labels(endpoint, outcome).inc()
            seconds = time.monotonic() - began
            if job is not None:
                self.metrics.duration.labels(endpoint, job.route).observe(seconds)
                logger.info("%s %s %s %s %.3f s", exchange.id, endpoint, job.route, outcome, seconds)

    async def _until_gone(self, job: Job, receive: Receive) -> str:
        """Serve a request unless its client goes away first; then everything done for it is cancelled."""
        work = asyncio.ensure_future(self._answer(job))
        gone = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            return work.result() if work.done() else "client_gone"
        finally:
            # Cancelling closes the engines' connections, and that makes an engine drop the request.
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _answer(self, job: Job) -> str:
        flow = self._flow
        exchange = job.exchange
        try:
            if flow is None:
                raise ProxyError(503, "the proxy is starting", retry_after=1)
            return await flow.serve(job)
        except PassThrough as answer:
            await exchange.fail(answer)
            return "client_error" if answer.status < 500 and answer.status != 429 else "upstream_error"
        except ProxyError as error:
            logger.warning("request %s: %s", exchange.id, error)
            await exchange.fail(error)
            return "upstream_error"
        except ClientGone:
            return "client_gone"
        except Exception:
            logger.exception("request %s: an error in the proxy", exchange.id)
            if not exchange.started:
                await exchange.fail(ProxyError(500, f"an error in the proxy (request {exchange.id}); see its log"))
                return "error"
            raise

    async def health(self, request: Request) -> Response:
        """Answer ``/health``: 200 if a request would be served now.

        Args:
            request: The request.

        Returns:
            A JSON object with the engines and what is known of them.
        """
        del request
        prefill, decode = bool(self.prefillers.up), bool(self.decoders.up)
        if self.draining:
            status = "draining"
        elif prefill and decode:
            status = "ok"
        elif decode and self.config.on_prefill_failure == "recompute":
            status = "degraded"  # served, but the decoders compute every prompt
        else:
            status = "down"
        page = {
            "status": status,
            "active": self.active,
            "prefill": [engine.describe() for engine in self.prefillers.engines],
            "decode": [engine.describe() for engine in self.decoders.engines],
        }
        return JSONResponse(page, 200 if status in ("ok", "degraded") else 503)

    async def metrics_page(self, request: Request) -> Response:
        """Answer ``/metrics``.

        Args:
            request: The request.

        Returns:
            Prometheus's text form.
        """
        del request
        return Response(self.metrics.render(), media_type=metrics.CONTENT_TYPE)

    async def models(self, request: Request) -> Response:
        """Answer ``/v1/models`` with a decoder's list, or a prefiller's where no decoder answers.

        Args:
            request: The request.

        Returns:
            The engine's answer, or a 503 that names the last engine tried.
        """
        known = headers.to_engine(request.scope["headers"])
        sent = [(name, value) for name, value in known if name != b"content-type"]
        client, last = self._client, "no engine is known"
        ranked: list[Engine] = sorted(self.decoders.engines, key=lambda engine: engine.state == "down")
        for engine in (*ranked, *self.prefillers.engines)[: self.config.max_attempts] if client else ():
            assert client is not None
            try:
                with anyio.fail_after(self.config.health_timeout):
                    answer = await client.get(f"{engine.url}/v1/models", headers=sent)
            except (httpx.HTTPError, TimeoutError) as error:
                last = f"{engine.role}: engine {engine.url} does not answer: {str(error) or type(error).__name__}"
                continue
            if answer.status_code < 500:
                passed = dict(headers.to_client(answer.headers.raw))
                return Response(answer.content, answer.status_code, passed)
            last = f"{engine.role}: engine {engine.url} answered {answer.status_code}"
        return Response(error_body(503, last), 503, {"content-type": "application/json", "retry-after": "1"})


class TextEndpoint:
    """An ASGI application for one path that makes text.

    Args:
        service: The proxy.
        path: The path.
    """

    def __init__(self, service: Service, path: str) -> None:
        self._service = service
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request.

        Args:
            scope: ASGI scope.
            receive: ASGI receive.
            send: ASGI send.
        """
        await self._service.serve(self._path, scope, receive, send)


def error_page(request: Request, error: Exception) -> Response:
    """Answer what no endpoint took (404, 405) in the form of the API's errors.

    Args:
        request: The request.
        error: Starlette's HTTP exception.

    Returns:
        The answer.
    """
    status = int(getattr(error, "status_code", 500))
    text = f"{request.method} {request.url.path}: {getattr(error, 'detail', error)}"
    return Response(error_body(status, text), status, {"content-type": "application/json"})
