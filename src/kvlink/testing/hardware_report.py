"""Runs one step of a hardware test in a child process, and writes the report: on disk before and after every step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

_OUTPUT_LIMIT = 200_000
_LOG_LIMIT = 8_000
_LOG_FILES = 6
_STACKS_SECONDS = 5.0
_DEATH_SECONDS = 15.0


@dataclass(frozen=True)
class StepResult:
    """How a step ended.

    Attributes:
        name: The step.
        status: "ok", "failed" (it said so), "crashed", "hung" or "skipped".
        seconds: How long it took.
        reason: Why, when it is not "ok".
        output: What it printed; the end of it where that is long.
        vendor_logs: The end of what each of the vendor's log files gained meanwhile, by file name.
    """

    name: str
    status: str
    seconds: float
    reason: str = ""
    output: str = ""
    vendor_logs: Mapping[str, str] = field(default_factory=dict)


def log_folder() -> Path:
    """Returns where CANN writes its logs."""
    return Path(os.environ.get("ASCEND_PROCESS_LOG_PATH") or Path.home() / "ascend" / "log")


def _log_sizes(folder: Path) -> dict[Path, int]:
    sizes = {}
    for path in folder.rglob("*.log") if folder.is_dir() else ():
        try:
            sizes[path] = path.stat().st_size
        except OSError:
            pass  # rotated away in this moment
    return sizes


def _log_tails(folder: Path, before: Mapping[Path, int]) -> dict[str, str]:
    """Reads the end of what log files gained since ``before``, the fullest first."""
    gained = {path: size - before.get(path, 0) for path, size in _log_sizes(folder).items()}
    tails = {}
    for path in sorted((path for path in gained if gained[path] > 0), key=lambda path: -gained[path])[:_LOG_FILES]:
        try:
            with path.open("rb") as stream:
                stream.seek(-min(gained[path], _LOG_LIMIT), os.SEEK_END)
                tails[str(path.relative_to(folder))] = stream.read().decode("utf-8", "replace")
        except OSError:
            pass  # rotated away in this moment
    return tails


def _end(child: subprocess.Popen[bytes]) -> str:
    """Ends a hung child and all it started, asking for the stacks of its threads first; returns what could not be."""
    for number, seconds in ((signal.SIGABRT, _STACKS_SECONDS), (signal.SIGKILL, _DEATH_SECONDS)):
        _signal_group(child, number)
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
        _signal_group(child, signal.SIGKILL)  # what it started may still be there
        return ""
    return f"; process {child.pid} cannot be killed: it waits in the driver"


def _signal_group(child: subprocess.Popen[bytes], number: int) -> None:
    try:
        os.killpg(child.pid, number)
    except ProcessLookupError:
        pass


def _read_end(path: Path) -> str:
    with path.open("rb") as stream:
        stream.seek(0, os.SEEK_END)
        size = stream.tell()
        stream.seek(max(0, size - _OUTPUT_LIMIT))
        text = stream.read().decode("utf-8", "replace").strip()
    return text if size <= _OUTPUT_LIMIT else f"... the whole is in {path.name}\n{text}"


def run_step(name: str, command: Sequence[str], limit: float, folder: Path) -> StepResult:
    """Runs a command in a process group of its own, its output in a file that survives whatever happens.

    Args:
        name: The step; names the file.
        command: What to run.
        limit: Seconds after which it is ended.
        folder: Of the report.

    Returns:
        How it ended.
    """
    path = folder / f"{name}.txt"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "KVLINK_REPORT_FOLDER": str(folder)}
    # The child must find what this process found, and must not pick up a module from the current folder.
    environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    environment["PYTHONSAFEPATH"] = "1"
    logs = log_folder()
    before = _log_sizes(logs)
    start = time.monotonic()
    with path.open("wb") as output:
        child = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            child.wait(limit)
            leftover = ""
            hung = False
        except subprocess.TimeoutExpired:
            hung = True
            leftover = _end(child)
        except BaseException:
            _signal_group(child, signal.SIGKILL)
            raise
    seconds = time.monotonic() - start
    status, reason = _verdict(child.returncode, hung, limit)
    return StepResult(name, status, seconds, reason + leftover, _read_end(path), _log_tails(logs, before))


def _verdict(code: int | None, hung: bool, limit: float) -> tuple[str, str]:
    if hung:
        return "hung", f"it did not end within {limit:g} s and was ended; the stacks of its threads are in its output"
    if code is not None and code < 0:
        return "crashed", f"it was killed by {signal.Signals(-code).name}"
    return ("ok", "") if code == 0 else ("failed", f"it ended with exit code {code}")


class Report:
    """``report.txt`` for people and ``report.jsonl`` for programs, in one folder, flushed to the disk as they grow."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder = folder.absolute()
        self.folder.mkdir(parents=True)
        self.results: list[StepResult] = []
        self._write(
            "kvlink hardware report\n" + "".join(f"{key}: {value}\n" for key, value in about.items()),
            {"kind": "about", **about},
        )

    def begin(self, title: str, limit: float) -> None:
        """Says that a step starts: the last line, should the whole host go down."""
        self._write(f"\n=== {title} starts, {limit:g} s at most", {"kind": "begin", "step": title, "limit": limit})

    def add(self, title: str, result: StepResult) -> None:
        """Writes how a step ended."""
        self.results.append(result)
        reason = f": {result.reason}" if result.reason else ""
        lines = [f"=== {title}: {result.status} after {result.seconds:.1f} s{reason}"]
        if result.output:
            lines.append(result.output)
        for name, tail in result.vendor_logs.items():
            lines += [f"--- vendor's log {name}", tail.rstrip()]
        self._write("\n".join(lines), {"kind": "result", **asdict(result)}, show=lines[0])

    def finish(self) -> bool:
        """Writes the summary; returns whether every step ended well."""
        counts = {status: sum(result.status == status for result in self.results) for status in _STATUSES}
        text = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        lines = [f"\n=== summary: {text}"]
        lines += [f"{result.name}: {result.status}: {result.reason}" for result in self.results if result.reason]
        self._write("\n".join(lines), {"kind": "summary", **counts})
        return counts["ok"] == len(self.results)

    def _write(self, text: str, row: Mapping[str, Any], *, show: str | None = None) -> None:
        print((text if show is None else show).lstrip("\n"), flush=True)
        for name, content in (("report.txt", text), ("report.jsonl", json.dumps(row))):
            with (self.folder / name).open("a", encoding="utf-8") as stream:
                stream.write(content + "\n")
                _flush(stream)


_STATUSES = ("ok", "failed", "crashed", "hung", "skipped")


def _flush(stream: IO[str]) -> None:
    stream.flush()
    os.fsync(stream.fileno())
