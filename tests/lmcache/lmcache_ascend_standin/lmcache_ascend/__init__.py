"""Stands for LMCache-Ascend where that cannot be installed: its factory, who calls it, how it puts itself in place."""

import lmcache.v1.storage_backend as _lmcache

from lmcache_ascend.v1.storage_backend import CreateStorageBackends

_lmcache.CreateStorageBackends = CreateStorageBackends
