"""Prompts of exact lengths: token ids, so that no tokenizer decides where a block ends."""

from __future__ import annotations

import random

# The model's vocabulary without its special tokens and the last pieces.
FIRST, LAST = 10, 3000


def prompt(length: int, seed: int = 0) -> list[int]:
    """The same tokens for the same arguments; other arguments differ from the first token on, so no prefix is shared.

    Args:
        length: Tokens.
        seed: Any number.
    """
    numbers = random.Random(f"{seed}/{length}")
    return [FIRST + (seed * 37 + length) % (LAST - FIRST), *(numbers.randrange(FIRST, LAST) for _ in range(length - 1))]
