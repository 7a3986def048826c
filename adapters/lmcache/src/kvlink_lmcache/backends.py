"""Storage backends: kvlink's PD backends where the channel is kvlink's, LMCache's everywhere else."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from kvlink_lmcache import context, names

_PD = "PDBackend"


def create(
    original: Callable[..., OrderedDict[str, Any]], config: Any, metadata: Any, *args: Any, **kwargs: Any
) -> Any:
    """Does what ``CreateStorageBackends`` does.

    Args:
        original: LMCache's function.
        config: LMCache's configuration.
        metadata: LMCache's metadata.
        *args: Its further arguments.
        **kwargs: Its further arguments; ``skip_backends`` names backends that exist already.

    Returns:
        Backends by name, the PD backend first.
    """
    context.enter(config, metadata)
    skipped = set(kwargs.get("skip_backends") or ())
    if config.enable_pd and _PD not in skipped and names.is_kvlink(config.transfer_channel):
        from kvlink_lmcache import pd, sizes

        sizes.report(config, metadata)
        backend = pd.create_pd_backend(config, metadata)
        if backend is not None:
            kwargs["skip_backends"] = frozenset({*skipped, _PD})
            return OrderedDict([(_PD, backend), *original(config, metadata, *args, **kwargs).items()])
    return original(config, metadata, *args, **kwargs)
