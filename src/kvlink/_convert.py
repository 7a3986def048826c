"""Values as people write them in files and environments: numbers, booleans and sizes."""

from __future__ import annotations

import math
import re

from .errors import ConfigError

_TRUE = frozenset(("1", "true", "yes", "on"))
_FALSE = frozenset(("0", "false", "no", "off"))
_UNITS = {"": 1, "b": 1, "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9, "t": 10**12}
_UNITS |= {"tb": 10**12, "ki": 2**10, "kib": 2**10, "mi": 2**20, "mib": 2**20, "gi": 2**30, "gib": 2**30}
_UNITS |= {"ti": 2**40, "tib": 2**40}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", re.ASCII)


def to_bool(key: str, value: object) -> bool:
    """Reads a boolean: true, false, 1, 0, yes, no, on, off.

    Raises:
        ConfigError: Something else.
    """
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    if isinstance(value, str):
        text = value.strip().lower()
        if text in _TRUE:
            return True
        if text in _FALSE:
            return False
    raise ConfigError(f"{key} is {value!r}; expected true or false")


def to_number(key: str, value: object) -> int | float:
    """Reads a number; integers stay exact.

    Raises:
        ConfigError: No number, or not a finite one.
    """
    number: int | float | None = None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        number = value
    elif isinstance(value, str):
        try:
            number = int(value)
        except ValueError:
            try:
                number = float(value)
            except ValueError:
                number = None
    if number is None or not math.isfinite(number):
        raise ConfigError(f"{key} is {value!r}; expected a number")
    return number


def to_size(key: str, value: object) -> int:
    """Reads a number of bytes: 4096, "64KiB", "2 GiB", "1.5MB" (KiB = 1024, KB = 1000).

    Raises:
        ConfigError: Not such a text, negative, or not a whole number of bytes.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        unit = _UNITS.get(match[2].lower())
        if unit is not None:
            if "." not in match[1]:
                return int(match[1]) * unit
            size = float(match[1]) * unit
            if size == int(size):
                return int(size)
    raise ConfigError(f"{key} is {value!r}; expected a size in bytes, for instance 4096, '64KiB' or '2GiB'")
