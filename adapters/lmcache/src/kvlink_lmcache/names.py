"""Whose ``transfer_channel`` a name is."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from kvlink.errors import ConfigError

LMCACHE_CHANNELS = ("nixl", "mock_memory", "py_socket")


def is_kvlink(channel_type: Any) -> bool:
    """Tells whether a ``transfer_channel`` is one of kvlink's: ``auto`` or an installed provider.

    Args:
        channel_type: The value in LMCache's configuration.

    Raises:
        ConfigError: Neither kvlink's nor LMCache's; names what is near.
    """
    if channel_type is None or channel_type in LMCACHE_CHANNELS:
        return False
    from kvlink import registry

    known = ["auto", *(info.name for info in registry.channels())]
    if channel_type in known:
        return True
    near = get_close_matches(str(channel_type), [*known, *LMCACHE_CHANNELS], n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"pip install {registry.pip_name(str(channel_type))}"
    raise ConfigError(
        f"transfer_channel {channel_type!r} is neither an installed kvlink channel ({', '.join(known)}) nor one of "
        f"LMCache's ({', '.join(LMCACHE_CHANNELS)})",
        hint=hint,
    )
