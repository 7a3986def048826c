"""The connector's logger: its own name, vLLM's handlers."""

from __future__ import annotations

import logging


def get_logger() -> logging.Logger:
    """Returns the logger "kvlink_vllm", which writes where vLLM's own loggers write.

    vLLM configures "vllm" only, so a logger with another name would drop everything below WARNING.
    """
    logger = logging.getLogger("kvlink_vllm")
    source = logging.getLogger("vllm")
    if not logger.handlers and source.handlers:
        for handler in source.handlers:
            logger.addHandler(handler)
        logger.setLevel(source.getEffectiveLevel())
    return logger
