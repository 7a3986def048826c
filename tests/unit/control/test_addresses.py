import socket

import pytest

import kvlink
from kvlink.control import addresses
from kvlink.control.addresses import Address, parse


@pytest.mark.parametrize(
    "text, host, port",
    [
        ("tcp://127.0.0.1:5", "127.0.0.1", 5),
        ("tcp://[::1]:0", "::1", 0),
        ("node7:65535", "node7", 65535),
    ],
)
def test_parse_and_back(text, host, port):
    address = parse(text)
    assert address == Address(host, port)
    assert parse(str(address)) == address


def test_the_port_may_be_left_out_where_there_is_a_default():
    assert parse("node", default_port=7) == Address("node", 7)
    assert parse("[fe80::1]", default_port=7) == Address("fe80::1", 7)
    assert parse("fe80::1", default_port=7) == Address("fe80::1", 7)
    with pytest.raises(kvlink.ConfigError):
        parse("node")


@pytest.mark.parametrize(
    "host, loopback",
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("::ffff:127.0.0.1", True), ("localhost", True),
     ("10.0.0.1", False), ("::", False), ("0.0.0.0", False), ("node7", False), ("2001:db8::1", False)],
)  # fmt: skip
def test_loopback(host, loopback):
    assert addresses.is_loopback(host) is loopback


def test_advertised():
    bound = Address("127.0.0.1", 5)
    assert addresses.advertised(bound, socket.AF_INET, None) == bound
    assert addresses.advertised(bound, socket.AF_INET, "node7") == Address("node7", 5)
    assert addresses.advertised(bound, socket.AF_INET, "tcp://node7:9") == Address("node7", 9)
    for wildcard in ("0.0.0.0", "[::]"):
        with pytest.raises(kvlink.ConfigError):
            addresses.advertised(bound, socket.AF_INET, wildcard)


def test_a_wildcard_without_a_routable_address_asks_for_advertise(monkeypatch):
    monkeypatch.setattr(addresses, "routable_host", lambda family: None)
    with pytest.raises(kvlink.ConfigError, match="advertise"):
        addresses.advertised(Address("0.0.0.0", 5), socket.AF_INET, None)
    monkeypatch.setattr(addresses, "routable_host", lambda family: "10.1.2.3")
    assert addresses.advertised(Address("0.0.0.0", 5), socket.AF_INET, None) == Address("10.1.2.3", 5)


def test_an_unknown_name_is_a_config_error():
    with pytest.raises(kvlink.ConfigError, match="resolve"):
        addresses.resolve(Address("no-such-host.invalid", 1), operation="connect")
