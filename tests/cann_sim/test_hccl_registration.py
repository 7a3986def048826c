"""Rules 1, 4, 11 to 14: exports of HCCL, its memory tables, communicator initialisation and its environment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Hosts
from .hccl_agent import Agent
from .hccl_client import DEVICE, HOST, MIB, config, rank_table
from .hccl_pair import Pair, fresh_name
from .test_rules_frame import expected, exported

ONE = [{"server_id": "h", "device_id": "0", "device_ip": "192.168.1.1"}]
TWO = [*ONE, {"server_id": "h", "device_id": "1", "device_ip": "192.168.1.2"}]


@pytest.fixture(scope="module", params=["8.5.0", "9.1"])
def flavoured(request: pytest.FixtureRequest, make_host: Hosts) -> Iterator[tuple[str, Agent]]:
    """An agent on device 0, with the old and the new memory tables."""
    with Agent(make_host(request.param)) as agent:
        assert agent.start(0) == 0
        yield request.param, agent


@pytest.fixture(scope="module")
def agent(make_host: Hosts) -> Iterator[Agent]:
    """An agent of CANN 8.5.0 on device 0."""
    with Agent(make_host()) as one:
        assert one.start(0) == 0
        yield one


@pytest.mark.parametrize("flavour", ["8.3", "8.5.0", "9.0", "9.1", "devlib"])
def test_rule_01_hccl_and_hixl_export_their_symbols_only(libs: Path, flavour: str) -> None:
    names = ["hccl"] if flavour == "8.3" else ["hccl", "hcomm", "metadef", "cann_hixl"]
    for name in names:
        assert exported(libs / flavour / f"lib{name}.so") == expected(f"{name}.txt", flavour)
    present = {path.stem[3:] for path in (libs / flavour).glob("lib*.so")}
    assert present.isdisjoint({"hcomm", "metadef", "cann_hixl"}) == (flavour == "8.3")


def test_rule_01_the_stubs_of_hccl_answer_that_they_are_stubs(make_host: Hosts) -> None:
    with Agent(make_host("devlib")) as stub:
        assert stub.register(1 << 21, 64)[0] == 100039
        assert stub.init(rank_table(TWO), 0, "x")[0] == 100039


def test_rule_04_init_and_destroy_want_a_device_in_this_thread(make_host: Hosts) -> None:
    with Agent(make_host()) as bare:
        bare.start(None)
        assert bare.init(rank_table(TWO), 0, "x")[0] == 15
        assert bare.destroy(0) == 15
        assert bare.set_device(0) == 0
        assert bare.init(rank_table(TWO), 0, "x")[0] == 0
        assert bare.destroy(0) == 0


def test_rule_11_a_duplicate_is_the_same_handle_and_not_counted(flavoured: tuple[str, Agent]) -> None:
    _, one = flavoured
    address = one.malloc(4 * MIB)
    code, handle = one.register(address, 4 * MIB)
    assert code == 0
    assert one.register(address, 4 * MIB) == (0, handle)
    assert one.deregister(handle) == 0
    assert one.deregister(handle) == 1  # the first one ended it


@pytest.mark.parametrize(("offset", "size"), [(MIB, MIB), (0, MIB), (2 * MIB, 4 * MIB), (MIB, 3 * MIB + 1)])
def test_rule_11_an_overlap_of_one_type_is_refused(flavoured: tuple[str, Agent], offset: int, size: int) -> None:
    _, one = flavoured
    address = one.malloc(8 * MIB)
    code, handle = one.register(address, 4 * MIB)
    assert code == 0
    assert one.register(address + offset, size)[0] == 1
    assert "overlaps" in one.error_text()
    code, other = one.register(address + offset, size, HOST)  # another type passes here
    assert code == 0
    assert other != handle
    assert one.deregister(other) == 0
    assert one.deregister(handle) == 0


def test_rule_11_null_and_zero_are_refused(flavoured: tuple[str, Agent]) -> None:
    _, one = flavoured
    assert one.register_null() == 2
    assert one.register(0, 64)[0] == 1
    assert one.register(1 << 21, 0)[0] == 1
    assert one.register((1 << 64) - 64, 128)[0] == 1


def test_rule_11_nothing_is_checked_against_hardware_yet(agent: Agent) -> None:
    for address, size, kind in ((12345677, 3, DEVICE), (12345777, 3, HOST), (1 << 30, 64, 7)):
        code, handle = agent.register(address, size, kind)
        assert code == 0
        assert agent.deregister(handle) == 0


@pytest.mark.parametrize(("flavour", "full"), [("8.3", 7), ("8.5.0", 7), ("9.0", 0), ("9.1", 0)])
def test_rule_11_256_regions_in_8x(make_host: Hosts, flavour: str, full: int) -> None:
    with Agent(make_host(flavour)) as one:
        one.start(0)
        codes = {one.register((index + 1) << 21, 64)[0] for index in range(256)}
        assert codes == {0}
        assert one.register(257 << 21, 64)[0] == full
        assert one.register(1 << 21, 64)[0] == full  # counted before the duplicate is looked for


def test_rule_11_8x_has_one_table_for_the_first_device(make_host: Hosts) -> None:
    with Agent(make_host("8.5.0")) as one:
        one.start(0)
        assert one.register(1 << 21, 64)[0] == 0
        one.set_device(1)
        assert one.register(2 << 21, 64)[0] == 1


def test_rule_11_9x_has_a_table_for_each_current_device(make_host: Hosts) -> None:
    with Agent(make_host("9.1")) as one:
        one.start(0)
        code, handle = one.register(1 << 21, 64)
        assert code == 0
        one.set_device(1)
        code, other = one.register(1 << 21, 64)  # the same range, a table of its own
        assert code == 0
        assert other != handle
        assert one.deregister(handle) == 1  # unknown here
        one.set_device(0)
        assert one.deregister(handle) == 0


def test_rule_11_9x_hides_a_missing_device_until_bind(make_host: Hosts) -> None:
    with Agent(make_host("9.1")) as one:
        one.start(None)
        code, handle = one.register(1 << 21, 64)
        assert code == 0  # into the reserve table
        one.set_device(0)
        code, comm = one.init(rank_table(TWO), 0, "x")
        assert code == 0
        assert one.bind(comm, handle) == 1
        assert "not registered on device 0" in one.error_text()


def test_rule_11_null_handle_crashes_before_9(make_host: Hosts) -> None:
    from .client import run_client

    run_client(registers_without_handle, 8, host=make_host("8.5.0")).violated(33)
    run_client(registers_without_handle, 9, host=make_host("9.1")).refused(11, 2)


def registers_without_handle(release: int) -> None:
    import ctypes

    from .hccl_client import Client, HcclMem

    client = Client()
    client.start(0)
    code = client.hccl.HcclRegisterGlobalMem(ctypes.byref(HcclMem(DEVICE, 1 << 21, 64)), None)
    assert (release, code) == (9, 2)


BAD_TABLES = {
    "no JSON": ("{", 1),
    "a list": ("[]", 1),
    "status": (rank_table(TWO, status="initializing"), 1),
    "no status": (rank_table(TWO, status=None), 1),
    "version": (rank_table(TWO, version="3"), 1),
    "server count": (rank_table(TWO, server_count="2"), 1),
    "count as a number": (rank_table(TWO, server_count=1), 1),
    "no servers": (rank_table(TWO, server_list=[], server_count=None), 1),
    "device id as a number": (rank_table([{**TWO[0], "device_id": 0}, TWO[1]]), 1),  # type: ignore[dict-item]
    "device id as a word": (rank_table([{**TWO[0], "device_id": "zero"}, TWO[1]]), 1),
    "long server id": (rank_table([{**one, "server_id": "h" * 65} for one in TWO]), 1),
    "equal addresses": (rank_table([TWO[0], {**TWO[1], "device_ip": "192.168.1.1"}]), 1),
    "equal devices": (rank_table([TWO[0], {**TWO[1], "device_id": "0"}]), 1),
    "port 0": (rank_table([{**TWO[0], "device_port": "0"}, TWO[1]]), 1),
    "port 65536": (rank_table([{**TWO[0], "device_port": "65536"}, TWO[1]]), 1),
    "device ip missing": (rank_table([{**TWO[0], "device_ip": ""}, TWO[1]]), 1),
    "my device is another": (rank_table([{**TWO[0], "device_id": "5"}, TWO[1]]), 7),
    "rank gap": (rank_table(TWO).replace('"rank_id": "1"', '"rank_id": "2"'), 7),
    "rank twice": (rank_table(TWO).replace('"rank_id": "1"', '"rank_id": "0"'), 7),
    "a server in no pod": (rank_table(TWO, pods={"0": ["other"]}), 1),
}


@pytest.mark.parametrize("what", BAD_TABLES)
def test_rule_12_a_bad_rank_table_is_refused(agent: Agent, what: str) -> None:
    table, code = BAD_TABLES[what]
    assert agent.init(table, 0, fresh_name())[0] == code, agent.error_text()
    assert agent.error_text()


def test_rule_12_a_server_is_listed_once(agent: Agent) -> None:
    table = rank_table(TWO).replace('"server_list": [', '"server_list": [' + '{"server_id": "h", "device": []},')
    assert agent.init(table.replace('"server_count": "1", ', ""), 0, fresh_name())[0] == 1


def test_rule_12_device_ip_is_needed_for_roce_only(make_host: Hosts) -> None:
    bare = [{"server_id": "h", "device_id": str(index)} for index in range(2)]
    far = [bare[0], {"server_id": "g", "device_id": "0"}]
    with Agent(make_host(link="hccs")) as one:
        one.start(0)
        assert one.init(rank_table(bare), 0, "near")[0] == 0
        assert one.init(rank_table(far), 0, "far")[0] == 1
        assert "'device_ip' is not set correctly" in one.error_text()
    with Agent(make_host(soc="A3", link="hccs")) as one:
        one.start(0)
        assert one.init(rank_table(far, pods={"0": ["h", "g"]}), 0, "pod")[0] == 0
        assert one.init(rank_table(far, pods={"0": ["h"], "1": ["g"]}), 0, "pods")[0] == 1


def test_rule_12_null_arguments(agent: Agent) -> None:
    assert agent.init(None, 0, fresh_name())[0] == 2


def test_rule_12_rank_out_of_range(agent: Agent) -> None:
    assert agent.init(rank_table(TWO), 2, fresh_name())[0] == 1


CONFIGS = {
    "empty name": config(""),
    "magic": config("magic", magic=0xF0F0F0F1),
    "name without end": config("x" * 128),
    "version 1 has no name": config("one", version=1),
    "no buffer": config("buffer", buffer_mb=0),
    "fields beyond the size": config("beyond", version=8),  # reads garbage where version 7's byte would be
    "size cuts the name off": config("cut", size=32),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_rule_12_a_bad_config_is_refused(agent: Agent, what: str) -> None:
    assert agent.init(rank_table(TWO), 0, raw=CONFIGS[what])[0] == 1


@pytest.mark.parametrize("flavour", ["8.3", "8.5.0", "9.0", "9.1"])
def test_rule_12_version_5_of_the_config_is_read_everywhere(make_host: Hosts, flavour: str) -> None:
    with Agent(make_host(flavour)) as one:
        one.start(0)
        assert one.init(rank_table(TWO), 0, "five")[0] == 0


def test_rule_12_a_name_is_used_once_on_a_device(agent: Agent) -> None:
    name = fresh_name()
    code, comm = agent.init(rank_table(TWO), 0, name)
    assert code == 0
    assert agent.init(rank_table(TWO), 0, name)[0] == 1
    assert agent.destroy(comm) == 0
    assert agent.init(rank_table(TWO), 0, name)[0] == 0


def test_rule_12_device_id_is_the_physical_one(make_host: Hosts) -> None:
    with Agent(make_host(physical_ids=(4, 7))) as one:
        one.start(1)
        seven = [{"server_id": "h", "device_id": "7", "device_ip": "192.168.1.1"}, TWO[1]]
        logic = [{"server_id": "h", "device_id": "1", "device_ip": "192.168.1.1"}, {**TWO[1], "device_id": "0"}]
        assert one.init(rank_table(logic), 0, "logic")[0] == 7
        assert one.init(rank_table(seven), 0, "physical")[0] == 0


def initialises_in_two_threads() -> None:
    from .hccl_client import Client

    client = Client()
    client.start(0)
    client.init_in_threads(rank_table(TWO), 0, [f"n{index}" for index in range(6)])


def test_rule_13_concurrent_initialisation_is_stopped(make_host: Hosts) -> None:
    from .client import run_client

    run_client(initialises_in_two_threads, host=make_host()).violated(13)


def initialises_while_one_hangs() -> None:
    import threading
    import time

    from .hccl_client import Client

    client = Client()
    client.start(0)
    client.faults("HcclCommInitClusterInfoMemConfig@1=hang")
    first = threading.Thread(target=client.init_in_threads, args=(rank_table(TWO), 0, ["hangs"]), daemon=True)
    first.start()
    end = time.monotonic() + 10
    while client.live("hccl_inits") == 0 and time.monotonic() < end:
        time.sleep(0.001)
    client.init(rank_table(TWO), 0, "next")


def test_rule_13_a_hung_initialisation_still_counts(make_host: Hosts) -> None:
    from .client import run_client

    run_client(initialises_while_one_hangs, host=make_host()).violated(13)


def test_rule_13_the_first_initialisations_can_fail_with_7(make_host: Hosts) -> None:
    with Agent({**make_host(), "CANN_SIM_FAULTS": "HcclCommInitClusterInfoMemConfig@1-2=fail:7"}) as one:
        one.start(0)
        assert [one.init(rank_table(TWO), 0, "x")[0] for _ in range(3)] == [7, 7, 0]


def test_rule_13_processes_that_initialise_at_once_disturb_each_other(make_host: Hosts) -> None:
    with Pair(make_host(), CANN_SIM_INIT_CONTENTION="1") as pair:
        codes: list[int] = []
        for _ in range(60):
            pair.a.begin("init", pair.table(), 0, fresh_name())
            pair.b.begin("init", pair.table(), 1, fresh_name())
            codes += [pair.a.end()[0], pair.b.end()[0]]
            if 7 in codes:
                break
        assert set(codes) == {0, 7}
        assert pair.a.init(pair.table(), 0, fresh_name())[0] == 0  # alone, it works


R, P = "HCCL_INTRA_ROCE_ENABLE", "HCCL_INTRA_PCIE_ENABLE"
ENVIRONMENTS = [
    ({}, 0),
    ({R: "1"}, 0),
    ({P: "1"}, 0),
    ({P: "1", R: "0"}, 0),
    ({P: "0", R: "1"}, 0),
    ({P: "0", R: "0"}, 0),
    ({R: "0"}, 1),
    ({P: "0"}, 1),
    ({P: "1", R: "1"}, 1),
    ({R: "yes"}, 1),
    ({"HCCL_CONNECT_TIMEOUT": "119"}, 1),
    ({"HCCL_CONNECT_TIMEOUT": "120"}, 0),
    ({"HCCL_CONNECT_TIMEOUT": "7201"}, 1),
    ({"HCCL_CONNECT_TIMEOUT": "2m"}, 1),
    ({"HCCL_RDMA_TC": "131"}, 1),
    ({"HCCL_RDMA_SL": "8"}, 1),
    ({"HCCL_NPU_SOCKET_PORT_RANGE": "60000"}, 1),
    ({"HCCL_NPU_SOCKET_PORT_RANGE": "60000-60010,61000-61010"}, 0),
    ({"HCCL_NPU_SOCKET_PORT_RANGE": "auto"}, 0),
]


@pytest.mark.parametrize(("env", "code"), ENVIRONMENTS, ids=[str(index) for index in range(len(ENVIRONMENTS))])
def test_rule_14_the_environment_is_checked_at_the_first_init(make_host: Hosts, env: dict[str, str], code: int) -> None:
    host = {key: value for key, value in make_host().items() if not key.startswith("HCCL_")}
    with Agent({**host, **env}) as one:
        one.start(0)
        assert one.init(rank_table(TWO), 0, "x")[0] == code
        if code:
            assert "EI0001" in one.error_text()


def test_rule_14_the_environment_is_read_once(make_host: Hosts) -> None:
    with Agent(make_host()) as one:
        one.start(0)
        assert one.init(rank_table(TWO), 0, "x")[0] == 0
        one.setenv("HCCL_CONNECT_TIMEOUT", "1")
        assert one.init(rank_table(TWO), 0, "y")[0] == 0  # nobody looked
    with Agent({**make_host(), "HCCL_CONNECT_TIMEOUT": "1"}) as one:
        one.start(0)
        assert one.init(rank_table(TWO), 0, "x")[0] == 1
        one.setenv("HCCL_CONNECT_TIMEOUT", "120")
        assert one.init(rank_table(TWO), 0, "y")[0] == 1  # too late


def test_rule_33_a_destroyed_communicator_is_not_used_again(make_host: Hosts) -> None:
    from .client import run_client

    run_client(uses_destroyed, host=make_host()).violated(33)


def uses_destroyed() -> None:
    from .hccl_client import Client

    client = Client()
    client.start(0)
    _, comm = client.init(rank_table(TWO), 0, "x")
    assert client.destroy(comm) == 0
    client.destroy(comm)


def test_rule_32_the_log_shows_the_order_of_calls(make_host: Hosts, tmp_path: Path) -> None:
    import json

    log = tmp_path / "events"
    with Pair(make_host(), CANN_SIM_LOG=str(log)) as pair:
        ends = pair.link()
        pid = pair.a.pid()
        assert ends[0].agent.put(ends[0].comm, 1, [(ends[0].address, ends[1].address, 64)], ends[0].stream) == 0
        assert ends[0].agent.sync(ends[0].stream) == 0
        pair.unlink(*ends)
    events = [json.loads(line) for line in log.read_text().splitlines()]
    calls = [event["fn"] for event in events if event["event"] == "call" and event["pid"] == pid]
    wanted = ["HcclRegisterGlobalMem", "HcclCommInitClusterInfoMemConfig", "HcclCommBindMem", "HcclCommPrepare"]
    wanted[:2] = wanted[1::-1]  # the pair initialises first
    wanted += ["HcclBatchPut", "aclrtSynchronizeStreamWithTimeout", "HcclCommUnbindMem", "HcclCommDestroy"]
    wanted += ["HcclDeregisterGlobalMem"]
    assert [name for name in calls if name in wanted] == wanted
