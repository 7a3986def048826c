"""Rules 1 and 11 to 20 once more, for the per-communicator flavour of the one-sided service."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .client import run_client
from .conftest import Hosts
from .hccl_agent import Agent
from .hccl_client import DEVICE, HOST, HUGE_FIRST, MIB, rank_table
from .hccl_pair import Pair
from .test_rules_frame import exported


@pytest.fixture(scope="module", params=["roce", "hccs"])
def pair(request: pytest.FixtureRequest, make_host: Hosts) -> Iterator[Pair]:
    """Two agents of an 8.3 whose libhccl.so has no HcclCommPrepare."""
    with Pair(make_host("8.3", link=request.param, prepare=False)) as made:
        yield made


@pytest.fixture(scope="module")
def over_hccs(pair: Pair) -> bool:
    """Which link the pair has."""
    return pair.host["HCCL_INTRA_ROCE_ENABLE"] == "0"


def exchange(pair: Pair, comms: tuple[int, int], ours: list[bytes], theirs: list[bytes]) -> tuple[list[bytes], ...]:
    """Both sides exchange; returns what each received."""
    pair.a.begin("own_exchange", comms[0], 1, ours)
    code_b, got_b = pair.b.own_exchange(comms[1], 0, theirs)
    code_a, got_a = pair.a.end()
    assert (code_a, code_b) == (0, 0), (pair.a.error_text(), pair.b.error_text())
    return got_a, got_b


def test_rule_01_an_older_library_lacks_prepare(libs: Path) -> None:
    symbols = exported(libs / "no_prepare" / "libhccl.so")
    assert "HcclCommPrepare" not in symbols
    assert {"HcclRegisterMem", "HcclExchangeMemDesc", "HcclEnableMemAccess", "HcclBatchPut"} <= symbols


def test_rule_20_register_exchange_enable_and_transfer(pair: Pair, over_hccs: bool) -> None:
    comms = pair.comms()
    local, remote = pair.a.malloc(2 * MIB), pair.b.malloc(2 * MIB)
    stream = pair.a.stream()
    code_a, desc_a = pair.a.own_register(comms[0], 1, DEVICE, local, 2 * MIB)
    code_b, desc_b = pair.b.own_register(comms[1], 0, DEVICE, remote, 2 * MIB)
    assert (code_a, code_b) == (0, 0)
    assert pair.a.put(comms[0], 1, [(local, remote, 64)], stream) == 6  # not connected
    got_a, got_b = exchange(pair, comms, [desc_a], [desc_b])
    assert (got_a, got_b) == ([desc_b], [desc_a])
    assert pair.a.put(comms[0], 1, [(local, remote, 64)], stream) == 4  # not enabled
    pair.a.begin("own_enable", comms[0], desc_b)
    if over_hccs:
        assert pair.b.own_enable(comms[1], desc_a)[0] == 0  # both sides have to
    assert pair.a.end() == (0, (DEVICE, remote, 2 * MIB))
    pair.a.poke(local, b"per communicator")
    assert pair.a.put(comms[0], 1, [(local, remote + 64, 16)], stream) == 0
    assert pair.a.sync(stream) == 0
    assert pair.b.peek(remote + 64, 16) == b"per communicator"
    assert pair.a.own_disable(comms[0], desc_b) == 0
    assert pair.a.put(comms[0], 1, [(local, remote, 64)], stream) == 4
    assert pair.a.own_disable(comms[0], desc_b) == 6
    assert pair.a.own_deregister(comms[0], desc_a) == 0
    assert pair.a.own_deregister(comms[0], desc_a) == 6
    assert pair.a.destroy(comms[0]) == 0
    assert pair.b.destroy(comms[1]) == 0


def test_rule_16_an_exchange_without_the_peer_times_out(pair: Pair) -> None:
    comms = pair.comms()
    assert pair.a.own_exchange(comms[0], 1, [], 1)[0] == 9
    assert pair.a.own_exchange(comms[0], 0, [], 1) == (0, [])  # oneself: nothing to do
    assert pair.a.own_exchange(comms[0], 7, [], 1)[0] == 1


def test_rule_11_arguments_of_registration(pair: Pair) -> None:
    comm, _ = pair.comms()
    address = pair.a.malloc(2 * MIB)
    assert pair.a.own_register(comm, 1, DEVICE, address, 0)[0] == 1
    assert pair.a.own_register(comm, 1, 2, address, 64)[0] == 1
    assert pair.a.own_register(comm, 1, DEVICE, 0, 64)[0] == 2
    assert pair.a.own_register(comm, 9, DEVICE, address, 64)[0] == 1
    assert pair.a.own_register(comm, 1, DEVICE, address, (64 << 30) + 1)[0] == 1


def test_rule_17_the_hardware_looks_at_registration(pair: Pair, over_hccs: bool) -> None:
    comm, _ = pair.comms()
    unaligned = pair.a.malloc(2 * MIB, HUGE_FIRST)
    assert pair.a.own_register(comm, 1, DEVICE, unaligned, MIB)[0] == (15 if over_hccs else 0)
    aligned = pair.a.malloc(2 * MIB)
    assert pair.a.own_register(comm, 1, DEVICE, aligned, 64 * MIB)[0] == (15 if over_hccs else 19)
    assert pair.a.own_register(comm, 1, HOST, 0x1000, MIB)[0] == 15


def test_rule_18_host_memory_is_exchanged_over_roce_only(pair: Pair, over_hccs: bool) -> None:
    comms = pair.comms()
    code, desc = pair.b.own_register(comms[1], 0, HOST, pair.b.plain_host(MIB), MIB)
    assert code == 0
    got_a, _ = exchange(pair, comms, [], [desc])
    assert got_a == ([] if over_hccs else [desc])


def test_rule_18_ascend950_registers_device_memory_only(make_host: Hosts) -> None:
    with Agent(make_host(soc="950")) as one:
        one.start(0)
        code, comm = one.init(Pair.table(), 0, "x")
        assert code == 0
        assert one.own_register(comm, 1, DEVICE, one.malloc(2 * MIB), MIB)[0] == 0
        assert one.own_register(comm, 1, HOST, one.plain_host(MIB), MIB)[0] == 5
        assert one.register(one.malloc(2 * MIB), MIB)[0] == 5  # no process-granular flavour
        assert one.prepare(comm, 1) == 5


def overflows(table: str) -> None:
    from .hccl_client import Client

    one = Client()
    one.start(0)
    one.faults("")
    code, comm = one.init(table, 0, "overflow")
    assert code == 0
    print("ready", flush=True)
    one.own_exchange(comm, 1, [], 20, room=1)


def test_rule_33_the_array_for_the_peer_is_long_enough(make_host: Hosts) -> None:
    from .client import Client as Running

    host = {**make_host("8.5.0"), "CANN_SIM_NET": "overflow"}
    table = Pair.table()
    with Running(overflows, table, host=host) as short, Agent(host) as peer:
        peer.start(1)
        code, comm = peer.init(table, 1, "overflow")
        assert code == 0
        descs = [peer.own_register(comm, 0, DEVICE, peer.malloc(2 * MIB), MIB)[1] for _ in range(2)]
        peer.begin("own_exchange", comm, 0, descs)
        short.finish(30).violated(33)
        peer.end()


def test_rule_33_prepare_is_missing_not_faked(make_host: Hosts) -> None:
    run_client(asks_for_prepare, host=make_host("8.3", prepare=False)).succeeded()


def asks_for_prepare() -> None:
    import ctypes

    assert not hasattr(ctypes.CDLL("libhccl.so"), "HcclCommPrepare")


def test_rule_12_the_table_is_the_same_for_both_flavours(pair: Pair) -> None:
    assert pair.a.init(rank_table([{"server_id": "h", "device_id": "5"}]), 0, "bad")[0] in (1, 7)
