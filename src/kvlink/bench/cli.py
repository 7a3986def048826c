"""``kvlink bench``: one measurement, as a table or as JSON."""

from __future__ import annotations

import argparse
import json
import sys

from ..errors import ConfigError, KvlinkError
from ._plan import OPERATIONS, PATHS, Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``kvlink bench``.

    Args:
        parser: Where to.
    """
    parser.add_argument("--path", choices=PATHS, required=True, help="how the bytes travel")
    parser.add_argument("--op", choices=OPERATIONS, default="put", help="who moves them (%(default)s)")
    parser.add_argument("--block-size", type=_size, default=65536, metavar="N", help="bytes, or 64K, 1M (%(default)s)")
    parser.add_argument("--blocks", type=int, default=1024, metavar="N", help="blocks in one transfer (%(default)s)")
    parser.add_argument("--contiguous", action="store_true", help="blocks follow one another (default: scattered)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="the median counts (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the block lists (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _size(text: str) -> int:
    factor = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:].upper(), 1)
    return int(text[:-1] if factor > 1 else text) * factor


def run(args: argparse.Namespace) -> int:
    """Measures and prints.

    Args:
        args: The parsed arguments.

    Returns:
        The exit status.
    """
    from . import _runner

    try:
        plan = Plan(
            path=args.path,
            op=args.op,
            block_size=args.block_size,
            blocks=args.blocks,
            contiguous=args.contiguous,
            repeats=args.repeats,
            seed=args.seed,
        )
        result = _runner.run(plan)
    except KvlinkError as error:
        print(f"kvlink bench: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    if args.json:
        print(json.dumps(result.as_dict()))
        return 0
    kind = "contiguous" if result.contiguous else "scattered"
    print(f"{result.path} {result.op}, {result.blocks} {kind} blocks of {result.block_size} bytes")
    print(f"  transfer   {result.gb_per_s:8.2f} GB/s  {result.blocks_per_s:12,.0f} blocks/s")
    print(f"  limit      {result.limit_gb_per_s:8.2f} GB/s  {result.limit_name}")
    print(f"  ratio      {result.ratio_to_limit:8.2f}")
    print(f"  one block  {result.p50_us:8.1f} us p50 {result.p99_us:8.1f} us p99")
    if result.limit_p50_us is not None:
        print(f"  socket     {result.limit_p50_us:8.1f} us p50 of a blocking exchange of one block")
    return 0
