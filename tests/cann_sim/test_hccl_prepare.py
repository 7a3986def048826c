"""Rules 15 to 19 (and 5): binding, the rendezvous, what the hardware refuses there, exchange, and taking it down."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .conftest import Hosts
from .hccl_agent import Agent
from .hccl_client import DEVICE, HOST, HUGE_FIRST, MIB
from .hccl_pair import Pair, fresh_name


@pytest.fixture(scope="module")
def roce(make_host: Hosts) -> Iterator[Pair]:
    """Two agents over RoCE."""
    with Pair(make_host(link="roce")) as pair:
        yield pair


@pytest.fixture(scope="module")
def hccs(make_host: Hosts) -> Iterator[Pair]:
    """Two agents over HCCS."""
    with Pair(make_host(link="hccs")) as pair:
        yield pair


@pytest.fixture(scope="module", params=["roce", "hccs"])
def both(request: pytest.FixtureRequest) -> Pair:
    """Two agents over either link."""
    pair: Pair = request.getfixturevalue(request.param)
    return pair


def test_rule_15_unknown_and_double_binding(roce: Pair) -> None:
    comm, _ = roce.comms()
    assert roce.a.bind(comm, 0x1234) == 1
    _, handle = roce.bound(roce.a, comm)
    assert roce.a.bind(comm, handle) == 1
    assert roce.a.bind(0, handle) == 2
    assert roce.a.unbind(comm, handle) == 0
    assert roce.a.unbind(comm, handle) == 1


def test_rule_15_a_late_binding_is_accepted_and_invisible(roce: Pair) -> None:
    one, two = roce.link()
    late, handle = roce.bound(roce.b, two.comm)
    assert roce.a.put(one.comm, 1, [(one.address, late, 64)], one.stream) == 4
    assert roce.b.put(two.comm, 0, [(late, one.address, 64)], two.stream) == 4
    assert roce.b.unbind(two.comm, handle) == 0
    roce.unlink(one, two)


def test_rule_16_an_absent_peer_times_out(both: Pair) -> None:
    comm_a, comm_b = both.comms()
    for agent, comm in ((both.a, comm_a), (both.b, comm_b)):
        code, seconds = agent.timed_prepare(comm, 1)
        assert code == 9
        assert 0.9 < seconds < 3
        assert "EI0006" in agent.error_text()


def test_rule_16_timeouts_below_minus_one_and_nulls(roce: Pair) -> None:
    comm, _ = roce.comms()
    assert roce.a.prepare(comm, -2) == 1
    assert roce.a.prepare(comm, 1, null=True) == 2
    assert roce.a.prepare(0, 1) == 2


def test_rule_16_zero_means_the_connect_timeout(make_host: Hosts) -> None:
    # 120 s, scaled by 1/100.
    with Pair(make_host(), CANN_SIM_TIME_SCALE="0.01") as pair:
        comm, _ = pair.comms()
        code, seconds = pair.a.timed_prepare(comm, 0)
        assert code == 9
        assert 1.0 < seconds < 4


def test_rule_16_minus_one_waits_for_the_peer(roce: Pair) -> None:
    comm_a, comm_b = roce.comms()
    roce.a.begin("prepare", comm_a, -1)
    assert roce.b.prepare(comm_b, 5) == 0
    assert roce.a.end() == 0


def test_rule_16_a_second_call_does_nothing(roce: Pair) -> None:
    ends = roce.link()
    assert roce.a.prepare(ends[0].comm, 1) == 0  # alone, at once
    roce.unlink(*ends)


def test_rule_16_a_failed_communicator_stays_unusable(roce: Pair) -> None:
    comm_a, comm_b = roce.comms()
    address, handle = roce.bound(roce.a, comm_a)
    assert roce.a.prepare(comm_a, 1) == 9
    assert roce.prepare(comm_a, comm_b, 1) == (4, 9)
    assert roce.a.put(comm_a, 1, [(address, address, 64)], roce.a.stream()) == 6
    assert roce.a.unbind(comm_a, handle) == 0
    assert roce.a.destroy(comm_a) == 0


def test_rule_16_different_rank_tables_time_out(roce: Pair) -> None:
    name = fresh_name()
    _, comm_a = roce.a.init(roce.table(), 0, name)
    _, comm_b = roce.b.init(roce.table() + " ", 1, name)  # not byte for byte the same
    assert roce.prepare(comm_a, comm_b, 1) == (9, 9)


def test_rule_16_different_names_time_out(roce: Pair) -> None:
    _, comm_a = roce.a.init(roce.table(), 0, fresh_name())
    _, comm_b = roce.b.init(roce.table(), 1, fresh_name())
    assert roce.prepare(comm_a, comm_b, 1) == (9, 9)


@pytest.mark.parametrize(("env", "link"), [({"CANN_SIM_TLS": "1"}, "roce"), ({"HCCL_INTRA_ROCE_ENABLE": "0"}, "roce")])
def test_rule_16_tls_and_link_must_be_the_same(make_host: Hosts, env: dict[str, str], link: str) -> None:
    host = {**make_host(link=link), "CANN_SIM_NET": f"differ-{sorted(env)}"}
    table, name = Pair.table(), fresh_name()
    with Agent(host) as one, Agent({**host, **env}) as two:
        one.start(0)
        two.start(1)
        code_one, comm_one = one.init(table, 0, name)
        code_two, comm_two = two.init(table, 1, name)
        assert (code_one, code_two) == (0, 0)
        one.begin("prepare", comm_one, 1)
        assert two.prepare(comm_two, 1) == 9
        assert one.end() == 9


def test_rule_16_a_port_that_is_taken(make_host: Hosts) -> None:
    with Pair(make_host(), CANN_SIM_PORTS_TAKEN="16666") as pair:
        comm_a, comm_b = pair.comms()
        assert pair.prepare(comm_a, comm_b, 1) == (7, 9)  # the lower rank listens
        assert pair.prepare(*pair.comms(pair.table(a_device_port="16700")), 2) == (0, 0)


@pytest.mark.parametrize(("env", "code"), [({}, 7), ({"HCCL_NPU_SOCKET_PORT_RANGE": "60000-60003"}, 0)])
def test_rule_16_two_processes_on_one_npu(make_host: Hosts, env: dict[str, str], code: int) -> None:
    with Pair(make_host(), **env) as pair, Agent(pair.host) as third:
        ends = pair.link()
        third.start(0)
        table, name = pair.table(), fresh_name()
        _, comm_third = third.init(table, 0, name)
        _, comm_b = pair.b.init(table, 1, name)
        third.begin("prepare", comm_third, 2)
        assert pair.b.prepare(comm_b, 2) == (0 if code == 0 else 9)
        assert third.end() == code
        pair.unlink(*ends)


def test_rule_16_a_pair_without_hccs(make_host: Hosts) -> None:
    with Pair(make_host(link="hccs"), CANN_SIM_HCCS_WIRED="0") as pair:
        assert pair.prepare(*pair.comms(), 2) == (5, 5)


def test_rule_16_a3_needs_super_device_ids_over_hccs(make_host: Hosts) -> None:
    with Pair(make_host(soc="A3", link="hccs")) as pair:
        pods = {"pods": {"0": ["host"]}}
        assert pair.prepare(*pair.comms(pair.table(**pods)), 1) == (9, 9)
        known = pair.table(**pods, a_super_device_id="1", b_super_device_id="2")
        assert pair.prepare(*pair.comms(known), 2) == (0, 0)


def test_rule_16_the_devices_thread_prepares(roce: Pair) -> None:
    comm, _ = roce.comms()
    roce.a.set_device(1)
    assert roce.a.prepare(comm, 1) == 15
    roce.a.set_device(0)


def refused_memory(pair: Pair, address: int, size: int, kind: int) -> tuple[int, int]:
    """The codes of both sides when a's memory is what HcclCommPrepare does not like."""
    comm_a, comm_b = pair.comms()
    _, handle = pair.bound(pair.a, comm_a, size, kind, address)
    codes = pair.prepare(comm_a, comm_b, 3)
    assert pair.a.unbind(comm_a, handle) == 0
    assert pair.a.destroy(comm_a) == 0
    assert pair.a.deregister(handle) == 0
    assert pair.b.destroy(comm_b) == 0
    return codes


def test_rule_17_unaligned_device_memory(hccs: Pair, roce: Pair) -> None:
    for pair, codes in ((hccs, (15, 13)), (roce, (0, 0))):
        address = pair.a.malloc(2 * MIB, HUGE_FIRST)
        assert address % (2 * MIB)
        assert refused_memory(pair, address, MIB, DEVICE) == codes
    assert "507899" not in roce.a.error_text()


def test_rule_17_a_region_past_its_allocation(hccs: Pair, roce: Pair) -> None:
    for pair, code in ((hccs, 15), (roce, 19)):
        address = pair.a.malloc(2 * MIB)
        assert refused_memory(pair, address, 64 * MIB, DEVICE) == (code, 13)
        assert "exceeds its allocation" in pair.a.error_text()


def test_rule_17_freed_memory(hccs: Pair, roce: Pair) -> None:
    for pair, code in ((hccs, 15), (roce, 19)):
        address = pair.a.malloc(2 * MIB)
        assert pair.a.free(address) == 0
        assert refused_memory(pair, address, MIB, DEVICE) == (code, 13)


def test_rule_17_the_wrong_type(hccs: Pair, roce: Pair) -> None:
    for pair, code in ((hccs, 15), (roce, 19)):
        assert refused_memory(pair, pair.a.plain_host(MIB), MIB, DEVICE) == (code, 13)
        assert refused_memory(pair, pair.a.malloc(2 * MIB), MIB, HOST) == (15, 13)
        assert refused_memory(pair, pair.a.malloc(2 * MIB), MIB, 7) == (code, 13)


def test_rule_17_host_memory_that_is_not_there_or_not_aligned(roce: Pair) -> None:
    host = roce.a.plain_host(MIB)
    assert refused_memory(roce, 0x1000, MIB, HOST) == (15, 13)
    assert refused_memory(roce, host + 64, 4096, HOST) == (15, 13)
    assert refused_memory(roce, host, MIB, HOST) == (0, 0)


def test_rule_17_host_memory_the_user_registered(roce: Pair) -> None:
    host = roce.a.plain_host(MIB)
    assert roce.a.host_register(host, MIB) == 0
    assert refused_memory(roce, host, MIB, HOST) == (15, 13)
    assert "507910" in roce.a.error_text()


def test_rule_17_host_memory_above_the_drivers_cap(make_host: Hosts) -> None:
    with Pair(make_host(), CANN_SIM_HOST_MR_MIB="4") as pair:
        comm_a, comm_b = pair.comms()
        first = pair.a.plain_host(3 * MIB)
        pair.bound(pair.a, comm_a, 3 * MIB, HOST, first)
        assert pair.prepare(comm_a, comm_b) == (0, 0)
        assert refused_memory(pair, pair.a.plain_host(2 * MIB), 2 * MIB, HOST) == (19, 13)  # the total counts
        assert refused_memory(pair, pair.a.plain_host(MIB), MIB, HOST) == (0, 0)


def test_rule_17_overlap_of_two_types(roce: Pair) -> None:
    comm_a, comm_b = roce.comms()
    address = roce.a.malloc(2 * MIB)
    roce.bound(roce.a, comm_a, MIB, DEVICE, address)
    roce.bound(roce.a, comm_a, MIB, HOST, address)  # passes here
    assert roce.prepare(comm_a, comm_b) == (4, 13)


def test_rule_17_each_link_takes_2_mib_of_the_device(make_host: Hosts) -> None:
    with Pair(make_host(), CANN_SIM_HBM_MIB="8") as pair:
        full = pair.a.malloc(6 * MIB)
        assert pair.prepare(*pair.comms(), 2) == (0, 0)
        assert pair.prepare(*pair.comms(), 2) == (13, 13)
        assert pair.a.free(full) == 0
        assert pair.prepare(*pair.comms(), 2) == (0, 0)


def test_rule_17_memory_freed_after_it_was_registered(roce: Pair) -> None:
    comm_a, comm_b = roce.comms()
    address, handle = roce.bound(roce.a, comm_a)
    assert roce.prepare(comm_a, comm_b) == (0, 0)
    other_a, other_b = roce.comms()
    assert roce.a.bind(other_a, handle) == 0
    assert roce.a.free(address) == 0
    # Hardware would only count one more user here, and let the link write into whatever comes next.
    assert roce.prepare(other_a, other_b) == (15, 13)


def test_rule_18_hccs_exchanges_device_memory_only(hccs: Pair) -> None:
    comm_a, comm_b = hccs.comms()
    local, _ = hccs.bound(hccs.a, comm_a)
    remote, _ = hccs.bound(hccs.b, comm_b, MIB, HOST)
    assert hccs.prepare(comm_a, comm_b) == (0, 0)
    assert hccs.a.put(comm_a, 1, [(local, remote, 64)], hccs.a.stream()) == 4


@pytest.mark.parametrize("kinds", [(DEVICE, DEVICE), (DEVICE, HOST), (HOST, DEVICE), (HOST, HOST)])
def test_rule_18_roce_exchanges_both(roce: Pair, kinds: tuple[int, int]) -> None:
    one, two = roce.link(2 * MIB, kinds)
    text = b"the same bytes"
    (roce.a.poke if kinds[0] == DEVICE else roce.a.write_host)(one.address, text)
    assert roce.a.put(one.comm, 1, [(one.address, two.address + 4096, len(text))], one.stream) == 0
    assert roce.a.sync(one.stream) == 0
    read = roce.b.peek if kinds[1] == DEVICE else roce.b.read_host
    assert read(two.address + 4096, len(text)) == text
    assert roce.a.get(one.comm, 1, [(one.address + 64, two.address + 4096, len(text))], one.stream) == 0
    assert roce.a.sync(one.stream) == 0
    read = roce.a.peek if kinds[0] == DEVICE else roce.a.read_host
    assert read(one.address + 64, len(text)) == text
    roce.unlink(one, two)


@pytest.mark.parametrize(("soc", "code"), [("A2", 15), ("A3", 0)])
def test_rule_18_local_host_memory_over_hccs(make_host: Hosts, soc: str, code: int) -> None:
    pods = {"pods": {"0": ["host"]}, "a_super_device_id": "1", "b_super_device_id": "2"} if soc == "A3" else {}
    with Pair(make_host(soc=soc, link="hccs")) as pair:
        one, two = pair.link(2 * MIB, (HOST, DEVICE), **pods)
        assert pair.a.put(one.comm, 1, [(one.address, two.address, 64)], one.stream) == code


def test_rule_19_destroy_with_bound_memory(roce: Pair) -> None:
    comm, _ = roce.comms()
    _, handle = roce.bound(roce.a, comm)
    assert roce.a.destroy(comm) == 1
    assert roce.a.deregister(handle) == 1  # bound
    assert roce.a.unbind(comm, handle) == 0
    assert roce.a.destroy(comm) == 0
    assert roce.a.deregister(handle) == 0
    assert roce.a.deregister(handle) == 1  # unknown
    assert roce.a.deregister(0) == 1


def test_rule_19_destroy_while_in_use(roce: Pair) -> None:
    one, two = roce.link()
    roce.a.faults("op.put=delay:300")
    assert roce.a.put(one.comm, 1, [(one.address, two.address, 64)], one.stream) == 0
    assert roce.a.unbind(one.comm, one.handle) == 0
    assert roce.a.destroy(one.comm) == 20
    assert roce.a.sync(one.stream) == 0
    roce.a.faults("")
    assert roce.a.destroy(one.comm) == 0
    assert roce.a.deregister(one.handle) == 0
    roce.unlink(two)


def test_rule_19_destroy_null_and_from_another_device(roce: Pair) -> None:
    assert roce.a.destroy(0) == 0
    comm, _ = roce.comms()
    roce.a.set_device(1)
    assert roce.a.destroy(comm) == 1
    roce.a.set_device(0)
    assert roce.a.destroy(comm) == 0


def test_rule_19_the_peer_is_not_told(roce: Pair) -> None:
    one, two = roce.link()
    roce.unlink(two)
    # The other half still takes work, which fails as if the peer were lost.
    assert roce.a.put(one.comm, 1, [(one.address, two.address, 64)], one.stream) == 0
    assert roce.a.sync(one.stream) == 507056
    roce.unlink(one)


def test_rule_19_the_last_deregistration_takes_the_nic_down(make_host: Hosts) -> None:
    with Pair(make_host()) as pair:
        one, two = pair.link()
        assert pair.b.unbind(two.comm, two.handle) == 0
        assert pair.b.deregister(two.handle) == 0  # before the communicator: the wrong order
        assert pair.a.put(one.comm, 1, [(one.address, two.address, 64)], one.stream) == 0
        assert pair.a.sync(one.stream) == 507056


def test_rule_19_nothing_is_left(make_host: Hosts) -> None:
    with Pair(make_host()) as pair:
        names = ("hccl_comm", "hccl_region", "hccl_listener", "host_registration")
        before = [pair.a.live(name) for name in names]
        for _ in range(3):
            pair.unlink(*pair.link(2 * MIB, (HOST, DEVICE)))
        assert [pair.a.live(name) for name in names] == before == [0, 0, 0, 0]
