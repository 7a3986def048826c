"""Makes kvlink's channels known to LMCache in this process: once, from anywhere, without importing lmcache.

vLLM calls :func:`register` through its plugin entry point in every process (API server, engine core, workers, forked or
spawned); the connector module calls it too, for set-ups that switch plugins off.
"""

from __future__ import annotations

import threading

_lock = threading.Lock()
_done = False


def register() -> None:
    """Waits for LMCache's modules and replaces in them what ``patches`` lists. Further calls do nothing."""
    global _done
    with _lock:
        if _done:
            return
        _done = True
    from kvlink_lmcache import patches, versions
    from kvlink_lmcache.hooks import after_import

    after_import("lmcache", versions.check_lmcache)
    for module, patch in patches.PATCHES:
        after_import(module, patch)
