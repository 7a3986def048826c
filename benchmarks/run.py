"""Measure everything that docs/performance.md states: ``make bench``, or ``python benchmarks/run.py --only calls``.

Prints one line a figure, with its threshold where it has one, and writes all of them as JSON and as a Markdown table.
The exit status is 0 when every threshold is met. The engine part compares with vLLM's NixlConnector when nixl is there:
``pip install --no-deps --target build/nixl nixl==1.5.1 nixl-cu12==1.5.1``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: find benchmarks and tools

from benchmarks import calls, transfer
from benchmarks.checks import Check, markdown, print_table

PARTS = ("transfer", "calls", "engine")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _lengths(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _measure(args: argparse.Namespace) -> tuple[list[Check], list[dict[str, object]]]:
    parts, repeats = args.only or PARTS, args.repeats
    checks: list[Check] = []
    rows: list[dict[str, object]] = []
    if "transfer" in parts:
        for check, result in transfer.measure(repeats):
            print_table([check])
            checks.append(check)
            if result.as_dict() not in rows:
                rows.append(result.as_dict())
    if "calls" in parts:
        for source in (calls.submit_latency(repeats), calls.register_cycles()):
            for check in source:
                print_table([check])
                checks.append(check)
    if "engine" in parts:
        from benchmarks import ttft

        measured = ttft.measure(
            repeats,
            nixl=args.nixl.absolute() if args.nixl.is_dir() else None,
            report=lambda line: print(f"# {line}", flush=True),
            lengths=args.lengths or ttft.LENGTHS,
            idle_seconds=args.idle_seconds,
        )
        print_table(measured)
        checks += measured
    return checks, rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and judge.

    Args:
        argv: Arguments; None for the process's own.

    Returns:
        0 when every threshold is met.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=PARTS, action="append", help="this part only; may be repeated")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="medians of N (%(default)s)")
    parser.add_argument("--json", type=Path, default=Path("build/bench.json"), metavar="FILE", help="(%(default)s)")
    parser.add_argument(
        "--nixl", type=Path, default=Path("build/nixl"), metavar="DIR", help="folder with nixl, if any (%(default)s)"
    )
    parser.add_argument(
        "--lengths", type=_lengths, metavar="N,N", help="prompts of the engine part, tokens (501,2003,6007)"
    )
    parser.add_argument(
        "--idle-seconds", type=float, default=60.0, metavar="S", help="how long idle engines are watched (%(default)s)"
    )
    args = parser.parse_args(argv)
    load = os.getloadavg()[0]
    print(f"{_processor()}, {os.cpu_count()} cores, Linux {platform.release()}, load {load:.2f}", flush=True)
    if load > 0.5:
        print("something else is running on this machine: expect noise", file=sys.stderr)
    checks, rows = _measure(args)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    machine = {"processor": _processor(), "cores": os.cpu_count(), "kernel": platform.release(), "load": load}
    args.json.write_text(
        json.dumps(
            {
                "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "machine": machine,
                "checks": [check.as_dict() for check in checks],
                "transfers": rows,
            },
            indent=2,
        )
        + "\n",
        encoding="utf-8",
    )
    args.json.with_suffix(".md").write_text(markdown(checks), encoding="utf-8")
    missed = [check for check in checks if check.passed is False]
    print(f"{len(checks)} figures, {len(missed)} thresholds missed; {args.json}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
