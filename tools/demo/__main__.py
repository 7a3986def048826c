"""Run the demo: ``python -m tools.demo``, or ``make demo``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from tools.cluster import Completion, HttpError, ProcessFailedError
from tools.demo.run import REQUESTS, Row, ask_single, ask_split, median_ms
from tools.make_model import make_model

FOLDER = Path("build/demo")


def terminated(number: int, frame: FrameType | None) -> None:
    """End as Ctrl-C does, so that everything is stopped in order."""
    raise SystemExit(128 + number)


class Clock:
    """Prints lines of progress with the seconds since the start."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def __call__(self, line: str) -> None:
        """Print a line."""
        print(f"[{time.monotonic() - self._start:4.0f} s] {line}", flush=True)


def print_answer(answer: Completion) -> None:
    """Print a completion's text."""
    print(f"\nThe completion ({len(answer.token_ids)} tokens; the model is random, so its words mean nothing):\n")
    print(textwrap.indent(textwrap.fill(repr(answer.text), 100), "    "))


def _print_result(rows: Sequence[Row]) -> None:
    print_answer(rows[0].split.answers[0])
    print("\nPrompt tokens over kvlink and computed by the decoder; times are medians:\n")
    columns = ("request", "tokens", "over kvlink", "computed", "moved", "path", "transfer", "TTFT", "single", "text")
    layout = "  {:<24}{:>7}{:>13}{:>10}{:>11}{:>6}{:>11}{:>10}{:>10}  {}"
    print(layout.format(*columns))
    for row in rows:
        pulls, split = row.split.pulls, row.split
        print(
            layout.format(
                row.request.name,
                f"{split.answers[0].usage.get('prompt_tokens', 0):,}",
                f"{pulls[0].prompt_tokens - split.computed[0]:,}" if pulls else "none",
                f"{max(split.computed):,}",
                f"{pulls[0].nbytes / 1e6:.1f} MB" if pulls else "-",
                pulls[0].path if pulls else "-",
                f"{median_ms([pull.transfer_s for pull in pulls]):.2f} ms" if pulls else "-",
                f"{median_ms([answer.ttft_s for answer in split.answers]):.0f} ms",
                f"{median_ms([answer.ttft_s for answer in row.single]):.0f} ms",
                "same" if row.same else "DIFFERS",
            )
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo.

    Args:
        argv: Arguments; None for the process's own.

    Returns:
        0 when the decoder computed no more than the last prompt token and every text equals the single engine's.
    """
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description=__doc__.partition("\n")[0])
    # Not shm: it moves memory that kvlink allocated, and the cache is vLLM's own.
    parser.add_argument(
        "--path", choices=("auto", "cma", "tcp"), default="auto", help="how the bytes travel (%(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="each request is sent N times (%(default)s)"
    )
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, terminated)
    report = Clock()
    folder = (FOLDER / f"run-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}").absolute()
    try:
        report("making the small model")
        model = make_model(FOLDER / "model")
        folder.mkdir(parents=True)
        single = ask_single(model, folder, args.repeats, report)
        split = ask_split(model, folder, args.repeats, args.path, report)
    except (ProcessFailedError, HttpError, OSError) as error:
        print(f"\ndemo: {error}\ndemo: the logs are in {folder}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted; nothing is left running", file=sys.stderr)
        return 130
    rows = [Row(request, one, two) for request, one, two in zip(REQUESTS, single, split, strict=True)]
    _print_result(rows)
    problems = [problem for row in rows for problem in row.problems(args.path)]
    for problem in problems:
        print(f"\ndemo: {problem}", file=sys.stderr)
    if problems:
        print(f"demo: the logs are in {folder}", file=sys.stderr)
        return 1
    print(f"\nEvery text equals the single engine's, token for token. The logs are in {folder}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
