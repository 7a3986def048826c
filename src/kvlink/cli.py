"""The ``kvlink`` command.

Subcommands are loaded when they are used: ``kvlink --help`` imports neither the engine nor a benchmark. Exit codes:
0 well, 1 the answer is no (a probe, a failed test), 2 wrong input, 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from .errors import ConfigError, KvlinkError

_COMMANDS = {
    "channels": "list the installed channels and whether they work here",
    "probe": "can this host use a channel, and if not why",
    "conform": "run the conformance kit against a channel",
    "bench": "measure transfers between two processes on this host",
    "proxy": "the router in front of disaggregated vLLM engines",
}


class _Parser(argparse.ArgumentParser):
    """Answers wrong input with one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _main_parser() -> _Parser:
    width = max(map(len, _COMMANDS))
    listing = "\n".join(f"  {name:{width}}  {text}" for name, text in _COMMANDS.items())
    parser = _Parser(
        prog="kvlink",
        description="Moves LLM KV-cache blocks between processes, hosts and accelerators.",
        epilog=f"commands:\n{listing}\n\n`kvlink COMMAND --help` says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.add_argument("command", nargs="?", metavar="COMMAND", choices=list(_COMMANDS), help="see below")
    return parser


def _command_parser(name: str) -> _Parser:
    return _Parser(prog=f"kvlink {name}", description=_COMMANDS[name][0].upper() + _COMMANDS[name][1:] + ".")


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")


def _channels(arguments: Sequence[str]) -> int:
    parser = _command_parser("channels")
    parser.add_argument("--json", action="store_true", help="print a JSON array")
    parser.add_argument("--no-probe", action="store_true", help="do not ask whether they work here; start no process")
    parsed = parser.parse_args(arguments)
    from .registry import channels

    rows: list[dict[str, Any]] = [
        {"name": info.name, "distribution": info.distribution, "version": info.version} for info in channels()
    ]
    if not parsed.no_probe:
        for row, (usable, reason) in zip(rows, _ask_all([row["name"] for row in rows]), strict=True):
            row.update(usable=usable, reason=reason)
    if parsed.json:
        _print(json.dumps(rows, indent=2))
        return 0
    if not rows:
        _print("no channel is installed")
        return 0
    table = [("NAME", "PACKAGE", "VERSION", "" if parsed.no_probe else "HERE")]
    for row in rows:
        here = "" if parsed.no_probe else "usable" if row["usable"] else f"not usable: {row['reason']}"
        table.append((row["name"], row["distribution"], row["version"], here))
    widths = [max(len(row[column]) for row in table) for column in range(3)] + [0]
    for line in table:
        _print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return 0


def _ask_all(names: Sequence[str]) -> list[tuple[bool, str]]:
    """Probes channels side by side, each in its own child; a name that two distributions offer is not usable."""
    from concurrent.futures import ThreadPoolExecutor

    from . import registry

    def ask(name: str) -> tuple[bool, str]:
        try:
            result = registry.probe(name)
        except KvlinkError as error:
            return False, error.message
        return result.usable, result.reason

    with ThreadPoolExecutor(max_workers=max(1, len(names))) as pool:
        return list(pool.map(ask, names))


def _probe(arguments: Sequence[str]) -> int:
    parser = _command_parser("probe")
    parser.add_argument("name", metavar="NAME", help="a channel, as `kvlink channels` lists it")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parsed = parser.parse_args(arguments)
    from .registry import probe

    result = probe(parsed.name)
    if parsed.json:
        _print(json.dumps(dataclasses.asdict(result), indent=2))
    elif result.usable:
        _print(f"{result.name}: usable")
    else:
        _print(f"{result.name}: not usable: {result.reason}")
    return 0 if result.usable else 1


def _lazy(name: str, module_name: str) -> Callable[[Sequence[str]], int]:
    """A command whose module has ``add_arguments(parser)`` and ``run(parsed) -> int``."""

    def run(arguments: Sequence[str]) -> int:
        module = importlib.import_module(module_name)
        parser = _command_parser(name)
        module.add_arguments(parser)
        return int(module.run(parser.parse_args(arguments)))

    return run


def _proxy(arguments: Sequence[str]) -> int:
    try:
        main_of_proxy: Callable[[list[str]], Any] = importlib.import_module("kvlink_proxy.cli").main
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("kvlink_proxy"):
            raise ConfigError(
                f"the proxy cannot start: module {error.name!r} is missing", hint="pip install kvlink-proxy"
            ) from error
        raise ConfigError("the proxy is not installed", hint="pip install kvlink-proxy") from None
    return int(main_of_proxy(list(arguments)) or 0)


_RUN: dict[str, Callable[[Sequence[str]], int]] = {
    "channels": _channels,
    "probe": _probe,
    "conform": _lazy("conform", "kvlink.testing.cli"),
    "bench": _lazy("bench", "kvlink.bench.cli"),
    "proxy": _proxy,
}


def _run(arguments: Sequence[str]) -> int:
    # What follows the command is the command's own, options included.
    parsed = _main_parser().parse_args(arguments[:1])
    if parsed.version:
        from .registry import kvlink_version

        _print(f"kvlink {kvlink_version()}")
        return 0
    if parsed.command is None:
        _main_parser().print_help()
        return 2
    return _RUN[parsed.command](arguments[1:])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; None takes this process's.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader went away (`kvlink channels | head -1`); keep the interpreter from flushing into the pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KvlinkError as error:
        name = f"kvlink {arguments[0]}" if arguments and arguments[0] in _COMMANDS else "kvlink"
        sys.stderr.write(f"{name}: error: {' '.join(str(error).split())}\n")
        return 2 if isinstance(error, ConfigError) else 1


if __name__ == "__main__":
    sys.exit(main())
