"""kvlink's channels for LMCache.

Installing the package is enough: vLLM's and LMCache's entry points call :func:`kvlink_lmcache.registration.register` in
every process. The connector for vLLM is ``kvlink_lmcache.vllm.KVLinkLMCacheConnector``. Importing this package imports
neither lmcache, vllm nor torch.
"""

from __future__ import annotations

__version__ = "0.1.0"

__all__ = ["__version__"]
