"""The command line: the example's flags, the proxy's own, and what is refused."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from kvlink_proxy import cli, server
from kvlink_proxy.config import ProxyConfig, Receiver, engine_url, pair

# The command line of the LMCache-Ascend example, as it stands there.
SEED_LINE = """
  --host localhost --port 9100 --prefiller-host localhost --prefiller-port 7100 --num-prefillers 1
  --decoder-host localhost --decoder-port 7200 --decoder-init-port "7300,7301" --decoder-alloc-port "7400,7401"
  --proxy-host localhost --proxy-port 7500 --num-decoders 1
"""
SEED = shlex.split(SEED_LINE)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[ProxyConfig]:
    """The settings that the command would run with."""
    configs: list[ProxyConfig] = []
    monkeypatch.setattr(server, "run", lambda config: configs.append(config) or 0)
    return configs


def test_the_examples_line_asks_for_the_lmcache_flow(started: list[ProxyConfig]) -> None:
    assert cli.main(SEED) == 0
    (config,) = started
    assert config.flow == "lmcache"
    assert config.receivers == (Receiver("localhost", (7300, 7301), (7400, 7401)),)
    assert (config.proxy_host, config.proxy_port) == ("localhost", 7500)
    assert (config.host, config.port, config.prefillers, config.decoders) == (
        "localhost",
        9100,
        ("http://localhost:7100",),
        ("http://localhost:7200",),
    )


def test_the_examples_line_with_the_native_flow(started: list[ProxyConfig], caplog: pytest.LogCaptureFixture) -> None:
    assert cli.main([*SEED, "--flow", "native"]) == 0
    (config,) = started
    assert (config.host, config.port) == ("localhost", 9100)
    assert config.prefillers == ("http://localhost:7100",)
    assert config.decoders == ("http://localhost:7200",)
    assert "--decoder-init-port and --decoder-alloc-port has no meaning" in caplog.text


def test_lmcache_by_name(started: list[ProxyConfig]) -> None:
    assert cli.main(["--flow", "lmcache"]) == 0
    (config,) = started
    assert config.receivers == (Receiver("localhost", (8300,), (8400,)),)
    assert config.proxy_port == 8500


def test_counted_decoders_get_the_next_ports(started: list[ProxyConfig]) -> None:
    assert cli.main(["--num-decoders", "2", "--decoder-init-port", "7300", "--decoder-alloc-port", "7400"]) == 0
    assert [receiver.init_ports for receiver in started[0].receivers] == [(7300,), (7301,)]


def test_decoders_on_several_hosts_may_have_the_same_ports(started: list[ProxyConfig]) -> None:
    line = ["--decoder-host", "a,b", "--decoder-init-port", "7300,7301", "--decoder-alloc-port", "7400,7401"]
    assert cli.main(line) == 0
    assert [(receiver.host, receiver.init_ports) for receiver in started[0].receivers] == [
        ("a", (7300, 7301)),
        ("b", (7300, 7301)),
    ]


def test_each_decoder_may_name_its_ports(started: list[ProxyConfig]) -> None:
    line = "--decoder localhost:1,localhost:2 --decoder-init-port 10,11 --decoder-init-port 12,13 "
    line += "--decoder-alloc-port 20,21 --decoder-alloc-port 22,23"
    assert cli.main(line.split()) == 0
    assert [receiver.alloc_ports for receiver in started[0].receivers] == [(20, 21), (22, 23)]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--decoder-init-port 1,2 --decoder-alloc-port 3", "names 2 ports and --decoder-alloc-port 1"),
        (
            "--num-decoders 2 --decoder-init-port 7300,7301 --decoder-alloc-port 7400,7401",
            "would both take KV in at localhost:7301",
        ),
        ("--decoder a:1,b:2,c:3 --decoder-init-port 1 --decoder-init-port 2", "given 2 times for 3 decoders"),
        ("--num-decoders 2 --decoder-init-port 65535 --decoder-alloc-port 1", "port 65536, which does not exist"),
    ],
)
def test_ports_that_do_not_fit(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(line.split())
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_defaults_are_the_examples(started: list[ProxyConfig]) -> None:
    assert cli.main([]) == 0
    (config,) = started
    assert config == ProxyConfig(("http://localhost:8100",), ("http://localhost:8200",))
    assert (config.host, config.port) == ("localhost", 8000)


def test_lists_of_urls(started: list[ProxyConfig]) -> None:
    assert (
        cli.main(["--prefiller", "a:1,http://b:2/v1/", "--prefiller", "https://c", "--decoder", "http://d:4/x/"]) == 0
    )
    (config,) = started
    assert config.prefillers == ("http://a:1", "http://b:2", "https://c")
    assert config.decoders == ("http://d:4/x",)


@pytest.mark.parametrize(
    ("hosts", "ports", "count", "expected"),
    [
        (["h"], [1], 1, ["h:1"]),
        (["h"], [1], 0, ["h:1"]),
        (["h"], [1], 3, ["h:1", "h:2", "h:3"]),
        (["h"], [1, 5], 1, ["h:1", "h:5"]),
        (["a", "b"], [1], 9, ["a:1", "b:1"]),
        (["a", "b"], [1, 2], 2, ["a:1", "b:2"]),
        (["::1"], [1], 1, ["[::1]:1"]),
    ],
)
def test_pairing_of_hosts_and_ports(hosts: list[str], ports: list[int], count: int, expected: list[str]) -> None:
    assert pair(hosts, ports, count) == tuple(f"http://{item}" for item in expected)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prefiller-host", "a,b", "--prefiller-port", "1,2,3"], "2 hosts and 3 ports"),
        (["--prefiller", "http://a:1", "--prefiller-port", "2"], "either --prefiller or"),
        (["--decoder", "ftp://a:1"], "not the address of an engine"),
        (["--decoder", "http://a:99999"], "ort out of range"),
        (["--decoder", "http://"], "not the address of an engine"),
        (["--decoder", "a:1,a:1"], "named twice"),
        (["--prefiller-port", "x"], "not a port"),
        (["--prefiller-port", "0"], "not between"),
        (["--prefiller-host", "a,,b"], "empty host"),
        (["--port", "70000"], "not between"),
        (["--chunk-timeout", "0"], "must be greater than 0"),
        (["--max-attempts", "-1"], "must be greater than 0"),
        (["--on-prefill-failure", "maybe"], "invalid choice"),
        (["--nonsense"], "unrecognized"),
    ],
)
def test_what_is_refused(
    argv: list[str], message: str, started: list[ProxyConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not started


def test_every_setting_has_a_flag(started: list[ProxyConfig]) -> None:
    floats: dict[str, Any] = {
        name: 7.0 + at
        for at, name in enumerate(
            f for f in ProxyConfig.__dataclass_fields__ if f.endswith(("_timeout", "_seconds", "_interval", "cooldown"))
        )
    }
    numbers = {"max_attempts": 5, "max_concurrent": 6, "max_body_bytes": 70}
    argv = [text for key, value in {**floats, **numbers}.items() for text in (f"--{key.replace('_', '-')}", str(value))]
    assert cli.main([*argv, "--on-prefill-failure", "fail"]) == 0
    (config,) = started
    assert {key: getattr(config, key) for key in (*floats, *numbers)} == {**floats, **numbers}
    assert config.on_prefill_failure == "fail"


def test_addresses() -> None:
    assert engine_url(" h:1 ") == "http://h:1"
    assert engine_url("https://h/base/v1") == "https://h/base"
    for bad in ("", "http://h:1?x=1", "h:port"):
        with pytest.raises(ValueError, match=r"."):
            engine_url(bad)


def test_help_names_every_flag_and_no_empty_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "default: None" not in text
    assert all(flag in text for flag in SEED if flag.startswith("--"))
