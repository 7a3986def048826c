"""kvlink's channels for LMCache's multiprocess servers: ``lmcache server --p2p-transfer-engine host``.

Options come from the environment, as for every kvlink channel: ``KVLINK_SECRET_FILE``, ``KVLINK_OPTION_PATH``, ...
"""

from __future__ import annotations

import functools
from typing import Any

from kvlink import registry


def names() -> list[str]:
    """Returns the values of ``--p2p-transfer-engine`` that kvlink adds: "kvlink" (the best usable) and providers."""
    return ["kvlink", *(info.name for info in registry.channels())]


def register(factory_module: Any) -> None:
    """Registers kvlink's factories with LMCache's own registry; a name that is taken stays as it is.

    Args:
        factory_module: ``lmcache.v1.distributed.transfer_channel.factory``.
    """
    for name in names():
        try:
            factory_module.register_transfer_channel_factory(name, functools.partial(create, name))
        except ValueError:  # registered before, by this or by LMCache
            continue


def create(name: str, *, l1_memory_desc: Any, listen_url: str, advertise_url: str, **extra: Any) -> Any:
    """Creates a context; called by LMCache at server start.

    Args:
        name: "kvlink" or a provider's name.
        l1_memory_desc: LMCache's description of the memory to register.
        listen_url: "host:port" to bind.
        advertise_url: "host:port" that peers connect to, and by which they know this server.
        extra: Keywords of LMCache for other implementations.

    Raises:
        ConfigError: A wrong address or option, or no secret beyond loopback.
        ChannelUnavailableError: This host cannot use the provider.
    """
    from .context import KVLinkTransferChannelContext

    return KVLinkTransferChannelContext(l1_memory_desc, listen_url, advertise_url, transfer_channel=name, **extra)
