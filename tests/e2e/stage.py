"""Prefiller, decoder, proxy and reference of a test, and what their numbers must say."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from tools.cluster import Cluster, Engine, EngineSpec, Port, Proxy, Pull, PullTrace, Server

from e2e.talk import ask, eventually

# All engines of a test start at once on few cores.
START_SECONDS = 600.0
# Deadlines that a machine busy with other work does not reach: here nothing may be recomputed.
PATIENCE: dict[str, Any] = {
    "kvlink_contact": 120.0,
    "kvlink_lease": 120.0,
    "kvlink_connect_timeout": 60.0,
    "kvlink_request_timeout": 60.0,
    "kvlink_peer_timeout": 60.0,
    "kvlink_pull_timeout": 120.0,
}


def cores(ranks: int = 1) -> tuple[str, str]:
    """A core a rank for the prefiller (and the reference), and others for the decoder, as far as there are others."""
    usable = sorted(os.sched_getaffinity(0))
    numbers = [str(usable[i % len(usable)]) for i in range(2 * ranks)]
    return "|".join(numbers[:ranks]), "|".join(numbers[ranks:])


class Decoder:
    """A decoder, its trace file, and what it computed and pulled."""

    def __init__(self, engine: Engine, trace: PullTrace) -> None:
        self.engine = engine
        self.trace = trace

    def computed(self) -> int:
        """Prompt tokens that it computed itself, by vLLM's own count."""
        return int(self.engine.metric("vllm:prompt_tokens_by_source_total", source="local_compute"))

    @contextmanager
    def computes(self, tokens: int) -> Iterator[None]:
        """Asserts how many prompt tokens it computes meanwhile."""
        before = self.computed()
        yield
        eventually(f"{tokens} prompt tokens computed", lambda: self.computed() - before >= tokens, 30)
        assert self.computed() - before == tokens

    def pulls(self, expected: int) -> list[Pull]:
        """The pulls since the last call: exactly as many as expected."""
        pulls = self.trace.take(expected, timeout=30)
        assert len(pulls) == expected, [pull.raw for pull in pulls]
        return pulls


S = TypeVar("S", bound="Stage")


class Stage:
    """A cluster whose engines can be killed and started again at the same address."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cluster = Cluster(folder)

    def __enter__(self: S) -> S:
        return self

    def __exit__(self, *exc: object) -> None:
        self.cluster.stop()

    def start_engine(self, spec: EngineSpec) -> Engine:
        return self.cluster.engine(spec)

    def start_decoder(self, spec: EngineSpec) -> Decoder:
        """Starts an engine whose configuration names ``kvlink.trace_file``."""
        assert spec.transfer is not None
        path = spec.transfer["kv_connector_extra_config"]["kvlink.trace_file"]
        return Decoder(self.cluster.engine(spec), PullTrace(Path(path)))

    def restart(self, engine: Engine) -> Engine:
        """Starts a killed engine again at its old address; returns at once."""
        assert engine.returncode is not None
        self.cluster.stop(engine)
        # Another log: the old one tells what happened before.
        spec = dataclasses.replace(engine.spec, name=f"{engine.spec.name}+")
        return self.cluster.engine(spec, port=Port(engine.port))

    def start_proxy(self, prefill: Server, decode: Server, name: str = "proxy", args: Sequence[str] = ()) -> Proxy:
        return self.cluster.proxy([prefill], [decode], name=name, args=args)

    def ready(self) -> None:
        self.cluster.wait_ready(timeout=START_SECONDS)


def block_size(engine: Server) -> int:
    """Tokens of a block, from the engine itself."""
    from tools.cluster import client

    _, text = client.get(f"{engine.url}/metrics", timeout=30)
    line = next(line for line in text.splitlines() if line.startswith("vllm:cache_config_info{"))
    return int(line.partition('block_size="')[2].partition('"')[0])


def check_pull(pull: Pull, *, tokens: int, block: int, paths: set[str], local: int = 0) -> None:
    """Asserts that a prompt's pull went well and brought all that was missing but the last token, and nothing else."""
    assert pull.outcome == "ok", pull.raw
    assert pull.path in paths
    assert pull.prompt_tokens == tokens
    assert pull.pulled_tokens == tokens - 1 - local
    assert pull.raw["local_tokens"] == local
    assert pull.blocks == -(-(tokens - 1) // block) - local // block
    assert pull.raw["source_checksum"] == pull.raw["destination_checksum"]
    assert pull.nbytes > 0


def held(engine: Server) -> dict[str, Any]:
    """Everything of an engine that a request may hold."""
    return {
        "blocks in use": engine.metric("vllm:kv_cache_usage_perc"),
        "running": engine.metric("vllm:num_requests_running"),
        "waiting": engine.metric("vllm:num_requests_waiting"),
    }


def leases(prefill: Server, ranks: int = 1) -> float:
    """Leases that a prefiller's workers hold now."""
    ended = prefill.metric("vllm:kvlink_leases_released_total") + prefill.metric("vllm:kvlink_leases_expired_total")
    return ranks * prefill.metric("vllm:kvlink_handoffs_total") - ended


def settle(*engines: Server, ranks: int = 1, seconds: float = 100.0) -> None:
    """Waits until nothing is held on any of the engines, and asserts that they serve.

    A gauge shows an engine's last step; the small request makes a new one.
    """
    for engine in engines:

        def empty(engine: Server = engine) -> bool:
            ask(engine, [11, 12, 13], max_tokens=1)
            return not any(held(engine).values()) and leases(engine, ranks) == 0

        try:
            eventually(f"{engine.name} holds nothing", empty, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}; it holds {held(engine)} and {leases(engine, ranks):.0f} leases") from None


class LogMark:
    """What a server logs from now on."""

    def __init__(self, server: Server) -> None:
        self._log = server.log
        self._offset = self._log.stat().st_size

    def text(self) -> str:
        with self._log.open("rb") as log:
            log.seek(self._offset)
            return log.read().decode("utf-8", "replace")
