"""Layouts: storages once, planes for every shape vLLM and its plugins use, and ranges that move the right bytes."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from kvlink_vllm import layout as layouts
from kvlink_vllm.layout import LayoutError, build_layout, build_ranges, check_peer, checksum

RANGE = np.dtype(
    [("mem", "<u4"), ("rmem", "<u4"), ("local_offset", "<u8"), ("remote_offset", "<u8"), ("length", "<u8")]
)


def shared(blocks):
    """vLLM 0.32 on CPU: all layers view one storage, layer outermost, base not page-aligned."""
    piece = (4, 16, 8)
    count = 3
    memory = torch.arange(count * blocks * 512 + 16, dtype=torch.float32)
    base = memory[16:].view(count, blocks, *piece)
    return {f"model.layers.{i}": base[i] for i in range(count)}


def separate(blocks):
    """vLLM 0.23 on CPU: a tensor a layer."""
    return {f"l{i}": torch.rand(blocks, 4, 16, 8) for i in range(3)}


def halves(blocks):
    """vLLM 0.18 on CPU: (2, blocks, ...), K and V apart."""
    return {f"l{i}": torch.rand(2, blocks, 4, 16, 8) for i in range(3)}


def pairs(blocks):
    """vLLM-Ascend: (k, v)."""
    return {f"l{i}": (torch.rand(blocks, 16, 4, 8), torch.rand(blocks, 16, 4, 8)) for i in range(3)}


def mla(blocks):
    """MLA on vLLM-Ascend: latent and rope parts of different widths."""
    return {f"l{i}": (torch.rand(blocks, 16, 1, 24), torch.rand(blocks, 16, 1, 8)) for i in range(2)}


def sparse(blocks):
    """Sparse attention: three tensors, one of another type."""
    return {
        f"l{i}": [
            torch.rand(blocks, 16, 1, 24).to(torch.bfloat16),
            torch.rand(blocks, 16, 1, 8).to(torch.bfloat16),
            torch.randint(0, 100, (blocks, 16, 4), dtype=torch.int8),
        ]
        for i in range(2)
    }


def fp8(blocks):
    """An fp8 cache: one byte an element, moved as it is."""
    return {f"l{i}": torch.rand(blocks, 4, 32, 64).to(torch.float8_e4m3fn) for i in range(2)}


def outermost(blocks):
    """Block outermost, layers inside: stride larger than the piece."""
    memory = torch.rand(blocks, 3, 4, 16, 8)
    return {f"l{i}": memory[:, i] for i in range(3)}


def permuted(blocks):
    """NHD seen as HND: the piece is dense, its dimensions are not in order."""
    return {f"l{i}": torch.rand(blocks, 16, 4, 8).permute(0, 2, 1, 3) for i in range(2)}


def subdivided(blocks):
    """The kernel's blocks are a quarter of the manager's."""
    return {f"l{i}": torch.rand(blocks * 4, 4, 4, 8) for i in range(2)}


def subdivided_halves(blocks):
    return {f"l{i}": torch.rand(2, blocks * 4, 4, 4, 8) for i in range(2)}


BUILDERS = [shared, separate, halves, pairs, mla, sparse, fp8, outermost, permuted, subdivided, subdivided_halves]


def tensors(caches):
    for cache in caches.values():
        yield from cache if isinstance(cache, (tuple, list)) else [cache]


def block_of(tensor, index, blocks):
    """The block as the attention code would see it, from the tensor itself."""
    if tensor.shape[0] == 2 and tensor.shape[1] % blocks == 0:
        parts = tensor.shape[1] // blocks
        return tensor[:, index * parts : (index + 1) * parts]
    parts = tensor.shape[0] // blocks
    return tensor[index * parts : (index + 1) * parts]


def apply(ranges, source, destination):
    """Carries ranges out with plain copies, bounds checked."""
    for row in ranges:
        src, dst = source.storages[row["rmem"] - 100], destination.storages[row["mem"]]
        assert row["remote_offset"] + row["length"] <= src.nbytes
        assert row["local_offset"] + row["length"] <= dst.nbytes
        ctypes.memmove(
            dst.pointer + int(row["local_offset"]), src.pointer + int(row["remote_offset"]), int(row["length"])
        )


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
def test_blocks_arrive_and_nothing_else_changes(build):
    torch.manual_seed(1)
    theirs_blocks, ours_blocks = 9, 7
    source, destination = build(theirs_blocks), build(ours_blocks)
    before = [tensor.clone() for tensor in tensors(destination)]
    there, here = build_layout(source, theirs_blocks), build_layout(destination, ours_blocks)
    assert there.describe() == here.describe()
    check_peer(here, there.wire())
    remote, local = np.array([8, 0, 3, 4]), np.array([1, 6, 2, 3])
    ranges = build_ranges(
        RANGE,
        here,
        range(len(here.storages)),
        there.wire(),
        {storage.name: 100 + i for i, storage in enumerate(there.storages)},
        local,
        remote,
    )
    assert len(ranges) == len(here.planes) * 4
    apply(ranges, there, here)
    for ours, theirs, old in zip(tensors(destination), tensors(source), before, strict=True):
        for index in range(ours_blocks):
            if index in local:
                expected = block_of(theirs, int(remote[list(local).index(index)]), theirs_blocks)
            else:
                expected = block_of(old, index, ours_blocks)
            got = block_of(ours, index, ours_blocks).contiguous()
            assert torch.equal(got.view(torch.uint8), expected.contiguous().view(torch.uint8))
    assert checksum(here, local) == checksum(there, remote)
    assert checksum(here, local) != checksum(there, remote[::-1].copy())


@pytest.mark.parametrize(
    ("build", "storages", "planes"),
    [(shared, 1, 3), (separate, 3, 3), (halves, 3, 6), (pairs, 6, 6), (mla, 4, 4), (sparse, 6, 6), (outermost, 1, 3)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_storages_are_counted_once(build, storages, planes):
    layout = build_layout(build(7), 7)
    assert len(layout.storages) == storages
    assert len(layout.planes) == planes
    assert [storage.name for storage in layout.storages] == [f"kv.{i}" for i in range(storages)]
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors(build(7)))
    assert layout.block_bytes * 7 == total


def test_layers_that_share_a_cache_move_it_once():
    caches = separate(7)
    caches["l3"] = caches["l1"]
    layout = build_layout(caches, 7)
    assert [plane.key for plane in layout.planes] == ["l0/0/0", "l1/0/0", "l2/0/0"]
    assert len(layout.storages) == 3


def test_runs_stay_neighbours_within_a_plane():
    layout = build_layout(shared(8), 8)
    ids = np.array([2, 3, 4])
    ranges = build_ranges(RANGE, layout, [5], layout.wire(), {"kv.0": 9}, ids, ids)
    gaps = np.diff(ranges["local_offset"].reshape(3, 3).astype(np.int64), axis=1)
    assert (gaps == layout.planes[0].length).all()


def test_layouts_that_differ_describe_themselves_differently():
    texts = {build_layout(build(7), 7).describe() for build in BUILDERS}
    assert len(texts) >= len(BUILDERS) - 1  # `separate` and `outermost` pair: same pieces, other strides
    assert build_layout(separate(7), 7).describe() == build_layout(outermost(9), 9).describe()


@pytest.mark.parametrize("shape", [(7, 16, 4, 8), (2, 7, 16, 4, 8)])
def test_one_shape_in_two_orders_of_memory_is_two_layouts(shape):
    """VLLM_KV_CACHE_LAYOUT differs: the tensors look alike, whole blocks must not be copied between them."""
    plain = {"l": torch.rand(*shape)}
    swapped = (*shape[:-3], shape[-2], shape[-3], shape[-1])
    other = {"l": torch.rand(*swapped).transpose(-2, -3)}
    assert plain["l"].shape == other["l"].shape
    assert build_layout(plain, 7).describe() != build_layout(other, 7).describe()


def test_strides_that_mean_nothing_make_no_other_layout():
    memory = torch.rand(7, 16, 8)
    odd = memory.as_strided((7, 16, 1, 8), (128, 8, 999, 1))
    assert build_layout({"l": memory[:, :, None]}, 7).describe() == build_layout({"l": odd}, 7).describe()


@pytest.mark.parametrize(
    ("caches", "text"),
    [
        ({}, "no KV cache"),
        ({"l": torch.rand(5, 4)}, "no block dimension of 7"),
        ({"l": torch.rand(3, 7, 4)}, "no block dimension of 7"),
        ({"l": torch.rand(7, 4, 8)[:, :, :5]}, "side by side"),
        ({"l": torch.rand(7, 4, 8)[:, ::2]}, "side by side"),
    ],
)
def test_what_cannot_be_moved_is_refused(caches, text):
    with pytest.raises(LayoutError, match=text):
        build_layout(caches, 7)


@pytest.mark.parametrize(
    "change",
    [
        lambda planes: planes[:-1],
        lambda planes: [*planes[:-1], type(planes[0])("other", "kv.0", 0, 2048, 2048)],
        lambda planes: [*planes[:-1], type(planes[0])(planes[-1].key, "kv.0", 0, 1024, 1024)],
        lambda planes: [*planes[:-1], type(planes[0])(planes[-1].key, "kv.0", -8, 2048, 2048)],
        lambda planes: [*planes[:-1], type(planes[0])(planes[-1].key, "kv.0", 0, 8, 2048)],
    ],
)
def test_a_peer_whose_planes_do_not_pair_is_refused(change):
    layout = build_layout(shared(7), 7)
    with pytest.raises(LayoutError):
        check_peer(layout, change(layout.wire()))


def test_no_python_loop_per_block(monkeypatch):
    layout = build_layout(shared(8), 8)
    ids = np.arange(200_000) % 8
    calls = []
    original = layouts._offsets
    monkeypatch.setattr(layouts, "_offsets", lambda *args: calls.append(1) or original(*args))
    ranges = build_ranges(RANGE, layout, [1], layout.wire(), {"kv.0": 2}, ids, ids)
    assert len(ranges) == 600_000
    assert len(calls) == 2
