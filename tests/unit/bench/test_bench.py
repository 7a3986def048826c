import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlink.bench import Plan, _limits
from kvlink.bench._limits import LOCAL, REMOTE, Memory
from kvlink.bench._plan import MIN_BUFFER
from kvlink.errors import ConfigError


def memory_of(array: np.ndarray) -> Memory:
    return Memory(array.ctypes.data, array.nbytes)


@given(
    block_size=st.integers(1, 1 << 20),
    blocks=st.integers(1, 300),
    contiguous=st.booleans(),
    number=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=60)
def test_block_lists_stay_inside_and_never_overlap(block_size, blocks, contiguous, number):
    plan = Plan("tcp", "put", block_size, blocks, contiguous=contiguous)
    table = plan.block_list(number)
    assert table.shape == (blocks, 3)
    assert plan.buffer_bytes >= MIN_BUFFER
    assert (table[:, 2] == block_size).all()
    for side in range(2):
        places = np.sort(table[:, side])
        assert places[0] >= 0
        assert places[-1] + block_size <= plan.buffer_bytes
        distances = np.diff(places)
        assert (distances == block_size).all() if contiguous else (distances > block_size).all()
    assert (table == plan.block_list(number)).all()


def test_lists_differ_between_numbers_sides_and_seeds():
    plan = Plan("shm", "get", 4096, 1000)
    table = plan.block_list(1)
    assert (table != plan.block_list(2)).any()
    assert (table != Plan("shm", "get", 4096, 1000, seed=2).block_list(1)).any()
    assert (table[:, 0] != table[:, 1]).any()
    assert (np.diff(table[:, 0]) < 0).any()  # a permutation, not a sorted choice


@pytest.mark.parametrize(
    "wrong",
    [{"path": "rdma"}, {"op": "move"}, {"block_size": 0}, {"blocks": 0}, {"repeats": 0}, {"blocks": 1 << 40}],
)
def test_wrong_plans_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Plan(**{"path": "shm", "op": "put", "block_size": 4096, "blocks": 16, **wrong})


@pytest.mark.parametrize("op", ["put", "get"])
@pytest.mark.parametrize("mode", range(len(_limits.COPY_MODES)))
@pytest.mark.parametrize("block_size", [1, 63, 4096, 70001])
def test_every_copy_mode_copies_exactly_the_blocks(op, mode, block_size):
    plan = Plan("shm", op, block_size, 50)
    local, remote = np.zeros(plan.buffer_bytes, np.uint8), np.zeros(plan.buffer_bytes, np.uint8)
    source, target, side = (local, remote, REMOTE) if op == "put" else (remote, local, LOCAL)
    blocks = plan.block_list(0)
    _limits.fill(memory_of(source), 7)
    assert _limits.wrong_blocks(memory_of(target), blocks, 7, side) == 50
    if _limits.copy(memory_of(local), memory_of(remote), blocks, op, mode) is None:
        pytest.skip("this processor has no such stores")
    assert _limits.wrong_blocks(memory_of(target), blocks, 7, side) == 0
    assert _limits.clear_and_check(memory_of(target), blocks, side)


def test_one_wrong_byte_in_a_block_or_beside_it_is_found():
    plan = Plan("shm", "put", 1000, 20)
    local, remote = np.zeros(plan.buffer_bytes, np.uint8), np.zeros(plan.buffer_bytes, np.uint8)
    blocks = plan.block_list(3)
    _limits.fill(memory_of(local), 1)
    _limits.copy(memory_of(local), memory_of(remote), blocks, "put", 0)
    remote[blocks[5, 1] + 999] ^= 1
    assert _limits.wrong_blocks(memory_of(remote), blocks, 1, REMOTE) == 1
    remote[blocks[7, 1] + 1000] = 1
    assert not _limits.clear_and_check(memory_of(remote), blocks, REMOTE)


@pytest.mark.parametrize("op", ["put", "get"])
@pytest.mark.parametrize("path", ["shm", "cma", "tcp"])
def test_command_prints_what_the_documentation_promises(path, op):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "kvlink.cli", "bench", "--path", path, "--op", op, "--json"),
            *("--block-size", "32K", "--blocks", "64", "--repeats", "1"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ,
        check=False,
    )
    if path == "cma" and "cma" in done.stderr and done.returncode:
        pytest.skip(f"cross-memory attach is forbidden here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result = json.loads(done.stdout)
    assert {
        *("path", "op", "block_size", "blocks", "gb_per_s", "blocks_per_s", "p50_us", "p99_us"),
        *("limit_gb_per_s", "limit_name", "ratio_to_limit"),
    } <= set(result)
    assert (result["path"], result["op"], result["block_size"], result["blocks"]) == (path, op, 32768, 64)
    assert result["gb_per_s"] > 0
    assert result["p99_us"] >= result["p50_us"] > 0
    assert result["ratio_to_limit"] == pytest.approx(result["gb_per_s"] / result["limit_gb_per_s"], rel=1e-2)
    assert result["buffer_bytes"] >= 256 << 20
    assert result["checked_blocks"] >= 64


def test_wrong_arguments_end_in_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "kvlink.cli", "bench", "--path", "shm", "--blocks", "0"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [done.stderr.strip()]
    assert "blocks is 0" in done.stderr
