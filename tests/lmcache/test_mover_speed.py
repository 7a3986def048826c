"""How long the mover holds an engine step: at most 15 ms for 2,048 tokens of the small model, on one core."""

from __future__ import annotations

import random
import statistics
import time

import pytest
import torch

from kvlink_lmcache.mover.planes import Geometry, build_pieces
from kvlink_lmcache.mover.transfer import Mover

LAYERS, HEADS, SIZE, HEAD, BLOCKS, TOKENS, CHUNK = 8, 4, 128, 64, 128, 2048, 256
BOUND_MS = 15.0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [TOKENS, TOKENS - 45])
@pytest.mark.parametrize("order", ["in order", "shuffled"])
def test_a_step_of_2048_tokens(dtype, tokens, order, record_property):
    from kvlink_lmcache.vllm.packing import cpu_packing

    storage = torch.randn(LAYERS, BLOCKS, HEADS, SIZE, 2 * HEAD).to(dtype)
    caches = list(storage)
    geometry = Geometry(SIZE, HEADS, HEAD, layout="HND")
    mover = Mover(build_pieces(caches, geometry, cpu_packing(caches[0], geometry)))
    ids = list(range(TOKENS // SIZE)) if order == "in order" else random.Random(1).sample(range(BLOCKS), TOKENS // SIZE)
    slots = [block * SIZE + token for block in ids for token in range(SIZE)]
    pool = torch.zeros(TOKENS // CHUNK, CHUNK * mover.token_bytes, dtype=torch.uint8)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for move in (mover.load, mover.store):
            taken, used = [], []
            for _ in range(15):
                began, busy = time.perf_counter(), time.thread_time()
                for number, page in enumerate(pool):
                    move(page, slots[number * CHUNK : min((number + 1) * CHUNK, tokens)])
                used.append((time.thread_time() - busy) * 1e3)
                taken.append((time.perf_counter() - began) * 1e3)
            median = statistics.median(used)
            wall = f"wall {statistics.median(taken):.2f}, best {min(taken):.2f}"
            print(f"{move.__name__} {tokens} tokens {order} {dtype}: median {median:.2f} ms ({wall})")
            record_property(move.__name__, median)
            # The core's time: what others on the machine take from the wall's is not the mover's.
            assert median <= BOUND_MS
    finally:
        torch.set_num_threads(threads)
