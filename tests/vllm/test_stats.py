"""Statistics survive the way from worker to Prometheus."""

from __future__ import annotations

import pickle

import prometheus_client
from prometheus_client import Counter, Gauge, Histogram
from tests.vllm.harness import vllm_config

from kvlink_vllm.connector import KVLinkConnector
from kvlink_vllm.stats import KVLinkStats


def sample():
    stats = KVLinkStats()
    stats.add(pulls=2, bytes=1000, tokens=30)
    stats.data["seconds"] += [0.004, 0.002]
    stats.fail("connect", 17)
    return stats


def test_take_aggregate_reduce():
    first, second = sample(), sample()
    second.fail("lease", 3)
    taken = pickle.loads(pickle.dumps(first.take()))
    assert first.is_empty()
    assert first.take() is None
    total = taken.aggregate(second)
    assert total.reduce() == {
        **dict.fromkeys(("blocks", "local_tokens", "leases_released", "leases_expired", "handoffs"), 0),
        "pulls": 4,
        "bytes": 2000,
        "tokens": 60,
        "recomputed_tokens": 37,
        "median_transfer_ms": 4.0,
        "failed_connect": 2,
        "failed_lease": 1,
    }
    assert KVLinkConnector.build_kv_connector_stats(total.data).reduce() == total.reduce()
    assert KVLinkConnector.build_kv_connector_stats().is_empty()


def test_prometheus(monkeypatch):
    registry = prometheus_client.CollectorRegistry()

    def within(kind):
        return lambda **options: kind(**options, registry=registry)

    types = {Counter: within(Counter), Gauge: within(Gauge), Histogram: within(Histogram)}
    metrics = KVLinkConnector.build_prom_metrics(
        vllm_config("kv_both", {}), types, ["model_name", "engine"], {0: ["m", "0"], 1: ["m", "1"]}
    )
    metrics.observe(sample().data, 1)
    metrics.observe(sample().data, 1)

    def value(name, **labels):
        return registry.get_sample_value(name, {"model_name": "m", "engine": "1", **labels})

    assert value("vllm:kvlink_bytes_total") == 2000
    assert value("vllm:kvlink_transfer_seconds_count") == 4
    assert value("vllm:kvlink_failed_pulls_total", reason="connect") == 2
    assert registry.get_sample_value("vllm:kvlink_bytes_total", {"model_name": "m", "engine": "0"}) == 0


def test_the_log_follows_vllms_configuration_even_if_it_comes_later():
    import logging

    from kvlink_vllm.log import get_logger

    seen = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    source = logging.getLogger("vllm")
    logger = get_logger()
    level = source.level
    try:
        source.setLevel(logging.WARNING)
        source.addHandler(handler)
        logger.info("unseen")
        source.setLevel(logging.INFO)
        logger.info("seen")
    finally:
        source.removeHandler(handler)
        source.setLevel(level)
    assert seen == ["seen"]
