"""The mover against a reference that goes token by token, for every layout and both forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.lmcache.mover_caches import LAYOUTS

from kvlink_lmcache.mover.planes import Geometry, LayoutError, build_pieces
from kvlink_lmcache.mover.transfer import Mover

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@st.composite
def moves(draw):
    """A layout, a size, and where a chunk lies in it: any first token, any length, any order of blocks."""
    layout = draw(st.sampled_from(sorted(LAYOUTS)))
    size = draw(st.sampled_from((1, 2, 4, 8)))
    blocks = draw(st.integers(3, 9))
    first = draw(st.integers(0, size - 1))
    count = draw(st.integers(1, (blocks - 1) * size - first)) if (blocks - 1) * size > first else 1
    used = -(-(first + count) // size)
    orders = [draw(st.permutations(range(blocks)))[:used] for _ in range(2)]
    slots = [[order[n // size] * size + n % size for n in range(first, first + count)] for order in orders]
    return {
        "layout": layout,
        "shape": (
            draw(st.integers(1, 3)),
            blocks,
            draw(st.sampled_from((1, 2, 3))),
            size,
            draw(st.sampled_from((2, 4))),
        ),
        "dtype": draw(st.sampled_from(DTYPES)),
        "slots": slots,
        "skip": draw(st.integers(0, count + 1)),
        "form": draw(st.sampled_from(("blocks", "tokens"))),
    }


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(moves())
def test_tokens_arrive_and_nothing_else_changes(move):
    make = LAYOUTS[move["layout"]]
    source = make(*move["shape"], move["dtype"], 1)
    target = make(*move["shape"], move["dtype"], 2000)
    expected = target.everything()
    for number, (here, there) in enumerate(zip(*move["slots"], strict=True)):
        if number >= move["skip"]:
            expected[there] = source.token(here)
    out = Mover(source.pieces(), form=move["form"])
    into = Mover(target.pieces(), form=move["form"])
    unchanged = source.everything()
    memory = torch.full((len(move["slots"][0]) * out.token_bytes + 64,), 0x5A, dtype=torch.uint8)
    out.load(memory, move["slots"][0])
    assert (memory[-64:] == 0x5A).all(), "wrote behind the object"
    assert torch.equal(source.everything(), unchanged)
    into.store(memory, move["slots"][1], skip=move["skip"])
    assert torch.equal(target.everything(), expected)
    assert out.describe() == into.describe()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(moves())
def test_the_tokens_form_is_lmcaches(move):
    """K of all layers and then V of all layers, [tokens, width] each: what LMCache calls KV_2LTD."""
    cache = LAYOUTS[move["layout"]](*move["shape"], move["dtype"], 5)
    if move["layout"] == "sparse, another dtype":
        return  # LMCache's format has one dtype
    mover = Mover(cache.pieces(), form="tokens")
    slots = move["slots"][0]
    memory = torch.zeros(len(slots) * mover.token_bytes, dtype=torch.uint8)
    mover.load(memory, slots)
    flat = memory.view(move["dtype"])
    at = 0
    for _, _, rule in sorted(cache.rules, key=lambda r: r[:2]):
        width = rule(0).numel()
        part = flat[at : at + len(slots) * width].view(len(slots), width)
        assert torch.equal(part, torch.stack([rule(slot).reshape(-1) for slot in slots]))
        at += len(slots) * width
    assert at == flat.numel()


def test_whole_blocks_are_copied_as_they_are():
    cache = LAYOUTS["cpu packed"](2, 4, 2, 8, 4, torch.float32, 3)
    mover = Mover(cache.pieces())
    memory = torch.zeros(16 * mover.token_bytes, dtype=torch.uint8)
    mover.load(memory, [*range(16, 24), *range(0, 8)])
    assert torch.equal(
        memory.view(torch.float32).view(2, 2, -1), torch.stack([c[[2, 0]].reshape(2, -1) for c in cache.caches])
    )


def test_layers_of_one_storage_are_copied_together():
    cache = LAYOUTS["cpu packed"](3, 4, 2, 8, 4, torch.float32, 3)
    assert [tuple(stack.shape) for stack in Mover(cache.pieces())._stacks] == [(3, 4, 128)]
    alone = LAYOUTS["cpu packed, a storage a layer"](3, 4, 2, 8, 4, torch.float32, 3)
    assert len(Mover(alone.pieces())._stacks) == 3
    # And both understand each other.
    assert Mover(alone.pieces()).describe() == Mover(cache.pieces()).describe()


def test_many_small_blocks_in_any_order():
    cache = LAYOUTS["ascend pairs"](2, 64, 1, 2, 2, torch.float32, 3)
    other = LAYOUTS["ascend pairs"](2, 64, 1, 2, 2, torch.float32, 900)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))[:40].tolist()
    slots = [block * 2 + token for block in order for token in (0, 1)]
    memory = torch.zeros(80 * Mover(cache.pieces()).token_bytes, dtype=torch.uint8)
    Mover(cache.pieces()).load(memory, slots)
    Mover(other.pieces()).store(memory, slots[::-1][::-1])
    assert torch.equal(other.everything()[slots], cache.everything()[slots])


def test_a_layer_that_shares_another_ones_cache_moves_once():
    cache = LAYOUTS["ascend pairs"](1, 3, 1, 2, 2, torch.float32, 3)
    twice = build_pieces([cache.caches[0], cache.caches[0]], cache.geometry)
    assert len(twice) == 2  # K and V


@pytest.mark.parametrize("slots", [[0, 1, 3, 2], [0, 1, 2, 5], [3, 4, 6, 7], [0, 1, 2, 3, 4, 5, 7, 6]])
def test_slots_out_of_order_are_refused(slots):
    mover = Mover(LAYOUTS["ascend pairs"](1, 4, 1, 4, 2, torch.float32, 3).pieces())
    with pytest.raises(ValueError, match="not one block in order"):
        mover.load(torch.zeros(len(slots) * mover.token_bytes, dtype=torch.uint8), slots)


def test_an_object_that_is_too_small_is_refused():
    mover = Mover(LAYOUTS["ascend pairs"](1, 4, 1, 4, 2, torch.float32, 3).pieces())
    with pytest.raises(ValueError, match=r"63 bytes for 4 tokens of 16 bytes"):
        mover.load(torch.zeros(63, dtype=torch.uint8), [0, 1, 2, 3])


def test_an_unknown_form_of_cache_is_refused_with_its_shape():
    with pytest.raises(LayoutError, match=r"\(3, 4, 5\).*kvlink-vllm"):
        build_pieces([torch.zeros(3, 4, 5)], Geometry(4, 1, 8))
    with pytest.raises(LayoutError, match="registered no KV cache"):
        build_pieces([], Geometry(4, 1, 8))
    spread = torch.zeros(3, 4, 2, 16)[..., ::2]
    with pytest.raises(LayoutError, match="do not lie side by side"):
        build_pieces([(spread, spread)], Geometry(4, 2, 8))
    with pytest.raises(LayoutError, match=r"blocks of \[4, 8\] tokens"):
        build_pieces([(torch.zeros(3, 4, 1, 2), torch.zeros(3, 8, 1, 2))], Geometry(4, 1, 2))


def test_forms_and_block_sizes_have_different_descriptions():
    make = LAYOUTS["ascend pairs"]
    small = make(1, 4, 1, 4, 2, torch.float32, 3)
    large = make(1, 4, 1, 8, 2, torch.float32, 3)
    assert Mover(small.pieces()).describe() != Mover(large.pieces()).describe()
    assert Mover(small.pieces(), form="tokens").describe() == Mover(large.pieces(), form="tokens").describe()
    with pytest.raises(ValueError, match="expected one of"):
        Mover(small.pieces(), form="pages")
