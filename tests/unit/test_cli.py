import json
import os
import signal
import subprocess
import sys
import types

import pytest

from kvlink import cli
from kvlink.errors import ChannelUnavailableError
from kvlink.registry import ProbeResult


def run(capsys, *arguments):
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_version(capsys):
    code, out, err = run(capsys, "--version")
    assert code == 0
    assert out.startswith("kvlink ")
    assert not err


def test_help_lists_the_commands(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for name in ("channels", "probe", "conform", "bench", "proxy"):
        assert name in out


def test_no_command_prints_help(capsys):
    code, out, _ = run(capsys)
    assert code == 2
    assert "commands:" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ["chanels"],
        ["--nonsense"],
        ["channels", "extra"],
        ["channels", "--xml"],
        ["probe"],
        ["probe", "no_such_channel"],
        ["probe", "host", "more"],
    ],
)
def test_wrong_input_is_one_line_and_code_2(capsys, arguments):
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert not out
    assert err.count("\n") == 1
    assert err.startswith("kvlink")
    assert "error: " in err


def test_channels(capsys, monkeypatch):
    monkeypatch.setattr("kvlink.registry.probe", lambda name: ProbeResult(name, name == "host", "no device", "noise"))
    code, out, _ = run(capsys, "channels")
    assert code == 0
    assert out.splitlines()[0].split() == ["NAME", "PACKAGE", "VERSION", "HERE"]
    (host,) = (line for line in out.splitlines() if line.startswith("host "))
    assert host.endswith("  usable")
    code, out, _ = run(capsys, "channels", "--json")
    assert {"name", "distribution", "version", "usable", "reason"} == set(json.loads(out)[0])


def test_channels_says_why_one_does_not_work_here(capsys, monkeypatch):
    monkeypatch.setattr("kvlink.registry.probe", lambda name: ProbeResult(name, False, "no device", "noise"))
    _, out, _ = run(capsys, "channels")
    assert all(line.endswith("  not usable: no device") for line in out.splitlines()[1:])


def test_channels_without_probing(capsys, monkeypatch):
    monkeypatch.delattr("kvlink.registry.probe")
    code, out, _ = run(capsys, "channels", "--no-probe")
    assert code == 0
    assert out.splitlines()[0].split() == ["NAME", "PACKAGE", "VERSION"]
    code, out, _ = run(capsys, "channels", "--no-probe", "--json")
    assert {"name", "distribution", "version"} == set(json.loads(out)[0])


@pytest.mark.parametrize(("usable", "expected"), [(True, 0), (False, 1)])
def test_probe(capsys, monkeypatch, usable, expected):
    reason = "" if usable else "no device"
    monkeypatch.setattr("kvlink.registry.probe", lambda name: ProbeResult(name, usable, reason, "noise"))
    code, out, err = run(capsys, "probe", "host")
    assert code == expected
    assert out == ("host: usable\n" if usable else "host: not usable: no device\n")
    assert not err
    code, out, _ = run(capsys, "probe", "host", "--json")
    assert code == expected
    assert json.loads(out) == {"name": "host", "usable": usable, "reason": reason, "output": "noise"}


def test_lazy_commands_get_their_arguments(capsys, monkeypatch):
    module = types.ModuleType("kvlink.testing.cli")
    module.add_arguments = lambda parser: parser.add_argument("name")
    module.run = lambda parsed: print(parsed.name) or 7
    monkeypatch.setitem(sys.modules, "kvlink.testing.cli", module)
    assert run(capsys, "conform", "mine") == (7, "mine\n", "")
    code, _, err = run(capsys, "conform")
    assert code == 2
    assert err.startswith("kvlink conform: error: ")


def test_an_error_of_a_command_is_one_line(capsys, monkeypatch):
    module = types.ModuleType("kvlink.bench.cli")
    module.add_arguments = lambda parser: None

    def fail(parsed):
        raise ChannelUnavailableError("first line\nsecond line")

    module.run = fail
    monkeypatch.setitem(sys.modules, "kvlink.bench.cli", module)
    assert run(capsys, "bench") == (1, "", "kvlink bench: error: first line second line\n")


def test_proxy_that_is_not_installed(capsys, monkeypatch):
    for name in ("kvlink_proxy", "kvlink_proxy.cli"):
        monkeypatch.setitem(sys.modules, name, None)
    code, _, err = run(capsys, "proxy", "--port", "1")
    assert code == 2
    assert "pip install kvlink-proxy" in err
    assert err.count("\n") == 1


def test_proxy_gets_everything_after_its_name(capsys, monkeypatch):
    package, module = types.ModuleType("kvlink_proxy"), types.ModuleType("kvlink_proxy.cli")
    module.main = lambda argv: print(argv) or 3
    package.cli = module
    monkeypatch.setitem(sys.modules, "kvlink_proxy", package)
    monkeypatch.setitem(sys.modules, "kvlink_proxy.cli", module)
    assert run(capsys, "proxy", "--version", "-x") == (3, "['--version', '-x']\n", "")


def test_ctrl_c_ends_with_130(tmp_path):
    """A real SIGINT to a real process: no traceback."""
    (tmp_path / "kvlink_proxy").mkdir()
    (tmp_path / "kvlink_proxy" / "__init__.py").touch()
    # A shell's background job has SIGINT ignored, and so would this child of one.
    (tmp_path / "kvlink_proxy" / "cli.py").write_text(
        "import signal\ndef main(argv):\n    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "    print('ready', flush=True)\n    signal.pause()\n"
    )
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    with subprocess.Popen(
        [sys.executable, "-m", "kvlink.cli", "proxy"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == ""


def test_a_reader_that_goes_away_is_no_traceback():
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "kvlink.cli", "channels"],
            stdout=write_end,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            timeout=120,
            check=False,
        )
    finally:
        os.close(write_end)
    assert done.returncode == 141
    assert done.stderr == ""
