"""The same through LMCache: ``python -m tools.demo.lmcache``, or ``make demo-lmcache``.

Prefiller, decoder and proxy are started by the scripts and configurations of examples/disagg_prefill/1p1d, on free
ports.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tools.cluster import Cluster, Completion, HttpError, ProcessFailedError
from tools.cluster.lmcache import MODES, LMCacheSetup, LogTail, Moved, computed, start_lmcache
from tools.demo.__main__ import FOLDER, Clock, print_answer, terminated
from tools.demo.run import REQUESTS, WARM_UP, Request, ask_single, core_groups, median_ms
from tools.make_model import make_model

LAYOUT = "  {:<24}{:>7}{:>13}{:>10}{:>11}{:>6}{:>11}{:>10}{:>10}  {}"


@dataclass
class Row:
    """What came of a request.

    Attributes:
        request: The request.
        single: The single engine's completions, one a repeat.
        answers: The proxy's.
        moved: The transfers of each repeat.
        computed: Prompt tokens that the decoder computed itself, one a repeat.
    """

    request: Request
    single: list[Completion]
    answers: list[Completion] = field(default_factory=list)
    moved: list[list[Moved]] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Whether every completion equals the single engine's, token for token."""
        tokens = [answer.token_ids for answer in [*self.single, *self.answers]]
        return bool(tokens[0]) and all(item == tokens[0] for item in tokens)

    def problems(self) -> list[str]:
        """Return what went wrong, one sentence each."""
        found = []
        if not self.same:
            found.append(f"{self.request.name}: the text differs from the single engine's")
        if max(self.computed) > 1:
            found.append(f"{self.request.name}: the decoder computed {max(self.computed)} prompt tokens itself")
        if not all(self.moved):
            found.append(f"{self.request.name}: nothing was moved for {self.moved.count([])} of its repeats")
        return found

    def line(self) -> str:
        """Return its line of the table."""
        tokens = self.answers[0].usage.get("prompt_tokens", 0)
        paths = {item.path for moved in self.moved for item in moved}
        return LAYOUT.format(
            self.request.name,
            f"{tokens:,}",
            f"{tokens - max(self.computed):,}",
            f"{max(self.computed):,}",
            f"{sum(item.nbytes for item in self.moved[0]) / 1e6:.1f} MB",
            "+".join(sorted(paths)) or "-",
            f"{median_ms([sum(item.seconds for item in moved) for moved in self.moved]):.2f} ms",
            f"{median_ms([answer.ttft_s for answer in self.answers]):.0f} ms",
            f"{median_ms([answer.ttft_s for answer in self.single]):.0f} ms",
            "same" if self.same else "DIFFERS",
        )


def ask_lmcache(setup: LMCacheSetup, folder: Path, repeats: int, rows: Sequence[Row], report: Clock) -> None:
    """Send each row's request through the proxy and note what came of it.

    Args:
        setup: What to start.
        folder: For logs and configurations.
        repeats: How often each request is sent.
        rows: Filled.
        report: Takes lines of progress.

    Raises:
        ProcessFailedError: A process did not start.
        HttpError: The proxy answered with an error.
    """
    with Cluster(folder, report=report) as cluster:
        flow = start_lmcache(cluster, setup)
        cluster.wait_ready()
        report("asking the prefiller and the decoder, through the proxy")
        flow.proxy.complete(WARM_UP, max_tokens=2)
        tails = [LogTail(engine.log) for engine in (flow.prefill, flow.decode)]
        for row in rows:
            for _ in range(repeats):
                before = computed(flow.decode)
                row.answers.append(flow.proxy.complete(row.request.prompt, max_tokens=row.request.max_tokens))
                row.moved.append([item for tail in tails for item in tail.moved()])
                row.computed.append(computed(flow.decode) - before)
        report("stopping")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo.

    Args:
        argv: Arguments; None for the process's own.

    Returns:
        0 when the decoder computed no more than the last prompt token and every text equals the single engine's.
    """
    parser = argparse.ArgumentParser(prog="python -m tools.demo.lmcache", description=__doc__.partition("\n")[0])
    parser.add_argument("--mode", choices=MODES, default="push", help="how the KV travels (%(default)s)")
    parser.add_argument("--channel", default="host", help="transfer_channel (%(default)s)")
    parser.add_argument("--path", choices=("auto", "shm", "cma", "tcp"), default="auto", help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="each request N times (%(default)s)")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, terminated)
    report = Clock()
    folder = (FOLDER / f"lmcache-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}").absolute()
    try:
        report("making the small model")
        model = make_model(FOLDER / "model")
        folder.mkdir(parents=True)
        single = ask_single(model, folder, args.repeats, report)
        rows = [Row(request, one) for request, one in zip(REQUESTS, single, strict=True)]
        options = {} if args.path == "auto" else {"kvlink.path": args.path}
        setup = LMCacheSetup(model, core_groups(), mode=args.mode, channel=args.channel, options=options)
        ask_lmcache(setup, folder, args.repeats, rows, report)
    except (ProcessFailedError, HttpError, OSError) as error:
        print(f"\ndemo: {error}\ndemo: the logs are in {folder}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted; nothing is left running", file=sys.stderr)
        return 130
    print_answer(rows[0].answers[0])
    print(f"\nPrompt tokens over LMCache on kvlink ({args.mode}) and computed by the decoder; times are medians:\n")
    print(
        LAYOUT.format(
            "request", "tokens", "over kvlink", "computed", "moved", "path", "transfer", "TTFT", "single", "text"
        )
    )
    for row in rows:
        print(row.line())
    problems = [problem for row in rows for problem in row.problems()]
    for problem in problems:
        print(f"\ndemo: {problem}", file=sys.stderr)
    if problems:
        print(f"demo: the logs are in {folder}", file=sys.stderr)
        return 1
    print(f"\nEvery text equals the single engine's, token for token. The logs are in {folder}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
