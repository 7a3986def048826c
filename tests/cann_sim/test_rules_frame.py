"""Rules 1 to 3, 32 and 33: what is exported and installed, faults and the log, and what hardware leaves undefined."""

from __future__ import annotations

import _ctypes
import ctypes
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from .client import Client, run_client
from .conftest import Hosts
from .install import FLAVOURS, install
from .vendor import ACL, HOST_TO_DEVICE, MIB, RUNTIME, Acl, Core, Library

HERE = Path(__file__).parent
NUMBERS = {"8.3": 830, "8.5.0": 850, "9.0": 900, "9.1": 910, "devlib": 910}


def exported(library: Path) -> set[str]:
    """The symbols that a library defines for others."""
    text = subprocess.run(
        ["nm", "-D", "--defined-only", str(library)], check=True, capture_output=True, text=True
    ).stdout
    return {line.split()[-1].split("@")[0] for line in text.splitlines() if " A " not in line}


def expected(name: str, flavour: str) -> set[str]:
    """What exports/ lists for a flavour."""
    symbols = set()
    for line in (HERE / "exports" / name).read_text().splitlines():
        words = line.split("#")[0].split()
        since = int(words[1]) if len(words) > 1 else 0
        until = int(words[2]) if len(words) > 2 else 9999
        if words and since <= NUMBERS[flavour] < until:
            symbols.add(words[0])
    return symbols


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_rule_01_each_flavour_exports_its_symbols_only(libs: Path, flavour: str) -> None:
    for library in ("ascendcl", "runtime"):
        assert exported(libs / flavour / f"lib{library}.so") == expected(f"{library}.txt", flavour)
    for library in (libs / flavour).glob("lib*.so"):
        assert "HcclCommConfigInit" not in exported(library)
        soname = subprocess.run(["readelf", "-d", str(library)], check=True, capture_output=True, text=True).stdout
        assert f"soname: [{library.name}]" in soname
    assert (libs / flavour / "libhcomm.so").exists() == (flavour != "8.3")
    one_sided = libs / flavour / ("libhccl.so" if flavour == "8.3" else "libhcomm.so")
    assert "HcclCommInitClusterInfoMemConfig" in exported(one_sided)
    if flavour != "8.3":
        assert "HcclCommInitClusterInfoMemConfig" not in exported(libs / flavour / "libhccl.so")
    assert (libs / flavour / "libcann_hixl.so").exists() == (flavour != "8.3")


def wants_new_symbols() -> None:
    acl = Acl(0)
    assert not acl.has("aclrtGetPhyDevIdByUserDevId")  # 9.1
    assert not acl.has("aclFinalizeReference")  # 8.5
    try:
        ctypes.CDLL("libhcomm.so")
    except OSError as missing:
        assert "libhcomm.so" in str(missing)
    else:
        raise AssertionError("8.3 has a libhcomm.so")


def test_rule_01_an_old_release_lacks_what_is_new(make_host: Hosts) -> None:
    run_client(wants_new_symbols, host=make_host("8.3")).succeeded()


def stubbed() -> None:
    acl = Acl(None, init=False)
    assert acl.aclInit(None) == 100039
    assert acl.aclrtSetDevice(0) == 100039
    out = ctypes.c_void_p()
    assert acl.aclrtMalloc(ctypes.byref(out), 64, 0) == 100039
    assert acl.soc() is None


def test_rule_01_the_stubs_answer_that_they_are_stubs(make_host: Hosts) -> None:
    run_client(stubbed, host=make_host("devlib")).refused(1, 100039)


@pytest.mark.parametrize("flavour", ["8.3", "8.5.0", "9.1"])
def test_rule_02_layout_and_version_files(make_host: Hosts, flavour: str) -> None:
    host = make_host(flavour, devices=2, physical_ids=(4, 7))
    home, root = Path(host["ASCEND_HOME_PATH"]), Path(host["KVLINK_ASCEND_SYSROOT"])
    old = flavour == "8.3"
    assert (home / "set_env.sh").exists() != old
    assert (home.parent / "set_env.sh").exists() == old
    assert (home / "lib64" / "libascendcl.so").exists()
    runtime = (home / "share" / "info" / "runtime" / "version.info").read_text().splitlines()[0]
    # The trap: a reader of this line alone would take 8.3 for a CANN 7.8.
    assert runtime == {"8.3": "Version=7.8.T30.0.B231", "8.5.0": "Version=8.5.0", "9.1": "Version=9.1.0"}[flavour]
    (info,) = home.glob("*-linux/ascend_toolkit_install.info")
    release = {"8.3": "8.3.RC1", "8.5.0": "8.5.0", "9.1": "9.1.0"}[flavour]
    assert f"version={release}" in info.read_text().splitlines()
    if not old:
        hcomm = (home / "share" / "info" / "hcomm" / "version.info").read_text().splitlines()[0]
        assert hcomm == {"8.5.0": "Version=8.5.0-beta.1", "9.1": "Version=9.0.0"}[flavour]
    assert "address_7=192.168.100.107" in (root / "etc" / "hccn.conf").read_text()
    tool = root / "usr/local/Ascend/driver/tools/hccn_tool"
    answer = subprocess.run([tool, "-i", "7", "-ip", "-g"], check=True, capture_output=True, text=True).stdout
    assert "ipaddr:192.168.100.107" in answer.splitlines()
    assert subprocess.run([tool, "-i", "5", "-ip", "-g"], capture_output=True, check=False).returncode != 0
    text = f". {home if not old else home.parent}/set_env.sh; echo $ASCEND_HOME_PATH; echo $LD_LIBRARY_PATH"
    lines = subprocess.run(["sh", "-c", text], check=True, capture_output=True, text=True).stdout.splitlines()
    assert lines[0] == str(home)
    assert "devlib" not in lines[1]


def test_rule_02_files_and_driver_can_be_missing(libs: Path, tmp_path: Path) -> None:
    host = install("8.5.0", libs=libs, out=tmp_path / "root", driver=False, install_info=False)
    home = Path(host["ASCEND_HOME_PATH"])
    assert not list(home.glob("*-linux/ascend_toolkit_install.info"))
    lines = subprocess.run(
        ["sh", "-c", f". {home}/set_env.sh; echo $LD_LIBRARY_PATH"], check=True, capture_output=True, text=True
    ).stdout
    assert lines.strip().endswith("/devlib"), "without a driver set_env.sh falls back to the stubs"
    with pytest.raises(ValueError, match="expected one of"):
        install("7.0", libs=libs, out=tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="cann_sim"):
        install("8.5.0", libs=tmp_path, out=tmp_path / "other")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(ValueError, match="no simulated host"):
        install("8.5.0", libs=libs, out=tmp_path / "mine")


def asks_versions(expected_text: str) -> None:
    acl = Acl(None)
    package = (ctypes.c_char * 512)()
    assert acl.aclsysGetCANNVersion(1, ctypes.addressof(package)) == 0
    assert ctypes.string_at(package).decode() == expected_text
    assert acl.aclsysGetCANNVersion(8, ctypes.addressof(package)) == 100000
    if acl.has("aclsysGetVersionStr"):
        text, number = (ctypes.c_char * 128)(), ctypes.c_int32()
        assert acl.aclsysGetVersionStr(b"runtime", ctypes.addressof(text)) == 0
        assert text.value.decode() == expected_text
        assert acl.aclsysGetVersionNum(b"hcomm", ctypes.byref(number)) == 0
        assert number.value == {"8.5.0": 80500000 - 199, "9.1.0": 90000000}[expected_text]


@pytest.mark.parametrize(("flavour", "text"), [("8.3", "7.8.T30.0.B231"), ("8.5.0", "8.5.0"), ("9.1", "9.1.0")])
def test_rule_02_what_the_libraries_say_of_themselves(make_host: Hosts, flavour: str, text: str) -> None:
    run_client(asks_versions, text, host=make_host(flavour)).refused(2, 100000)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_rule_03_the_libraries_use_the_old_string_abi(libs: Path, flavour: str) -> None:
    for library in (libs / flavour).glob("lib*.so"):
        text = subprocess.run(["nm", "-D", str(library)], check=True, capture_output=True, text=True).stdout
        assert "__cxx11" not in text, library


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("uint32_t rsv[4];", "uint32_t rsv[5];"),
        ("int32_t memoryType;", "int64_t memoryType;"),
        ("[128];\n}", "[120];\n}"),
    ],
)
def test_rule_03_a_wrong_layout_does_not_compile(tmp_path: Path, right: str, wrong: str) -> None:
    header = (HERE / "src" / "acl_abi.h").read_text()
    assert right in header
    for text, compiles in ((header, True), (header.replace(right, wrong, 1), False)):
        (tmp_path / "acl_abi.h").write_text(text)
        shutil.copy(HERE / "src" / "settings.h", tmp_path)
        command = ["c++", "-std=c++17", "-fsyntax-only", "-include", "acl_abi.h", "-x", "c++", "/dev/null"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode == 0) == compiles, done.stderr
        if not compiles:
            assert "static assertion failed" in done.stderr


def every_function_fails() -> None:
    acl, runtime, core = Acl(0), Library("libruntime.so", RUNTIME), Core()
    for library, names in ((acl, ACL), (runtime, RUNTIME)):
        for name, letters in names.items():
            if not library.has(name) or name in ("aclrtGetLastError", "aclrtPeekAtLastError"):
                continue
            core.faults(f"{name}@2=fail:4242")
            call = getattr(library, name)
            blank = [None if letter.isupper() or letter in "p*s" else 0 for letter in letters]
            assert name in ("aclFinalize", "aclrtResetDevice") or call(*blank) != 4242, name
            if name in ("aclFinalize", "aclrtResetDevice"):
                core.faults(f"{name}@1=fail:4242")
            assert call(*blank) == 4242, name
    assert acl.error() is not None


def test_rule_32_any_call_of_any_function_can_fail(host: dict[str, str]) -> None:
    run_client(every_function_fails, host=host).refused(32, 4242)


def listed_calls() -> None:
    acl = Acl(0)
    stream, pinned, memory = acl.stream(), acl.malloc_host(4096), acl.malloc(4096)
    assert acl.aclrtMemcpyAsync(memory, 4096, pinned, 4096, HOST_TO_DEVICE, stream) == 0
    assert acl.aclrtSynchronizeStream(stream) == 0
    assert acl.aclrtFree(None) == 107000


def test_rule_32_the_log_shows_the_order(host: dict[str, str]) -> None:
    outcome = run_client(listed_calls, host=host).succeeded()
    expected_calls = ["aclInit", "aclrtSetDevice", "aclrtCreateStream", "aclrtMallocHost", "aclrtMalloc"]
    expected_calls += ["aclrtMemcpyAsync", "aclrtSynchronizeStream", "aclrtFree"]
    assert [call["fn"] for call in outcome.calls()] == expected_calls
    assert [call["code"] for call in outcome.calls()][-1] == 107000
    assert outcome.of("ran") and outcome.of("ran")[0]["op"] == "memcpy"
    assert outcome.of("refused")[0]["rule"] == 6


def slow_calls() -> None:
    acl, core = Acl(0), Core()
    core.faults("aclrtGetDevice@1=delay:120; aclrtGetDevice@2=hang:150")
    number = ctypes.c_int32()
    times = []
    for _ in range(3):
        began = time.monotonic()
        assert acl.aclrtGetDevice(ctypes.byref(number)) == 0
        times.append(time.monotonic() - began)
    assert times[0] > 0.11, times
    assert times[1] > 0.14, times
    core.faults("aclrtGetDevice=hang")
    returned = threading.Event()

    def call() -> None:
        acl.aclrtGetDevice(ctypes.byref(number))
        returned.set()

    thread = threading.Thread(target=call)
    thread.start()
    assert not returned.wait(0.2)
    core.cann_sim_release()
    assert returned.wait(10)
    thread.join()


def test_rule_32_calls_can_be_late_or_hang(host: dict[str, str]) -> None:
    run_client(slow_calls, host=host).succeeded()


def test_rule_32_a_wrong_fault_or_setting_is_refused(host: dict[str, str]) -> None:
    for env in ({"CANN_SIM_FAULTS": "aclInit=explode"}, {"CANN_SIM_DELAY_US": "fast"}, {"CANN_SIM_SOC": "B300"}):
        outcome = run_client(listed_calls, host=host, env=env)
        assert outcome.code == 97, outcome
        assert next(iter(env)) in outcome.errors
    outcome = run_client(listed_calls, host=host, env={"CANN_SIM_FAULTS": "aclrtMalloc@1=crash"})
    assert outcome.code == -signal.SIGKILL
    assert outcome.of("fault")[0]["action"] == "crash"


def after_finalize(how: str) -> None:
    acl = Acl(0)
    if how == "reference":
        left = ctypes.c_uint64()
        assert acl.aclInit(None) == 100002
        assert acl.aclFinalizeReference(ctypes.byref(left)) == 0
        assert left.value == 1
        assert acl.aclrtSetDevice(0) == 0  # still initialised
        assert acl.aclFinalizeReference(ctypes.byref(left)) == 0
    else:
        assert acl.aclFinalize() == 0
    acl.aclrtSetDevice(0)


@pytest.mark.parametrize("how", ["plain", "reference"])
def test_rule_33_a_call_after_finalize(host: dict[str, str], how: str) -> None:
    run_client(after_finalize, how, host=host).violated(33)


def after_fork() -> None:
    acl = Acl(0)
    child = os.fork()
    if child == 0:
        acl.aclrtSetDevice(0)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    raise SystemExit(3 if os.WIFSIGNALED(status) or os.WEXITSTATUS(status) != 0 else 0)


def test_rule_33_a_call_in_a_forked_child(host: dict[str, str]) -> None:
    run_client(after_fork, host=host).violated(33)


def unload() -> None:
    library = ctypes.CDLL("libascendcl.so")
    _ctypes.dlclose(library._handle)


def test_rule_33_dlclose(host: dict[str, str]) -> None:
    run_client(unload, host=host).violated(33)


def reset_elsewhere() -> None:
    acl = Acl(0)
    context = acl.current_context()
    thread = threading.Thread(target=lambda: (acl.aclrtSetCurrentContext(context), acl.aclrtResetDevice(0)))
    thread.start()
    thread.join()
    out = ctypes.c_void_p()
    acl.aclrtMalloc(ctypes.byref(out), 64, 0)


def test_rule_33_the_device_was_reset_by_another_thread(host: dict[str, str]) -> None:
    run_client(reset_elsewhere, host=host).violated(33)


def record_again() -> None:
    acl = Acl(0)
    stream, event = acl.stream(), ctypes.c_void_p()
    assert acl.aclrtCreateEvent(ctypes.byref(event)) == 0
    assert acl.aclrtRecordEvent(event, stream) == 0
    acl.aclrtRecordEvent(event, stream)


def test_rule_33_a_plain_event_is_recorded_once(host: dict[str, str]) -> None:
    run_client(record_again, host=host).violated(33)


def racing() -> None:
    acl = Acl(0)
    context, stream, event = acl.current_context(), acl.stream(), acl.event()

    def query() -> None:
        acl.aclrtSetCurrentContext(context)
        while True:
            acl.event_complete(event)

    threading.Thread(target=query, daemon=True).start()
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        acl.aclrtRecordEvent(event, stream)
    raise SystemExit(0)


def test_rule_33_one_event_recorded_and_queried_at_once(host: dict[str, str]) -> None:
    run_client(racing, host=host, env={"CANN_SIM_LOG": ""}).violated(33)


def logged_only() -> None:
    acl, core = Acl(0), Core()
    address = acl.malloc(MIB)
    acl.aclrtFree(address)
    acl.aclrtFree(address)
    assert core.cann_sim_violations() == 1


def test_rule_33_violations_can_be_counted_instead(host: dict[str, str]) -> None:
    outcome = run_client(logged_only, host=host, env={"CANN_SIM_ON_VIOLATION": "log"})
    assert outcome.code == 0, outcome.errors
    assert [event["rule"] for event in outcome.of("violation")] == [6]


def waits_for_input() -> None:
    acl = Acl(0)
    print(json.dumps({"soc": acl.soc()}), flush=True)
    input()


@pytest.mark.parametrize(("soc", "name"), [("A2", "Ascend910B"), ("A3", "Ascend910_93"), ("950", "Ascend950")])
def test_soc_names(make_host: Hosts, soc: str, name: str) -> None:
    with Client(waits_for_input, host=make_host(soc=soc)) as client:
        assert json.loads(client.line())["soc"].startswith(name)
        client.say()
        client.finish().succeeded()
