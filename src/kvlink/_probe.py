"""``python -m kvlink._probe NAME``: the child process behind :func:`kvlink.probe`.

Prints one JSON object, ``{"usable": bool, "reason": str}``, on standard output and nothing else: what vendor libraries
print goes to standard error.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys

from ._engine import EngineProvider
from .errors import KvlinkError
from .registry import find


def answer(name: str) -> dict[str, bool | str]:
    """Probes a provider in this process.

    Args:
        name: A provider's name.

    Returns:
        ``usable`` and ``reason``, the latter empty when usable.
    """
    try:
        EngineProvider.load(find(name).library_path()).probe()
    except KvlinkError as error:
        return {"usable": False, "reason": error.message if not error.hint else f"{error.message} ({error.hint})"}
    return {"usable": True, "reason": ""}


def main() -> int:
    """Answers for the provider named on the command line."""
    # Keep the real standard output for the answer; everything else that writes to descriptor 1 goes to standard error.
    sys.stdout.flush()
    out = os.dup(1)
    os.dup2(2, 1)
    text = json.dumps(answer(sys.argv[1])) + "\n"
    os.write(out, text.encode())
    sys.stdout.flush()
    ctypes.CDLL(None).fflush(None)  # what a vendor library printed through stdio
    # No atexit, no destructors: a vendor library that crashes on unload must not spoil its answer.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
