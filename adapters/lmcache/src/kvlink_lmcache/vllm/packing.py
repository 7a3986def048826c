"""How vLLM's CPU backend packs its cache, found with its own operation."""

from __future__ import annotations

import inspect
import time

import torch

from kvlink_lmcache.log import get_logger
from kvlink_lmcache.mover.packing import Packing, PackingError, discover
from kvlink_lmcache.mover.planes import Geometry

logger = get_logger()


def cpu_packing(tensor: torch.Tensor, geometry: Geometry) -> Packing | None:
    """Finds the packing of a CPU cache tensor.

    Args:
        tensor: A layer's ``[blocks, heads, tokens, 2 * head_size]`` cache.
        geometry: What the engine says.

    Returns:
        The packing, or None for a cache that is not of this form, which says itself where tokens are.

    Raises:
        PackingError: Of this form, but vLLM has no such operation, or a packing that cannot be found out.
    """
    if tensor.device.type != "cpu" or geometry.mla or tensor.dim() != 4:
        return None
    if tensor.shape[1] != geometry.kv_heads or tensor.shape[3] != 2 * geometry.head_size:
        return None
    try:
        from vllm.v1.attention.backends import cpu_attn

        from vllm import _custom_ops

        name = cpu_attn._get_attn_isa
    except (ImportError, AttributeError) as error:
        raise PackingError(
            f"this vLLM has no operation that stores into its CPU cache ({error}): install vLLM >= 0.23"
        ) from None
    tokens, dtype = int(tensor.shape[2]), tensor.dtype
    given = (dtype, tokens, geometry.head_size, None)
    isa = name(*given[: len(inspect.signature(name).parameters)])

    def write(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor) -> None:
        flat = cache.view(cache.shape[0], cache.shape[1], cache.shape[2] * 2, -1)
        key_cache, value_cache = flat.chunk(2, dim=2)
        slots = torch.arange(key.shape[0], dtype=torch.long)
        _custom_ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slots, isa)

    began = time.perf_counter()
    packing = discover(write, heads=geometry.kv_heads, tokens=tokens, head_size=geometry.head_size, dtype=dtype)
    logger.debug("the CPU's %s packing was found in %.0f ms", isa, (time.perf_counter() - began) * 1e3)
    return packing
