"""What a batch of small blocks costs over TCP: frames, not blocks, reach the kernel."""

import numpy as np
import pytest

import kvlink

BLOCKS, BLOCK = 4096, 100


@pytest.mark.parametrize("operation", ["put", "get"])
def test_small_blocks_share_their_system_calls(tcp_pair, operation):
    def calls():
        counters = [side.statistics().provider for side in (tcp_pair.a, tcp_pair.b)]
        return sum(counter[name] for counter in counters for name in ("sendmsg_calls", "recvmsg_calls"))

    order = np.random.default_rng(1).permutation(BLOCKS)  # gaps on both sides, so that nothing coalesces
    blocks = np.stack([order * (BLOCK + 9), order[::-1] * (BLOCK + 13), np.full(BLOCKS, BLOCK)], axis=1)
    ranges = kvlink.ranges(tcp_pair.region_a, tcp_pair.peer_b.regions["b"], blocks)
    before = calls()
    transfer = getattr(tcp_pair.peer_b, operation)(ranges)
    assert transfer.wait(20)
    assert transfer.result().ranges == BLOCKS and transfer.result().path == "tcp"
    assert calls() - before < BLOCKS // 16
    source, target = (tcp_pair.memory_a, tcp_pair.memory_b)
    for ours, theirs, length in blocks[:: BLOCKS // 64]:
        assert (source[ours : ours + length] == target[theirs : theirs + length]).all()
