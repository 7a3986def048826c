"""Tells handles made before a fork from those made after it."""

from __future__ import annotations

import os

from .errors import ForkedError

generation = 0
"""Grows with every fork between this process and the first one; a handle keeps the value it was made under."""


def _count() -> None:
    global generation
    generation += 1


os.register_at_fork(after_in_child=_count)


def forked(operation: str) -> ForkedError:
    """Makes the error for the use of a parent's handle in a child process."""
    return ForkedError("it was made before this process was forked; make a new one in the child", operation=operation)
