"""Finding where a packing puts tokens: vLLM's own on this CPU, the documented one, and ones that cannot be found."""

from __future__ import annotations

import pytest
import torch
from tests.lmcache.mover_caches import packed

from kvlink_lmcache.mover.packing import PackingError, discover
from kvlink_lmcache.mover.planes import Geometry, build_pieces
from kvlink_lmcache.mover.transfer import Mover


def _store(cache, key, value, slots):
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    from vllm import _custom_ops

    blocks, heads, size, width = cache.shape
    halves = cache.view(blocks, heads, size * 2, width // 2).chunk(2, dim=2)
    isa = _get_attn_isa(cache.dtype, size, width // 2)
    _custom_ops.cpu_attn_reshape_and_cache(key, value, *halves, slots, isa)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("size", "head"), [(16, 64), (32, 64), (128, 64), (128, 128), (32, 80)])
def test_vllms_own_packing(dtype, size, head):
    """Tokens written by vLLM's operation come out of the mover as they went in, and the other way round."""
    from kvlink_lmcache.vllm.packing import cpu_packing

    heads, blocks = 3, 4
    generator = torch.Generator().manual_seed(1)
    count = size * 2 + 5
    key, value = (torch.randn(count, heads, head, generator=generator).to(dtype) for _ in range(2))
    cache = torch.zeros(blocks, heads, size, 2 * head, dtype=dtype)
    slots = torch.tensor([block * size + token for block in (2, 0, 3) for token in range(size)])[:count]
    _store(cache, key, value, slots)
    geometry = Geometry(size, heads, head, layout="HND")
    mover = Mover(build_pieces([cache], geometry, cpu_packing(cache, geometry)), form="tokens")
    memory = torch.zeros(count * mover.token_bytes, dtype=torch.uint8)
    mover.load(memory, slots.tolist())
    assert torch.equal(memory.view(dtype).view(2, count, heads, head), torch.stack([key, value]))
    again = torch.zeros_like(cache)
    back = Mover(build_pieces([again], geometry, cpu_packing(again, geometry)), form="tokens")
    back.store(memory, slots.tolist())
    assert torch.equal(again, cache)


def test_the_documented_packing_needs_no_index():
    found = packed(1, 2, 3, 8, 4, torch.float32, 1).packing
    # K transposed, V as it comes, each head its own area of 2 * 8 * 4 elements.
    assert (found.k.offset, found.k.token_stride, found.k.strides) == (0, 1, (64, 8))
    assert (found.v.offset, found.v.token_stride, found.v.strides) == (32, 4, (64, 1))


def test_a_packing_without_strides_gets_an_index():
    found = packed(1, 2, 1, 8, 4, torch.float32, 1, permute=True).packing
    places = torch.cat([found.k.index.reshape(-1), found.v.index.reshape(-1)])
    assert sorted(places.tolist()) == list(range(64))


def test_more_values_than_one_digit_holds():
    found = packed(1, 1, 2, 64, 64, torch.bfloat16, 1).packing
    assert found.k.token_stride == 1
    assert found.k.strides == (2 * 64 * 64, 64)


def test_an_operation_that_loses_values_is_refused():
    def write(key, value, cache):
        cache.view(-1)[: key.numel()] = key.reshape(-1)  # and nothing of the values

    with pytest.raises(PackingError, match="0 of 8 values of V"):
        discover(write, heads=1, tokens=4, head_size=2, dtype=torch.float32)


def test_an_operation_that_scales_is_refused():
    def write(key, value, cache):
        cache.view(-1)[: key.numel()] = key.reshape(-1) / 2

    with pytest.raises(PackingError, match="changed values"):
        discover(write, heads=1, tokens=4, head_size=2, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8])
def test_a_quantized_cache_is_refused_with_what_to_do(dtype):
    with pytest.raises(PackingError, match="--kv-cache-dtype auto"):
        discover(lambda *_: None, heads=1, tokens=4, head_size=2, dtype=dtype)


def test_caches_that_say_themselves_where_tokens_are_need_no_packing():
    from kvlink_lmcache.vllm.packing import cpu_packing

    geometry = Geometry(4, 2, 8)
    assert cpu_packing(torch.zeros(3, 4, 2, 8), geometry) is None
    assert cpu_packing(torch.zeros(3, 4, 16), Geometry(4, 1, 16, mla=True)) is None
