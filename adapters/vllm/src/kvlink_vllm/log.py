"""The connector's logger: its own name, vLLM's level and handlers."""

from __future__ import annotations

import logging


def get_logger() -> logging.Logger:
    """Returns the logger "kvlink_vllm" as a child of "vllm".

    vLLM configures "vllm" only, some versions long after this module is imported; with it as the parent, level and
    handlers are looked up there when something is logged. A level set on "kvlink_vllm" itself still counts.
    """
    logger = logging.getLogger("kvlink_vllm")
    logger.parent = logging.getLogger("vllm")
    return logger
