"""``kvlink conform``: runs the conformance kit against an installed provider."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..errors import ConfigError, KvlinkError
from .report import line, table, to_json, write_junit
from .runner import run_all
from .suite import GROUPS, PROFILES, Case, CaseResult, ConformanceFailure, Settings, select_cases


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``kvlink conform``."""
    parser.add_argument("name", help="the channel to test, as `kvlink channels` lists it")
    parser.add_argument("--profile", choices=PROFILES, default="quick", help="load: seconds; quick: a minute; full")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="an option of the provider")
    parser.add_argument("--device", default="cpu", help='"cpu", "npu:0"')
    parser.add_argument(
        "--devices", default="", metavar="NAMES", help="npu:0,npu:1: one a process, where a link connects two devices"
    )
    parser.add_argument(
        "--memory", default="", metavar="KINDS", help="kinds that must be served: plain,allocated,device"
    )
    parser.add_argument(
        "--plain-alignment", type=int, default=1, metavar="BYTES", help="of plain memory, where other is refused"
    )
    parser.add_argument("--stream", default="", metavar="MODULE:FUNCTION", help="returns a device stream's handle")
    parser.add_argument("--group", action="append", choices=GROUPS, help="only this group; may be repeated")
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose name contains this")
    parser.add_argument("--hook", action="append", metavar="KEY=VALUE", help="run through the hook, with its options")
    parser.add_argument("--list", action="store_true", help="print the cases and run nothing")
    parser.add_argument("--junit", metavar="FILE", help="write JUnit XML")
    parser.add_argument("--json", metavar="FILE", help='write JSON; "-" prints it and nothing else')


def parse_pairs(pairs: list[str]) -> dict[str, object]:
    """Splits KEY=VALUE texts.

    Raises:
        ConfigError: One has no "=".
    """
    values: dict[str, object] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"{pair!r} is not KEY=VALUE")
        values[key] = value
    return values


def run(args: argparse.Namespace) -> int:
    """Runs ``kvlink conform``.

    Returns:
        0 when every case passed or was skipped as declared, 1 when one failed, 2 when the provider cannot be tested.
    """
    try:
        settings = Settings(
            provider=args.name,
            options=parse_pairs(args.option),
            device=args.device,
            profile=args.profile,
            through_hook=args.hook is not None,
            hook_options=parse_pairs(args.hook or []),
            memory=tuple(filter(None, args.memory.split(","))),
            stream=args.stream,
            devices=tuple(filter(None, args.devices.split(","))),
            plain_alignment=args.plain_alignment,
        )
        cases = select_cases(settings, args.group, args.case)
        if args.list:
            print("\n".join(case.id for case in cases))
            return 0
        return _run(settings, cases, args)
    except (KvlinkError, ConformanceFailure) as error:
        print(f"kvlink conform: {error}", file=sys.stderr)
        return 2


def _run(settings: Settings, cases: list[Case], args: argparse.Namespace) -> int:
    only_json = args.json == "-"

    def show(result: CaseResult) -> None:
        if not only_json:
            print(line(result), flush=True)

    about, results = run_all(settings, cases, show)
    document = to_json(settings, about, results)
    if only_json:
        print(json.dumps(document, indent=2))
    else:
        print(f"\n{about['provider']} {about['version']} with kvlink {about['kvlink']}, profile {settings.profile}")
        print(table(results))
    if args.json and not only_json:
        Path(args.json).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if args.junit:
        write_junit(args.junit, settings.provider, results)
    return 1 if any(result.status == "failed" for result in results) else 0
