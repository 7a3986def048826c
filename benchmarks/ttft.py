"""Engines: the time to the first token with one engine, and with a prefiller and a decoder over kvlink or NIXL.

All engines run in one go and are asked in turn, so that whatever else happens on the machine hits all alike. Each
engine computes with one core: the single engine and the prefillers with the first, the decoders with the second. The
engines whose turn it is not are stopped (SIGSTOP), because NIXL's agent burns a core even when idle.
"""

from __future__ import annotations

import os
import random
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.cluster import Cluster, Completion, Engine, EngineSpec, PullTrace, Server, kvlink_config
from tools.make_model import ModelSpec, make_model

from benchmarks.checks import Check

LENGTHS = (501, 2003, 6007)
OUTPUT_TOKENS = 32
DTYPE = "bfloat16"  # 8 KiB of cache a token: 47 MB for the longest prompt
TTFT_SHARE, TTFT_SECONDS = 1.05, 0.015
NIXL_SHARE = 0.5
IDLE_SECONDS = 60.0
IDLE_PERCENT = 0.5
# A stopped engine answers no health check; its proxy should not mind.
_PROXY = ("--health-interval", "3600")


@dataclass
class SetUp:
    """One way to serve.

    Attributes:
        name: "single", "kvlink" or "nixl".
        front: Where requests go.
        engines: All of its engines.
        transfer_s: Returns the seconds of the transfers since its last call; None for a single engine.
        ttft: Seconds by prompt length.
        transfers: Seconds by prompt length.
    """

    name: str
    front: Server
    engines: Sequence[Engine]
    transfer_s: Callable[[], float] | None = None
    ttft: dict[int, list[float]] = field(default_factory=dict)
    transfers: dict[int, list[float]] = field(default_factory=dict)

    def ask(self, prompt: list[int]) -> Completion:
        """Send a prompt; return the completion."""
        return self.front.complete(prompt, max_tokens=OUTPUT_TOKENS, ignore_eos=True)


def prompt_of(length: int, seed: int) -> list[int]:
    """Return random token ids.

    Args:
        length: How many.
        seed: Of the choice.
    """
    generator = random.Random(seed * 1_000_003 + length)
    return [generator.randrange(300, ModelSpec.vocabulary) for _ in range(length)]


def _cores() -> tuple[str, str]:
    cores = sorted(os.sched_getaffinity(0))
    return str(cores[0]), str(cores[min(1, len(cores) - 1)])


def _spec(name: str, model: Path, core: str, transfer: dict[str, Any] | None, **more: Any) -> EngineSpec:
    return EngineSpec(name, model, cores=core, dtype=DTYPE, transfer=transfer, **more)


def _kvlink(cluster: Cluster, model: Path) -> tuple[Engine, Engine, PullTrace]:
    first, second = _cores()
    trace = PullTrace(cluster.log_dir / "pulls.jsonl")
    prefill = cluster.engine(_spec("kvlink-prefill", model, first, kvlink_config("kv_producer")))
    decode = cluster.engine(
        _spec("kvlink-decode", model, second, kvlink_config("kv_consumer", kvlink_trace_file=str(trace.path)))
    )
    return prefill, decode, trace


def _low_port() -> int:
    """Return a free port below those that the kernel hands out: zmq binds it later and takes no reserved one."""
    while True:
        number = random.SystemRandom().randrange(20_000, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", number))
            except OSError:
                continue
        return number


def _nixl(cluster: Cluster, model: Path, folder: Path) -> tuple[Engine, Engine]:
    engines = []
    for role, core in zip(("prefill", "decode"), _cores(), strict=True):
        env = {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])),
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(_low_port()),
            "UCX_TLS": "all",
        }
        transfer = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
        engines.append(cluster.engine(_spec(f"nixl-{role}", model, core, transfer, env=env)))
    return engines[0], engines[1]


def _counter(decode: Engine) -> Callable[[], float]:
    """Return a function that gives the NIXL transfer seconds since its last call."""
    last = [0.0]

    def since() -> float:
        before, last[0] = last[0], decode.metric("vllm:nixl_xfer_time_seconds_sum")
        return last[0] - before

    return since


@contextmanager
def _running(setup: SetUp) -> Iterator[None]:
    """Let the set-up's engines run for a while."""
    for engine in setup.engines:
        engine.resume()
    try:
        yield
    finally:
        for engine in setup.engines:
            engine.pause()


def _idle(setups: dict[str, SetUp], seconds: float) -> Check:
    """Compare what idle engines use: plain, and with the connector and a connected peer."""
    names = ("single", "kvlink")
    for name in names:
        for engine in setups[name].engines:
            engine.resume()
    time.sleep(2.0)  # let the last answers' clean-up end; the figure is an average over a minute
    engines = [engine for name in names for engine in setups[name].engines]
    begun, before = time.monotonic(), [engine.cpu_seconds() for engine in engines]
    time.sleep(seconds)
    elapsed = time.monotonic() - begun
    used = [100 * (engine.cpu_seconds() - start) / elapsed for engine, start in zip(engines, before, strict=True)]
    note = ", ".join(f"{engine.name} {percent:.2f} %" for engine, percent in zip(engines, used, strict=True))
    return Check(
        "idle engine with the connector over one without", max(used[1:]) - used[0], "% core", IDLE_PERCENT, note=note
    )


def _judge(setups: dict[str, SetUp], lengths: Sequence[int]) -> Iterator[Check]:
    for length in lengths:
        single = statistics.median(setups["single"].ttft[length])
        for name in list(setups)[1:]:
            median = statistics.median(setups[name].ttft[length])
            values = setups[name].ttft[length]
            bound = (single * TTFT_SHARE + TTFT_SECONDS) * 1e3 if name == "kvlink" else None
            note = f"{min(values) * 1e3:.0f}-{max(values) * 1e3:.0f}; single {single * 1e3:.0f} ms"
            yield Check(f"TTFT of {length:,} tokens, 1P1D over {name}", median * 1e3, "ms", at_most=bound, note=note)
    longest = max(lengths)
    ours = statistics.median(setups["kvlink"].transfers[longest])
    bound = None
    if "nixl" in setups:
        theirs = statistics.median(setups["nixl"].transfers[longest])
        bound = theirs * NIXL_SHARE * 1e3
        yield Check(f"transfer of {longest:,} tokens over nixl", theirs * 1e3, "ms")
    yield Check(f"transfer of {longest:,} tokens over kvlink", ours * 1e3, "ms", at_most=bound)


def measure(
    repeats: int,
    *,
    nixl: Path | None,
    report: Callable[[str], None],
    lengths: Sequence[int] = LENGTHS,
    idle_seconds: float = IDLE_SECONDS,
) -> list[Check]:
    """Measure the engines.

    Args:
        repeats: Requests of each length to each set-up, after one that is dropped.
        nixl: Folder with the nixl package, or None to leave NixlConnector out.
        report: Takes lines of progress.
        lengths: Of the prompts, tokens.
        idle_seconds: How long the idle engines are watched.

    Returns:
        The figures.

    Raises:
        ProcessFailedError: An engine did not start.
    """
    model = make_model(Path("build/demo/model-bf16"), ModelSpec(dtype=DTYPE))
    folder = Path(tempfile.mkdtemp(prefix="ttft-", dir=model.parent))
    report(f"logs are in {folder}")
    with Cluster(folder, report=report) as cluster:
        engines = [cluster.engine(_spec("single", model, _cores()[0], None))]
        prefill, decode, trace = _kvlink(cluster, model)
        pair = _nixl(cluster, model, nixl) if nixl is not None else None
        cluster.wait_ready(timeout=600)
        front = cluster.proxy([prefill], [decode], name="kvlink-proxy", args=_PROXY)
        setups = {
            "single": SetUp("single", engines[0], engines),
            "kvlink": SetUp("kvlink", front, [prefill, decode], lambda: sum(pull.transfer_s for pull in trace.take(1))),
        }
        if pair is not None:
            proxy = cluster.proxy([pair[0]], [pair[1]], name="nixl-proxy", args=_PROXY)
            setups["nixl"] = SetUp("nixl", proxy, pair, _counter(pair[1]))
        cluster.wait_ready()
        for setup in setups.values():
            for engine in setup.engines:
                engine.pause()
        for length in lengths:
            _measure_length(setups, length, repeats, report)
        return [*_judge(setups, lengths), _idle(setups, idle_seconds)]


def _measure_length(setups: dict[str, SetUp], length: int, repeats: int, report: Callable[[str], None]) -> None:
    """Ask every set-up in turn; the first round warms up and is dropped."""
    for turn in range(repeats + 1):
        prompt = prompt_of(length, turn)
        for setup in setups.values():
            with _running(setup):
                answer = setup.ask(prompt)
                seconds = setup.transfer_s() if setup.transfer_s is not None else None
            if turn == 0:
                continue
            setup.ttft.setdefault(length, []).append(answer.ttft_s)
            if seconds is not None:
                setup.transfers.setdefault(length, []).append(seconds)
        if turn:
            shown = ", ".join(f"{name} {setup.ttft[length][-1] * 1e3:.0f} ms" for name, setup in setups.items())
            report(f"{length} tokens, round {turn}: {shown}")
