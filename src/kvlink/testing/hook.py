"""The hook provider: wraps another provider, makes it fail on demand and watches the contract (``src/testing``).

It is test equipment and no installed channel; :func:`install` makes it one for this process and its children.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._native import library_path
from ..registry import Option, ProviderSpec, find

INJECTED_CODE = 4937292
"""Vendor code of every injected failure."""

_PROVIDER = "KVLINK_HOOK_PROVIDER"
_LIBRARY = "KVLINK_HOOK_LIBRARY"

OPTIONS = (
    Option("hook_fail", "str", None, "FUNCTION:N[+][:STATUS],...: the n-th call (or all from it on) fails"),
    Option("hook_mask", "str", None, "capabilities to hide: CANCEL,COPY"),
    Option("hook_mode", "str", None, "both: connect mode BOTH over any provider", choices=("provider", "both")),
    Option("hook_rendezvous", "str", None, "folder where the two sides of a link meet"),
    Option("hook_alignment", "int", None, "alignment of ranges to declare"),
    Option("hook_max_ranges", "int", None, "ranges in one submit to declare"),
    Option("hook_max_range_bytes", "int", None, "bytes in one range to declare"),
    Option("hook_max_connects", "int", None, "connects at once to declare"),
    Option("hook_depth", "int", None, "accepted submits at once; more are told to try again"),
    Option("hook_delay_ms", "int", None, "completions come so many milliseconds later"),
    Option("hook_defer_ms", "int", None, "submits reach the provider so many milliseconds later"),
    Option("hook_connect_ms", "int", None, "connects take so many milliseconds longer"),
    Option("hook_lie", "str", None, "break the contract", choices=("drop", "shift", "early", "twice")),
    Option("hook_log", "str", None, "file for the call log and the violations of the contract"),
)


def _spec() -> ProviderSpec:
    inner = find(os.environ[_PROVIDER])
    return ProviderSpec(
        name="hook",
        library=lambda: library_path("hook"),
        priority=-1000,
        options=inner.options + OPTIONS,
        devices=inner.devices,
        exclusion_group=inner.exclusion_group,
        summary=f"test equipment over {inner.name!r}",
    )


def __getattr__(name: str) -> Any:
    # The entry point of the installed hook; made on demand because it depends on the wrapped provider.
    if name == "SPEC":
        return _spec()
    raise AttributeError(name)


def install(inner: str) -> str:
    """Makes the channel "hook" over the provider ``inner`` available in this process and in its children.

    A distribution of one entry point is put on ``sys.path``, in a folder that goes with this process.

    Returns:
        The name to open: "hook".

    Raises:
        ChannelNotFoundError: ``inner`` is not installed.
        ChannelUnavailableError: A library is missing.
    """
    os.environ[_LIBRARY] = find(inner).library_path()
    library_path("hook")
    if os.environ.get(_PROVIDER) is None:
        folder = Path(tempfile.mkdtemp(prefix="kvlink-hook-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        metadata = folder / "kvlink_hook-0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kvlink-hook\nVersion: 0\n")
        (metadata / "entry_points.txt").write_text("[kvlink.channels]\nhook = kvlink.testing.hook:SPEC\n")
        sys.path.append(str(folder))
    os.environ[_PROVIDER] = inner
    return "hook"


@dataclass
class CallLog:
    """What the hook wrote down.

    Attributes:
        calls: Number of calls by (function, status).
        order: Functions in the order in which their calls returned.
        violations: Where the core or the provider broke the contract; who comes first.
    """

    calls: dict[tuple[str, str], int] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    def count(self, function: str, status: str = "OK") -> int:
        """Returns how many calls of ``function`` returned ``status``."""
        return self.calls.get((function, status), 0)


def read_log(path: str | os.PathLike[str]) -> CallLog:
    """Reads a file that ``hook_log`` named."""
    log = CallLog()
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        kind, _, rest = line.partition(" ")
        if kind == "VIOLATION":
            log.violations.append(rest)
        elif kind == "CALL":
            _, _, function, _, status = rest.split()
            log.calls[function, status] = log.calls.get((function, status), 0) + 1
            log.order.append(function)
    return log
