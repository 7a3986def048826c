"""Counters of one proxy, in Prometheus's text form."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0)


class Metrics:
    """The proxy's metrics, in a registry of their own so that several proxies can live in one process.

    Attributes:
        requests: Finished requests, by endpoint and outcome ("ok", "client_error", "upstream_error", "client_gone",
            "rejected", "error").
        routes: How requests were served, by route ("split", "plain", "recompute") and the reason for the latter two.
        retries: Further attempts at a hop, by the kind of the failure before.
        first_byte: Seconds from a streamed request's arrival to the first bytes of its answer, by route.
        duration: Seconds from a request's arrival to the end of its answer.
        prefill: Seconds of a prefiller's answer.
        kv_ready: lmcache flow: seconds from a prefiller's answer until its KV is at the decoder.
        handoffs: lmcache flow: hand-offs by outcome ("ready", "failed", "never", "timeout").
        active: Requests in work.
        in_flight: Requests in work at an engine.
        load: Their size, in bytes of request body.
        up: 1 where an engine is up.
        stripped: Requests that came with transfer parameters of their own.
    """

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        name = "kvlink_proxy"
        self.requests = Counter(f"{name}_requests", "Finished requests", ["endpoint", "outcome"], registry=registry)
        self.routes = Counter(f"{name}_routes", "How requests were served", ["route", "reason"], registry=registry)
        self.retries = Counter(f"{name}_retries", "Further attempts at a hop", ["role", "reason"], registry=registry)
        self.first_byte = Histogram(
            f"{name}_ttft_seconds",
            "From a streamed request's arrival to its answer's first bytes",
            ["endpoint", "route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.duration = Histogram(
            f"{name}_request_seconds",
            "From a request's arrival to the end of its answer",
            ["endpoint", "route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.prefill = Histogram(
            f"{name}_prefill_seconds", "A prefiller's answer", ["engine"], buckets=_SECONDS, registry=registry
        )
        self.kv_ready = Histogram(
            f"{name}_kv_ready_seconds",
            "From a prefiller's answer until its KV is at the decoder",
            buckets=(0.001, 0.005, *_SECONDS),
            registry=registry,
        )
        self.handoffs = Counter(f"{name}_handoffs", "Hand-offs through LMCache", ["outcome"], registry=registry)
        self.active = Gauge(f"{name}_active_requests", "Requests in work", registry=registry)
        self.in_flight = Gauge(
            f"{name}_engine_in_flight", "Requests in work at an engine", ["role", "engine"], registry=registry
        )
        self.load = Gauge(
            f"{name}_engine_load_bytes", "Size of the requests in work", ["role", "engine"], registry=registry
        )
        self.up = Gauge(f"{name}_engine_up", "1 where an engine is up", ["role", "engine"], registry=registry)
        self.stripped = Counter(
            f"{name}_stripped", "Requests that came with transfer parameters of their own", registry=registry
        )

    def render(self) -> bytes:
        """Write all of it in Prometheus's text form.

        Returns:
            The page.
        """
        return generate_latest(self.registry)
