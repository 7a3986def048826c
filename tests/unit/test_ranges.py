from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlink._native import ffi
from kvlink._ranges import RANGE, check_ranges, ranges
from kvlink.errors import RangeError


def test_dtype_is_the_struct_of_the_abi():
    assert RANGE.itemsize == ffi.sizeof("kvl_range") == 32
    for name, (kind, offset) in RANGE.fields.items():
        assert offset == ffi.offsetof("kvl_range", name)
        assert kind.itemsize == ffi.sizeof(dict(ffi.typeof("kvl_range").fields)[name].type.cname)


@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.lists(st.tuples(*[st.integers(0, 2**63 - 1)] * 3), max_size=20),
)
def test_every_value_reaches_c_unchanged(mem, rmem, blocks):
    table = np.array(blocks, dtype=np.int64).reshape(len(blocks), 3)
    built = ranges(SimpleNamespace(handle=mem), rmem, table)
    seen = ffi.from_buffer("kvl_range[]", built)
    assert [(r.mem, r.rmem, r.local_offset, r.remote_offset, r.length) for r in seen] == [
        (mem, rmem, *block) for block in blocks
    ]


@given(st.integers(0, 9), st.integers(0, 2), st.integers(-(2**63), -1))
def test_a_negative_value_is_named(row, column, value):
    blocks = np.ones((10, 3), dtype=np.int64)
    blocks[row, column] = value
    with pytest.raises(RangeError) as caught:
        ranges(1, 2, blocks)
    name = ("local_offset", "remote_offset", "length")[column]
    assert f"blocks[{row}]" in str(caught.value)
    assert name in str(caught.value)
    assert str(value) in str(caught.value)


@pytest.mark.parametrize(
    "blocks",
    [
        np.zeros((2, 4), np.int64),
        np.zeros((2, 2), np.int64),
        np.zeros(3, np.int64),
        np.zeros((1, 3, 1), np.int64),
        np.zeros((2, 3), np.float64),
        np.zeros((2, 3), bool),
        [[0, 0, 2**64]],
        [["a", "b", "c"]],
        5,
    ],
)
def test_other_shapes_and_dtypes_are_refused(blocks):
    with pytest.raises(RangeError, match="blocks has"):
        ranges(1, 2, blocks)


@pytest.mark.parametrize("empty", [[], np.empty((0, 3), np.int64), np.empty((0, 3))])
def test_no_blocks_give_no_ranges(empty):
    built = ranges(1, 2, empty)
    assert built.dtype == RANGE
    assert built.shape == (0,)


@pytest.mark.parametrize("handle", [-1, 2**32, 1.5, "x", None, True])
def test_a_wrong_handle_is_refused(handle):
    with pytest.raises(RangeError):
        ranges(handle, 1, [[0, 0, 1]])
    with pytest.raises(RangeError):
        ranges(1, SimpleNamespace(handle=handle), [[0, 0, 1]])


@pytest.mark.parametrize(
    ("array", "words"),
    [
        ([(1, 2, 0, 0, 4)], "list"),
        (np.zeros((2, 3), np.int64), "int64"),
        (np.zeros(2, [("mem", "<u4")]), "mem"),
        (np.zeros((2, 2), RANGE), "(2, 2)"),
        (np.zeros(4, RANGE)[::2], "strided"),
    ],
)
def test_check_ranges_says_what_is_wrong(array, words):
    with pytest.raises(RangeError) as caught:
        check_ranges(array)
    assert words in str(caught.value)
    assert "kvlink.ranges()" in str(caught.value)
