"""Numbers for vLLM's logging and Prometheus."""

# vLLM is not there when types are checked, so its base classes are Any.
# mypy: disallow-subclassing-any=False

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

COUNTERS = {
    "pulls": "Pulls that completed.",
    "bytes": "Bytes pulled.",
    "blocks": "KV-cache blocks pulled.",
    "tokens": "Prompt tokens pulled.",
    "local_tokens": "Prompt tokens of pulling requests that were in the local prefix cache.",
    "recomputed_tokens": "Prompt tokens recomputed because a pull failed.",
    "leases_released": "Prefiller: leases that ended because a decoder said done.",
    "leases_expired": "Prefiller: leases that ran out before a decoder said done.",
    "handoffs": "Prefiller: requests offered to decoders.",
}


class KVLinkStats(KVConnectorStats):
    """Sums since the last report, durations one by one, failures by reason."""

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        super().__init__(data=data or {})
        if not self.data:
            self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.data: dict[str, Any] = dict.fromkeys(COUNTERS, 0)
        self.data["seconds"] = []
        self.data["failures"] = {}

    def add(self, **amounts: int) -> None:
        """Adds to counters.

        Args:
            amounts: Counter name to amount.
        """
        for name, amount in amounts.items():
            self.data[name] += amount

    def fail(self, reason: str, tokens: int) -> None:
        """Counts a pull that failed.

        Args:
            reason: The phase that failed: "params", "connect", "queued", "claim", "transfer", "lease", "verify",
                "cancelled".
            tokens: Tokens that will be recomputed.
        """
        self.data["failures"][reason] = self.data["failures"].get(reason, 0) + 1
        self.data["recomputed_tokens"] += tokens

    def take(self) -> KVLinkStats | None:
        """Returns what there is and starts afresh, or None."""
        if self.is_empty():
            return None
        taken = KVLinkStats(self.data)
        self.reset()
        return taken

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Adds another worker's or interval's numbers.

        Args:
            other: The numbers to add.

        Returns:
            This object.
        """
        for name in COUNTERS:
            self.data[name] += other.data.get(name, 0)
        self.data["seconds"] += other.data.get("seconds", [])
        for reason, count in other.data.get("failures", {}).items():
            self.data["failures"][reason] = self.data["failures"].get(reason, 0) + count
        return self

    def reduce(self) -> dict[str, int | float]:
        """Returns one number a name, for the log line."""
        reduced: dict[str, int | float] = {name: self.data[name] for name in COUNTERS}
        seconds = sorted(self.data["seconds"])
        if seconds:
            reduced["median_transfer_ms"] = round(seconds[len(seconds) // 2] * 1e3, 3)
        for reason, count in self.data["failures"].items():
            reduced[f"failed_{reason}"] = count
        return reduced

    def is_empty(self) -> bool:
        """Tells whether nothing happened."""
        return not self.data["seconds"] and not self.data["failures"] and not any(self.data[n] for n in COUNTERS)


class KVLinkPromMetrics(KVConnectorPromMetrics):
    """``vllm:kvlink_*``."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: self._per_engine(
                self._counter_cls(name=f"vllm:kvlink_{name}", documentation=text, labelnames=labelnames)
            )
            for name, text in COUNTERS.items()
        }
        self._failures = self._counter_cls(
            name="vllm:kvlink_failed_pulls",
            documentation="Pulls that failed, by the phase that failed.",
            labelnames=[*labelnames, "reason"],
        )
        self._seconds = self._per_engine(
            self._histogram_cls(
                name="vllm:kvlink_transfer_seconds",
                documentation="Seconds from submit to complete of a pull's transfer.",
                buckets=[0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10],
                labelnames=labelnames,
            )
        )

    def _per_engine(self, metric: Any) -> Any:
        # vLLM's own helper for this is a method in 0.18 and a function elsewhere later.
        return {index: metric.labels(*values) for index, values in self.per_engine_labelvalues.items()}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Records one interval.

        Args:
            transfer_stats_data: ``KVLinkStats.data``.
            engine_idx: Which engine it came from.
        """
        for name, metrics in self._counters.items():
            if amount := transfer_stats_data.get(name, 0):
                metrics[engine_idx].inc(amount)
        for seconds in transfer_stats_data.get("seconds", ()):
            self._seconds[engine_idx].observe(seconds)
        labels = self.per_engine_labelvalues[engine_idx]
        for reason, count in transfer_stats_data.get("failures", {}).items():
            self._failures.labels(*labels, reason).inc(count)
