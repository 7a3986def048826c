"""Rules 3, 4, 26, 27, 30 and 31: HIXL engines, their links, codes, memory, end, and heart-beat."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .client import run_client
from .conftest import Hosts
from .hccl_client import HUGE_FIRST, MIB
from .hixl_client import WRITE
from .hixl_pair import NO_POOL, HixlPair, free_name, hixl_agent
from .install import install

HERE = Path(__file__).parent
PARAM, TIMEOUT, NOT_CONNECTED, ALREADY, UNSUPPORTED = 103900, 103901, 103902, 103903, 103905
FAILED, EXHAUSTED = 503900, 203900


@pytest.fixture(scope="module")
def pair(make_host: Hosts, libs: Path) -> Iterator[HixlPair]:
    """Two engines of CANN 8.5.0 that nobody connected."""
    with HixlPair(make_host(), libs) as made:
        yield made


def test_rule_03_the_other_string_abi_does_not_compile() -> None:
    for flag, good in (("0", True), ("1", False)):
        command = ["c++", "-std=c++17", "-fsyntax-only", f"-D_GLIBCXX_USE_CXX11_ABI={flag}", "-x", "c++"]
        done = subprocess.run([*command, str(HERE / "src" / "hixl_abi.h")], capture_output=True, text=True, check=False)
        assert (done.returncode == 0) == good
        assert good or "the old string ABI" in done.stderr


@pytest.mark.parametrize("flavour", ["8.5.0", "9.0", "9.1"])
def test_rule_03_no_exported_name_depends_on_the_string_abi(libs: Path, flavour: str) -> None:
    for library in ("metadef", "cann_hixl"):
        names = subprocess.run(
            ["nm", "-D", str(libs / flavour / f"lib{library}.so")], check=True, capture_output=True, text=True
        ).stdout
        assert "AscendString" in names
        assert "__cxx11" not in names


def test_rule_04_initialize_wants_a_device(make_host: Hosts, libs: Path) -> None:
    with hixl_agent(make_host(), libs) as bare:
        bare.start(None)
        assert bare.hx_initialize(free_name(), NO_POOL) == 107002
        bare.set_device(0)
        assert bare.hx_initialize(free_name(), NO_POOL) == 0


BAD_NAMES = ["", "localhost:5000", "1.2.3:5000", "127.0.0.1:port", "127.0.0.1:", "[::1", "[::1]5000", "::1:5000"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_rule_26_a_name_that_is_none(make_host: Hosts, libs: Path, pair: HixlPair, name: str) -> None:
    which = pair.a.another_engine()
    assert pair.a.hx_initialize(name, NO_POOL, which) == PARAM
    assert pair.a.hx_connect(name) == PARAM


BAD_OPTIONS = [
    {"Unknown": "1"},
    {"BufferPool": "4"},
    {"BufferPool": "0:8"},
    {"RdmaTrafficClass": "131"},
    {"RdmaTrafficClass": "256"},
    {"RdmaServiceLevel": "8"},
    {"GlobalResourceConfig": "{"},
    {"GlobalResourceConfig": '{"channel_pool.max_channel": "513"}'},
    {"AutoConnect": "1"},  # from 9.0
]


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=str)
def test_rule_26_a_bad_option(pair: HixlPair, options: dict[str, str]) -> None:
    assert pair.a.hx_initialize(free_name(), options, pair.a.another_engine()) == PARAM


def test_rule_26_auto_connect_is_an_option_from_9_on(make_host: Hosts, libs: Path) -> None:
    with HixlPair(make_host("9.0"), libs, {**NO_POOL, "AutoConnect": "1"}) as two:
        local, _ = two.memory(two.a)
        remote, _ = two.memory(two.b)
        assert two.a.hx_transfer(two.name_b, WRITE, [(local, remote, 64)]) == 0  # connects by itself


def test_rule_26_the_listener_needs_its_address(pair: HixlPair) -> None:
    assert pair.a.hx_initialize(pair.name_b, NO_POOL, pair.a.another_engine()) == FAILED
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        name = f"127.0.0.1:{taken.getsockname()[1]}"
        assert pair.a.hx_initialize(name, NO_POOL, pair.a.another_engine()) == FAILED


@pytest.mark.parametrize(("flavour", "code"), [("8.5.0", 0), ("9.0", 0), ("9.1", FAILED)])
def test_rule_26_a_second_initialize(make_host: Hosts, libs: Path, flavour: str, code: int) -> None:
    with hixl_agent(make_host(flavour), libs) as one:
        one.start(0)
        assert one.hx_initialize(free_name(), NO_POOL) == 0
        assert one.hx_initialize(free_name(), NO_POOL) == code


def test_rule_26_nothing_works_before_initialize(make_host: Hosts, libs: Path) -> None:
    with hixl_agent(make_host(), libs) as one:
        one.start(0)
        assert one.hx_register(1 << 21, 64)[0] == FAILED
        assert one.hx_connect("127.0.0.1:5000") == FAILED
        assert one.hx_transfer("127.0.0.1:5000", WRITE, []) == FAILED
        one.hx_finalize()  # no effect


def test_rule_26_connect_refuses_what_cannot_be(pair: HixlPair) -> None:
    assert pair.a.hx_connect(pair.name_b, 0) == PARAM
    assert pair.a.hx_connect(pair.name_b, -1) == PARAM
    assert pair.a.hx_connect(pair.name_a) == PARAM  # itself
    assert pair.a.hx_connect("127.0.0.1") == PARAM  # a client only
    code, seconds = pair.a.hx_timed_connect(free_name(), 5000)
    assert code == FAILED
    assert seconds < 1  # nobody listens: at once, the timeout is not waited out


def test_rule_26_two_engines_on_one_device(pair: HixlPair) -> None:
    name = free_name()
    assert pair.a.hx_initialize(name, NO_POOL, pair.a.another_engine()) == 0
    assert pair.a.hx_connect(name) == PARAM


def test_rule_26_only_the_client_transfers(make_host: Hosts, libs: Path) -> None:
    with HixlPair(make_host(), libs) as two:
        local, remote, *_ = two.link()
        assert two.a.hx_connect(two.name_b) == ALREADY
        assert two.a.hx_transfer(two.name_b, WRITE, [(local, remote, 64)]) == 0
        assert two.b.hx_transfer(two.name_a, WRITE, [(remote, local, 64)]) == NOT_CONNECTED
        assert two.b.hx_start(two.name_a, WRITE, [(remote, local, 64)])[0] == NOT_CONNECTED
        assert two.b.hx_notify(two.name_a, "n", "m") == NOT_CONNECTED
        assert two.b.hx_connect(two.name_a) == 0
        assert two.b.hx_transfer(two.name_a, WRITE, [(remote, local, 64)]) == 0
        assert two.a.hx_disconnect(two.name_b) == 0
        assert two.a.hx_disconnect(two.name_b) == NOT_CONNECTED
        assert two.a.hx_transfer(two.name_b, WRITE, [(local, remote, 64)]) == NOT_CONNECTED
        assert two.b.hx_transfer(two.name_a, WRITE, [(remote, local, 64)]) == 0  # its own link stands


def test_rule_26_a_client_only_engine_connects(make_host: Hosts, libs: Path) -> None:
    with HixlPair(make_host(), libs) as two:
        which = two.b.another_engine()
        two.b.hx_finalize()
        assert two.b.hx_initialize("127.0.0.1", NO_POOL, which) == 0
        assert two.a.hx_connect("127.0.0.1") == PARAM


def test_rule_26_the_server_rebuilds_for_a_client_that_came_back(make_host: Hosts, libs: Path) -> None:
    with HixlPair(make_host(), libs) as two:
        two.link()
        two.a.kill()
        with hixl_agent(make_host(), libs, **two.env) as again:
            again.start(0)
            assert again.hx_initialize(two.name_a, NO_POOL) == 0, again.error_text()
            local, _ = two.memory(again)
            remote, _ = two.memory(two.b)
            assert again.hx_connect(two.name_b) == 0
            assert again.hx_transfer(two.name_b, WRITE, [(local, remote, 64)]) == 0


def test_rule_26_the_number_of_links(make_host: Hosts, libs: Path) -> None:
    options = {**NO_POOL, "GlobalResourceConfig": '{"channel_pool.max_channel": "1"}'}
    host = make_host(devices=3)
    with HixlPair(host, libs, options) as two, hixl_agent(host, libs, **two.env) as third:
        third.start(2)
        name = free_name()
        assert third.hx_initialize(name, NO_POOL) == 0
        assert two.a.hx_connect(two.name_b) == 0
        assert two.a.hx_connect(name) == EXHAUSTED  # a has its one
        assert third.hx_connect(two.name_b) == EXHAUSTED  # b has its one


def test_rule_26_the_number_of_streams(make_host: Hosts, libs: Path) -> None:
    with HixlPair(make_host(), libs) as two:
        local, remote, *_ = two.link()
        codes = [two.a.hx_start(two.name_b, WRITE, [(local, remote, 64)])[0] for _ in range(513)]
        assert codes == [0] * 512 + [EXHAUSTED]  # nobody polled


def test_rule_26_timeouts_are_rounded_up_to_seconds(make_host: Hosts, libs: Path, tmp_path: Path) -> None:
    log = tmp_path / "events"
    with HixlPair(make_host(), libs, CANN_SIM_LOG=str(log)) as two:
        assert two.a.hx_connect(two.name_b, 1001) == 0
    events = [json.loads(line) for line in log.read_text().splitlines()]
    seconds = [event["timeout"] for event in events if event["event"] == "call" and event["fn"] == "HcclCommPrepare"]
    assert seconds == [2, 2]  # the server takes the client's


def test_rule_27_hccl_1_is_param_invalid(make_host: Hosts, libs: Path) -> None:
    with HixlPair(make_host(), libs, HCCL_CONNECT_TIMEOUT="1") as two:
        assert two.a.hx_connect(two.name_b) == PARAM
    with HixlPair(make_host(), libs) as two:
        address = two.a.malloc(4 * MIB)
        assert two.a.hx_register(address, 4 * MIB)[0] == 0
        assert two.a.hx_register(address, MIB)[0] == PARAM


def test_rule_27_a_missing_device_ip_is_param_invalid(libs: Path, tmp_path: Path) -> None:
    host = install("8.5.0", devices=2, libs=libs, out=tmp_path / "root")
    (tmp_path / "root" / "etc" / "hccn.conf").write_text("")  # as in a container that does not mount it
    with HixlPair(host, libs) as two:
        assert two.a.hx_connect(two.name_b) == PARAM
        assert "'device_ip' is not set correctly" in two.a.error_text()


def test_rule_27_hccl_9_is_timeout(make_host: Hosts, libs: Path) -> None:
    with HixlPair(make_host(), libs) as two:
        two.b.faults("HcclCommPrepare=delay:2500")
        code, seconds = two.a.hx_timed_connect(two.name_b, 1000)
        assert code == TIMEOUT
        assert seconds < 2.4


def test_rule_27_hccl_5_is_unsupported(make_host: Hosts, libs: Path) -> None:
    with HixlPair(make_host(link="hccs"), libs, CANN_SIM_HCCS_WIRED="0") as two:
        assert two.a.hx_connect(two.name_b) == UNSUPPORTED


def test_rule_27_everything_else_is_failed(make_host: Hosts, libs: Path) -> None:
    with HixlPair(make_host(link="hccs"), libs) as two:
        address = two.a.malloc(2 * MIB, HUGE_FIRST)
        assert two.a.hx_register(address, MIB)[0] == 0
        assert two.a.hx_connect(two.name_b) == FAILED  # HCCL 15: not aligned
    with HixlPair(make_host("8.5.0"), libs) as two:
        codes = [two.a.hx_register((index + 1) << 21, 64)[0] for index in range(257)]
        assert codes == [0] * 256 + [FAILED]  # HCCL 7


def test_rule_27_acl_codes_pass_through(make_host: Hosts, libs: Path) -> None:
    with HixlPair(make_host(), libs) as two:
        local, remote, *_ = two.link()
        two.a.faults("op.put@1=fail:507013;op.put@2=delay:500")
        assert two.a.hx_transfer(two.name_b, WRITE, [(local, remote, 64)]) == 507013
        assert two.a.hx_transfer(two.name_b, WRITE, [(local, remote, 64)], 100) == TIMEOUT  # 507046


def test_rule_30_deregistration(make_host: Hosts, libs: Path) -> None:
    with HixlPair(make_host(), libs) as two:
        _, _, handle, _ = two.link()
        assert two.a.hx_deregister(0) == PARAM
        assert two.a.hx_deregister(0x1234) == 0  # unknown
        assert two.a.hx_deregister(handle) == PARAM  # bound
        assert two.a.hx_disconnect(two.name_b) == 0
        assert two.a.hx_deregister(handle) == 0
        assert two.a.hx_deregister(handle) == 0


def test_rule_30_registration_refuses_no_ranges(pair: HixlPair) -> None:
    assert pair.a.hx_register(0, 64)[0] == PARAM
    assert pair.a.hx_register(1 << 21, 0)[0] == PARAM
    assert pair.a.hx_register((1 << 64) - 64, 128)[0] == PARAM


@pytest.mark.parametrize("flavour", ["8.5.0", "9.1"])
def test_rule_30_finalize_takes_everything_down(make_host: Hosts, libs: Path, flavour: str) -> None:
    names = ("hccl_comm", "hccl_region", "hccl_listener", "hixl_channel", "hixl_engine", "stream", "device_memory")
    with HixlPair(make_host(flavour), libs) as two:
        local, remote, *_ = two.link()
        assert two.b.hx_connect(two.name_a) == 0
        assert two.a.hx_transfer(two.name_b, WRITE, [(local, remote, 64)]) == 0
        two.a.hx_finalize()
        two.a.hx_finalize()  # no effect
        assert [two.a.live(name) for name in names] == [0, 0, 0, 0, 0, 0, two.a.live("device_memory")]
        two.b.hx_finalize()
        assert [two.b.live(name) for name in names[:6]] == [0] * 6
        assert two.a.violations() == two.b.violations() == 0


def finalizes_then_transfers(number: int, client: str) -> None:
    os.environ["CANN_SIM_HIXL_CLIENT"] = client
    from .hixl_client import HixlClient

    one = HixlClient()
    one.start(0)
    assert one.hx_initialize(free_name(), NO_POOL) == 0
    one.hx_finalize()
    assert one.hx_transfer("127.0.0.1:5000", WRITE, []) == FAILED
    assert number == 910


def test_rule_30_use_after_finalize(make_host: Hosts, libs: Path) -> None:
    client = str(libs / "libhixl_client.so")
    run_client(finalizes_then_transfers, 850, client, host=make_host("8.5.0")).violated(30)
    run_client(finalizes_then_transfers, 910, client, host=make_host("9.1")).refused(26, FAILED)


def finalizes_acl_first(client: str) -> None:
    os.environ["CANN_SIM_HIXL_CLIENT"] = client
    from .hixl_client import HixlClient

    one = HixlClient()
    one.start(0)
    assert one.hx_initialize(free_name(), NO_POOL) == 0
    one.acl.aclFinalize()


def test_rule_33_acl_is_not_finalized_under_an_engine(make_host: Hosts, libs: Path) -> None:
    run_client(finalizes_acl_first, str(libs / "libhixl_client.so"), host=make_host()).violated(33)


def test_rule_31_a_silent_peer_is_removed(make_host: Hosts, libs: Path) -> None:
    with HixlPair(make_host(), libs, CANN_SIM_TIME_SCALE="0.004") as two:  # beats each 40 ms, dead after 480 ms
        local, remote, *_ = two.link()
        time.sleep(0.7)  # longer than the limit: beats keep the link
        assert two.a.hx_transfer(two.name_b, WRITE, [(local, remote, 64)]) == 0
        os.kill(two.b.pid(), signal.SIGSTOP)
        end = time.monotonic() + 10
        while two.a.live("hixl_channel") and time.monotonic() < end:
            time.sleep(0.02)
        assert two.a.hx_transfer(two.name_b, WRITE, [(local, remote, 64)]) == NOT_CONNECTED
        os.kill(two.b.process.pid, signal.SIGCONT)
