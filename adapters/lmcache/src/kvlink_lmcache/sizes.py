"""Says at start how many tokens the PD buffer holds and how many bytes the longest sequence needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from kvlink.errors import ConfigError
from kvlink_lmcache import context
from kvlink_lmcache.log import get_logger

logger = get_logger()


@dataclass(frozen=True)
class Capacity:
    """What a PD buffer holds.

    Attributes:
        size: Its bytes, as configured.
        chunk_bytes: Bytes of a chunk on this rank.
        chunk_tokens: Tokens of a chunk.
        longest: Tokens of the longest sequence, 0 where nobody said.
    """

    size: int
    chunk_bytes: int
    chunk_tokens: int
    longest: int

    @property
    def chunks(self) -> int:
        """Whole chunks that fit."""
        return self.size // self.chunk_bytes

    @property
    def tokens(self) -> int:
        """Tokens that fit; a partial chunk takes the room of a whole one."""
        return self.chunks * self.chunk_tokens

    def bytes_for(self, tokens: int) -> int:
        """Returns the bytes that so many tokens of one request take.

        Args:
            tokens: Tokens.
        """
        return math.ceil(tokens / self.chunk_tokens) * self.chunk_bytes

    def refusal(self, tokens: int) -> str | None:
        """Says why a request can never fit, or returns None.

        Args:
            tokens: Its prompt's tokens.
        """
        if tokens <= self.tokens:
            return None
        return (
            f"a prompt of {tokens} tokens needs {self.bytes_for(tokens)} bytes of PD buffer; pd_buffer_size "
            f"{self.size} holds {self.tokens} tokens: set pd_buffer_size to at least {self.bytes_for(tokens)}"
        )


def capacity(config: Any, metadata: Any) -> Capacity:
    """Returns what ``pd_buffer_size`` holds.

    Args:
        config: LMCache's configuration.
        metadata: LMCache's metadata.
    """
    chunk_bytes = math.prod(metadata.kv_shape) * metadata.kv_dtype.itemsize
    return Capacity(int(config.pd_buffer_size), chunk_bytes, int(metadata.kv_shape[2]), context.engine.max_model_len)


def report(config: Any, metadata: Any) -> Capacity:
    """Logs what ``pd_buffer_size`` holds, as a warning where the longest sequence does not fit.

    Args:
        config: LMCache's configuration.
        metadata: LMCache's metadata.

    Returns:
        The same as numbers.

    Raises:
        ConfigError: Not even one chunk fits.
    """
    found = capacity(config, metadata)
    if found.chunks == 0:
        raise ConfigError(
            f"pd_buffer_size {found.size} is smaller than one chunk of {found.chunk_tokens} tokens ("
            f"{found.chunk_bytes} bytes): set it to at least {max(found.chunk_bytes, found.bytes_for(found.longest))}"
        )
    text = f"pd_buffer_size {found.size} ({config.pd_role}) holds {found.tokens} tokens a rank"
    if not found.longest:
        logger.info("%s", text)
    elif found.longest > found.tokens:
        logger.warning(
            "%s; max-model-len %d needs %d bytes: longer prompts are not handed over but computed by the decoder",
            text, found.longest, found.bytes_for(found.longest),
        )  # fmt: skip
    else:
        logger.info("%s; max-model-len %d needs %d bytes", text, found.longest, found.bytes_for(found.longest))
    return found
