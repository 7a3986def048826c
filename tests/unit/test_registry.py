import os
import signal
import sys
import time
from pathlib import Path

import pytest

from kvlink import registry
from kvlink.errors import (
    ChannelNotFoundError,
    ChannelUnavailableError,
    ConfigError,
    DuplicateChannelError,
    StateError,
)
from kvlink.registry import ProbeResult, ProviderSpec, channels, claim, find, probe, select

MODULE = """
    from kvlink.registry import ProviderSpec
    SPEC = ProviderSpec({name!r}, library="/nowhere/lib.so", priority={priority}, devices={devices!r})
"""


def offer(distributions, name, *, priority=1, devices=("cpu",)):
    distribution = f"kvlink-{name.replace('_', '-')}"
    distributions.install(
        distribution,
        {name: f"{distribution.replace('-', '_')}:SPEC"},
        MODULE.format(name=name, priority=priority, devices=devices),
    )


def test_listing_imports_nothing(distributions):
    distributions.install("kvlink-boom", {"boom": "kvlink_boom:SPEC"}, "raise RuntimeError('imported')", "2.5")
    listed = {info.name: info for info in channels()}
    assert (listed["boom"].distribution, listed["boom"].version) == ("kvlink-boom", "2.5")
    assert listed["host"].distribution == "kvlink"
    assert "kvlink_boom" not in sys.modules
    with pytest.raises(ChannelUnavailableError, match=r"kvlink-boom 2\.5 cannot be imported: RuntimeError: imported"):
        find("boom")


def test_the_embedded_default_is_installed():
    spec = find("host")
    assert (spec.name, spec.priority, spec.devices) == ("host", 10, ("cpu",))
    assert {"path", "streams", "tcp_host", "bind_host", "advertise_host"} <= {option.name for option in spec.options}


def test_find_loads_once(distributions):
    offer(distributions, "one")
    assert find("one") is find("one")
    assert channels()[-1].spec is find("one")


def test_unknown_name_lists_the_installed_and_names_the_package(distributions):
    with pytest.raises(ChannelNotFoundError) as caught:
        find("deep_blue")
    installed = str(caught.value).partition("installed: ")[2].partition(" (pip")[0]
    assert "host" in installed.split(", ")
    assert "pip install kvlink-deep-blue" in str(caught.value)


def test_unknown_name_like_an_installed_one(distributions):
    with pytest.raises(ChannelNotFoundError, match="did you mean 'host'"):
        find("hosts")


def test_one_name_of_two_distributions(distributions):
    for distribution in ("kvlink-red", "kvlink-blue"):
        distributions.install(distribution, {"twin": f"{distribution.replace('-', '_')}:SPEC"})
    with pytest.raises(DuplicateChannelError) as caught:
        find("twin")
    assert "kvlink-red 1.0" in str(caught.value)
    assert "kvlink-blue 1.0" in str(caught.value)
    assert [info.name for info in channels()].count("twin") == 2


@pytest.mark.parametrize(
    "module",
    [
        "SPEC = 5",
        "from kvlink.registry import ProviderSpec\nSPEC = ProviderSpec('other', library='/x')",
        "NOTHING = 1",
    ],
)
def test_an_entry_point_that_is_no_spec(distributions, module):
    distributions.install("kvlink-odd", {"odd": "kvlink_odd:SPEC"}, module)
    sys.modules.pop("kvlink_odd", None)
    with pytest.raises(ChannelUnavailableError, match="odd"):
        find("odd")
    sys.modules.pop("kvlink_odd", None)


def test_library_that_is_missing():
    with pytest.raises(ChannelUnavailableError, match=r"/nowhere/lib\.so is missing"):
        ProviderSpec("x", library="/nowhere/lib.so").library_path()


def test_library_given_by_a_function(tmp_path):
    (tmp_path / "x.so").touch()
    assert ProviderSpec("x", library=lambda: tmp_path / "x.so").library_path() == str(tmp_path / "x.so")


# ---- auto ----
@pytest.fixture
def verdicts(monkeypatch):
    """Answers probes from a table; what it lacks is usable."""
    table, asked = {}, []

    def answer(name):
        asked.append(name)
        reason = table.get(name, "")
        return ProbeResult(name, not reason, reason)

    monkeypatch.setattr(registry, "probe", answer)
    table["asked"] = asked
    return table


def test_auto_takes_the_highest_priority_that_is_usable(distributions, verdicts):
    offer(distributions, "low", priority=11)
    offer(distributions, "high", priority=30)
    offer(distributions, "middle", priority=20)
    assert select("auto").name == "high"
    verdicts["high"] = "no device"
    assert select("auto").name == "middle"
    verdicts["middle"] = verdicts["low"] = "no"
    assert select("auto").name == "host"


def test_auto_asks_only_what_serves_the_device(distributions, verdicts):
    offer(distributions, "fast", priority=90, devices=("npu",))
    assert select("auto", "cpu").name == "host"
    assert verdicts["asked"] == ["host"]
    assert select("auto", "npu:3").name == "fast"


def test_auto_passes_by_what_is_broken(distributions, verdicts):
    distributions.install("kvlink-broken1", {"broken1": "kvlink_broken1:SPEC"}, "raise ImportError('no')")
    for distribution in ("kvlink-red", "kvlink-blue"):
        distributions.install(distribution, {"twin": f"{distribution.replace('-', '_')}:SPEC"})
    assert select("auto").name == "host"


def test_auto_without_any_gives_every_reason(distributions, verdicts):
    offer(distributions, "gone", devices=("moon",))
    verdicts["gone"] = "driver is missing"
    with pytest.raises(ChannelUnavailableError) as caught:
        select("auto", "moon:0")  # a kind that no installed channel serves
    assert "gone: driver is missing" in str(caught.value)
    assert "host: serves cpu" in str(caught.value)


def test_a_named_channel_is_not_probed_but_must_serve_the_device(verdicts):
    assert select("host").name == "host"
    assert verdicts["asked"] == []
    with pytest.raises(ConfigError, match="npu:0"):
        select("host", "npu:0")


# ---- probe ----
def child(distributions, name, body):
    """A provider whose library_path runs ``body`` in the probe's child."""
    distributions.install(
        f"kvlink-{name}",
        {name: f"kvlink_{name}:SPEC"},
        "from kvlink.registry import ProviderSpec\n"
        "def library():\n"
        + "".join(f"    {line}\n" for line in body.splitlines())
        + f"SPEC = ProviderSpec({name!r}, library=library)\n",
    )


def test_probe_of_an_unknown_channel():
    with pytest.raises(ChannelNotFoundError):
        probe("no_such_channel")


def test_probe_says_why_not_and_keeps_the_answer(distributions, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    chatter = "print('vendor chatter')\nimport ctypes\nctypes.CDLL(None).printf(b'stdio chatter')"
    child(distributions, "dry", chatter + "\nreturn '/nowhere/lib.so'")
    result = probe("dry")
    assert not result.usable
    assert "/nowhere/lib.so is missing" in result.reason
    assert "vendor chatter" in result.output
    assert "stdio chatter" in result.output
    assert probe("dry") is result
    assert probe("dry", refresh=True) is not result


def test_probe_of_a_file_that_is_no_library(distributions, tmp_path):
    (tmp_path / "bad.so").write_text("text")
    child(distributions, "bad", f"return {str(tmp_path / 'bad.so')!r}")
    result = probe("bad")
    assert not result.usable
    assert "bad.so" in result.reason


@pytest.mark.parametrize(
    ("name", "body", "words"),
    [
        (
            "segv",
            "import os, signal\nos.write(2, b'last words')\nos.kill(os.getpid(), signal.SIGSEGV)",
            "SIGSEGV: last words",
        ),
        ("exits", "import os\nos._exit(7)", "exit code 7"),
        ("throws", "raise RuntimeError('surprise')", "surprise"),
    ],
)
def test_probe_that_crashes(distributions, name, body, words):
    child(distributions, name, body)
    result = probe(name)
    assert not result.usable
    assert words in result.reason


def test_probe_that_hangs_is_killed_with_its_children(distributions, tmp_path):
    pids = tmp_path / "pids"
    child(
        distributions,
        "hangs",
        f"""import os, time
pid = os.fork()
with open({str(pids)!r}, 'a') as file:
    file.write(f'{{os.getpid()}}\\n')
time.sleep(600)""",
    )
    started = time.monotonic()
    result = probe("hangs", timeout=6)
    assert time.monotonic() - started < 60
    assert not result.usable
    assert "within 6 s" in result.reason
    for pid in pids.read_text().split():
        deadline = time.monotonic() + 30
        while _alive(int(pid)):
            assert time.monotonic() < deadline, f"process {pid} survived"
            time.sleep(0.01)


def test_a_grandchild_that_escapes_does_not_hold_the_caller(distributions, tmp_path):
    pids = tmp_path / "pids"
    child(
        distributions,
        "escapes",
        f"""import os, time
if os.fork() == 0:
    os.setsid()
    with open({str(pids)!r}, 'w') as file:
        file.write(str(os.getpid()))
time.sleep(60)""",
    )
    started = time.monotonic()
    assert not probe("escapes", timeout=6).usable
    assert time.monotonic() - started < 40
    os.kill(int(pids.read_text()), signal.SIGKILL)


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_probe_without_an_interpreter(monkeypatch, distributions):
    offer(distributions, "lonely")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert "cannot start" in probe("lonely").reason


# ---- exclusion groups ----
def test_a_second_provider_of_a_group_is_refused_until_the_first_is_gone():
    first, again = claim("tables", "red"), claim("tables", "red")
    with pytest.raises(StateError) as caught:
        claim("tables", "blue")
    assert "'red'" in str(caught.value)
    assert "'blue'" in str(caught.value)
    first.release()
    first.release()
    with pytest.raises(StateError):
        claim("tables", "blue")
    again.release()
    claim("tables", "blue").release()


@pytest.mark.parametrize("group", [None, ""])
def test_no_group_excludes_nobody(group):
    claims = [claim(group, name) for name in ("red", "blue")]
    for held in claims:
        held.release()


def test_a_child_starts_without_claims():
    held = claim("tables", "red")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            held.release()
            mine = claim("tables", "blue")
            held.release()
            try:
                claim("tables", "red")
            except StateError:
                mine.release()
                code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    held.release()
