"""One JSON line a pull, for tests, demos and fault finding (``kvlink.trace_file``)."""

from __future__ import annotations

import json
import os
import time
from typing import Any

from kvlink_vllm.log import get_logger

logger = get_logger()


class Trace:
    """Appends JSON lines to a file; several workers may share it.

    Args:
        path: The file, or None to write nothing.
    """

    def __init__(self, path: str | None) -> None:
        self._path = path

    def write(self, record: dict[str, Any]) -> None:
        """Writes one line in one system call, so that lines of several processes do not mix.

        Args:
            record: JSON-able values.
        """
        if self._path is None:
            return
        line = json.dumps({"time": time.time(), **record}, separators=(",", ":")) + "\n"
        try:
            handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(handle, line.encode())
            finally:
                os.close(handle)
        except OSError as error:
            logger.warning("kvlink: the trace file %s cannot be written and is given up: %s", self._path, error)
            self._path = None
