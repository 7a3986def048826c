"""The mover behind LMCache's GPU connector interface, with LMCache's own memory objects."""

from __future__ import annotations

import pytest
import torch
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj
from lmcache.v1.metadata import LMCacheMetadata
from tests.lmcache.mover_caches import latent, pairs

from kvlink_lmcache import context
from kvlink_lmcache.mover.connector import PagedConnector

LAYERS, BLOCKS, HEADS, SIZE, HEAD = 2, 8, 2, 4, 4


def metadata(*, heads=HEADS, head=HEAD, mla=False, chunk=8):
    return LMCacheMetadata(
        model_name="m",
        world_size=1,
        local_world_size=1,
        worker_id=0,
        local_worker_id=0,
        kv_dtype=torch.float32,
        kv_shape=(LAYERS, 1 if mla else 2, chunk, heads, head),
        use_mla=mla,
        role="worker",
        chunk_size=chunk,
    )


def objects(about, lengths):
    made = []
    for tokens in lengths:
        shape = about.get_shapes(tokens)[0]
        raw = torch.zeros(shape.numel() * 4 + 32, dtype=torch.uint8)
        meta = MemoryObjMetadata(shape, torch.float32, 0, raw.numel(), 1, fmt=MemoryFormat.KV_2LTD)
        made.append(TensorMemoryObj(raw_data=raw, metadata=meta, parent_allocator=None))
    return made


def connector(about, **options):
    return PagedConnector(about, layout="NHD", block_size=SIZE, **options)


@pytest.mark.parametrize("form", ["blocks", "tokens"])
def test_a_request_goes_out_and_comes_in(form):
    about = metadata()
    source, target = (
        pairs(LAYERS, BLOCKS, HEADS, SIZE, HEAD, torch.float32, 1),
        pairs(LAYERS, BLOCKS, HEADS, SIZE, HEAD, torch.float32, 500),
    )
    memory = objects(about, (8, 8, 3))
    starts, ends = [0, 8, 16], [8, 16, 19]
    there = torch.tensor([5, 1, 7, 0, 3]).repeat_interleave(SIZE) * SIZE + torch.arange(SIZE).repeat(5)
    here = torch.arange(20)
    connector(about, form=form).batched_from_gpu(memory, starts, ends, kvcaches=source.caches, slot_mapping=here[:19])
    before = target.everything()
    connector(about, form=form).batched_to_gpu(
        memory, starts, ends, kvcaches=target.caches, slot_mapping=there[:19], vllm_cached_tokens=10
    )
    expected = before.clone()
    for token in range(10, 19):
        expected[there[token]] = source.token(token)
    assert torch.equal(target.everything(), expected)


def test_one_chunk_at_a_time():
    about = metadata()
    source = pairs(LAYERS, BLOCKS, HEADS, SIZE, HEAD, torch.float32, 1)
    target = pairs(LAYERS, BLOCKS, HEADS, SIZE, HEAD, torch.float32, 500)
    (memory,) = objects(about, (5,))
    slots = torch.arange(32)
    connector(about).from_gpu(memory, 8, 13, kvcaches=source.caches, slot_mapping=slots)
    connector(about).to_gpu(memory, 8, 13, kvcaches=target.caches, slot_mapping=slots)
    assert torch.equal(target.everything()[8:13], source.everything()[8:13])


def test_the_shape_is_lmcaches():
    assert connector(metadata()).get_shape(5) == torch.Size([2, LAYERS, 5, HEADS * HEAD])
    assert connector(metadata(heads=1, mla=True)).get_shape(5) == torch.Size([1, LAYERS, 5, HEAD])


def test_a_model_that_keeps_more_for_a_token_is_told_to_lmcache():
    """Sparse attention: the indexer's cache is not in vLLM's head size, and LMCache would make objects too small."""
    about = metadata(heads=1, mla=True)
    cache = latent(LAYERS, BLOCKS, 1, SIZE, HEAD, torch.float32, 1, parts=(2, 3, 4))
    own = PagedConnector(about, block_size=SIZE)
    own.bind(cache.caches)
    assert about.kv_shape == (LAYERS, 1, 8, 1, 9 * HEAD)
    memory = objects(about, (7,))
    own.batched_from_gpu(memory, [0], [7], kvcaches=cache.caches, slot_mapping=torch.arange(7))


def test_the_layout_is_part_of_what_peers_compare(monkeypatch):
    monkeypatch.setattr(context, "engine", context.Engine())
    cache = pairs(LAYERS, BLOCKS, HEADS, SIZE, HEAD, torch.float32, 1)
    connector(metadata()).bind(cache.caches)
    assert context.engine.layout.startswith("blocks: 128 bytes a token, blocks of 4 #")


def test_caches_are_needed_once():
    with pytest.raises(ValueError, match="kvcaches is missing"):
        connector(metadata()).from_gpu(objects(metadata(), (1,))[0], 0, 1, slot_mapping=torch.arange(1))
    own = connector(metadata())
    own.initialize_kvcaches_ptr(kvcaches=pairs(LAYERS, BLOCKS, HEADS, SIZE, HEAD, torch.float32, 1).caches)
    own.from_gpu(objects(metadata(), (1,))[0], 0, 1, slot_mapping=torch.arange(1))
