"""The adapter's logger: its own name, with the handlers of whoever hosts it."""

from __future__ import annotations

import logging


def get_logger() -> logging.Logger:
    """Returns the logger "kvlink_lmcache" as a child of "vllm".

    In a vLLM process "vllm" is the logger that has level and handlers, some versions long after this module is
    imported. In `lmcache server` it has none, and records go on to the root logger as they would without it.
    """
    logger = logging.getLogger("kvlink_lmcache")
    logger.parent = logging.getLogger("vllm")
    return logger
