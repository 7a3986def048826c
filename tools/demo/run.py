"""The demo's work: the same requests to a single engine and to a prefiller and a decoder, and what came of them."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tools.cluster import Cluster, Completion, EngineSpec, Pull, PullTrace, Server, kvlink_config

SENTENCE = "Explain the significance of KV cache in language models in English."
WARM_UP = "Hello"
_MAX_CORES = 8


@dataclass(frozen=True)
class Request:
    """A request of the demo.

    Attributes:
        name: For people.
        prompt: Its text.
        max_tokens: Tokens to generate.
    """

    name: str
    prompt: str
    max_tokens: int


# The first is the seed's own request.
REQUESTS = (
    Request("the sentence, 100 times", SENTENCE * 100, 100),
    Request("the sentence once", SENTENCE, 100),
    Request("the sentence, 11 times", SENTENCE * 11, 100),
    Request("a longer text", "".join(f"Step {i}: keep what was computed. " for i in range(230)), 50),
)


@dataclass
class Split:
    """What the prefiller and the decoder made of a request.

    Attributes:
        answers: The completions, one a repeat.
        pulls: What the decoder's connector said, one a repeat.
        computed: Prompt tokens that the decoder computed itself, by vLLM's own count, one a repeat.
    """

    answers: list[Completion] = field(default_factory=list)
    pulls: list[Pull] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)


@dataclass
class Row:
    """A request's outcome.

    Attributes:
        request: The request.
        single: The single engine's completions, one a repeat.
        split: Prefiller and decoder.
    """

    request: Request
    single: list[Completion]
    split: Split

    @property
    def same(self) -> bool:
        """Whether every completion equals the single engine's, token for token."""
        tokens = [answer.token_ids for answer in [*self.single, *self.split.answers]]
        return bool(tokens[0]) and all(item == tokens[0] for item in tokens)

    def problems(self, path: str) -> list[str]:
        """Return what went wrong, one sentence each.

        Args:
            path: The path asked for, or "auto".
        """
        found = []
        if not self.same:
            found.append(f"{self.request.name}: the text differs from the single engine's")
        if max(self.split.computed) > 1:
            found.append(f"{self.request.name}: the decoder computed {max(self.split.computed)} prompt tokens itself")
        if len(self.split.pulls) != len(self.split.answers):
            found.append(
                f"{self.request.name}: {len(self.split.pulls)} transfers for {len(self.split.answers)} requests"
            )
        for pull in self.split.pulls:
            if pull.outcome != "ok":
                found.append(f"{self.request.name}: the transfer failed in phase {pull.outcome}: {pull.raw['reason']}")
            elif path not in ("auto", pull.path):
                found.append(f"{self.request.name}: the bytes went over {pull.path} instead of {path}")
        return found


def median_ms(seconds: Sequence[float]) -> float:
    """Return the median in milliseconds."""
    return statistics.median(seconds) * 1e3


def core_groups() -> tuple[str, str]:
    """Return cores for the prefiller and the decoder: as many for each, apart when there are two or more."""
    cores = sorted(os.sched_getaffinity(0))
    share = min(max(len(cores) // 2, 1), _MAX_CORES)
    first, second = cores[:share], cores[share : 2 * share] or cores[:share]
    return ",".join(map(str, first)), ",".join(map(str, second))


def ask_single(
    model: Path, folder: Path, repeats: int, report: Callable[[str], None], requests: Sequence[Request] = REQUESTS
) -> list[list[Completion]]:
    """Send the requests to one engine that does everything.

    Args:
        model: The model's folder.
        folder: For the log.
        repeats: How often each request is sent.
        report: Takes lines of progress.
        requests: What to send.

    Returns:
        The completions of each request.

    Raises:
        ProcessFailedError: The engine did not start.
        HttpError: It answered with an error.
    """
    cores, _ = core_groups()
    report(f"starting a single engine on core {cores} as the reference")
    with Cluster(folder, report=report) as cluster:
        engine = cluster.engine(EngineSpec("single", model, cores=cores))
        cluster.wait_ready()
        report("asking the single engine")
        engine.complete(WARM_UP, max_tokens=2)
        return [
            [engine.complete(request.prompt, max_tokens=request.max_tokens) for _ in range(repeats)]
            for request in requests
        ]


def _computed(decode: Server) -> int:
    return int(decode.metric("vllm:prompt_tokens_by_source_total", source="local_compute"))


def ask_split(
    model: Path,
    folder: Path,
    repeats: int,
    path: str,
    report: Callable[[str], None],
    requests: Sequence[Request] = REQUESTS,
) -> list[Split]:
    """Send the requests to a proxy in front of a prefiller and a decoder.

    Args:
        model: The model's folder.
        folder: For the logs.
        repeats: How often each request is sent.
        path: "auto", "cma" or "tcp".
        report: Takes lines of progress.
        requests: What to send.

    Returns:
        What came of each request.

    Raises:
        ProcessFailedError: A process did not start.
        HttpError: The proxy answered with an error.
    """
    first, second = core_groups()
    trace = PullTrace(folder / "pulls.jsonl")
    report(f"starting the prefiller on core {first} and the decoder on core {second}")
    with Cluster(folder, report=report) as cluster:
        producer = kvlink_config("kv_producer", path=path)
        consumer = kvlink_config("kv_consumer", path=path, kvlink_trace_file=str(trace.path))
        prefill = cluster.engine(EngineSpec("prefill", model, cores=first, transfer=producer))
        decode = cluster.engine(EngineSpec("decode", model, cores=second, transfer=consumer))
        proxy = cluster.proxy([prefill], [decode])
        cluster.wait_ready()
        report("asking the prefiller and the decoder, through the proxy")
        proxy.complete(WARM_UP, max_tokens=2)
        trace.take(1)
        results = []
        for request in requests:
            split = Split()
            for _ in range(repeats):
                before = _computed(decode)
                split.answers.append(proxy.complete(request.prompt, max_tokens=request.max_tokens))
                split.pulls += trace.take(1)
                split.computed.append(_computed(decode) - before)
            results.append(split)
        report("stopping")
        return results
