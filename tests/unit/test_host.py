"""What the host provider declares in Python against what its library accepts."""

import pytest

from kvlink._engine import EngineChannel, EngineProvider
from kvlink._host import SPEC
from kvlink.config import validate_options
from kvlink.errors import ConfigError

VALUES = {
    "path": "tcp",
    "streams": 3,
    "tcp_host": "127.0.0.1",
    "tcp_port": 0,
    "threads": 1,
    "copy_slice": "1MiB",
    "bind_host": "127.0.0.1",
    "advertise_host": "127.0.0.1",
    "peer_timeout_ms": 2500,
}


@pytest.fixture(scope="module")
def provider():
    return EngineProvider.load(SPEC.library_path())


def test_the_library_is_the_provider_it_is_listed_as(provider):
    assert provider.name == SPEC.name
    assert set(provider.path_names) == {choice for option in SPEC.options for choice in option.choices or ()} - {"auto"}


def test_every_declared_option_has_a_value_here():
    assert set(VALUES) == {option.name for option in SPEC.options}


@pytest.mark.parametrize("name", sorted(VALUES))
def test_the_library_takes_every_declared_option(provider, name):
    EngineChannel.open(provider, options=validate_options(SPEC, {name: VALUES[name]})).close()


@pytest.mark.parametrize("path", ["auto", "shm", "cma", "tcp"])
def test_the_library_takes_every_path(provider, path):
    EngineChannel.open(provider, options=validate_options(SPEC, {"path": path})).close()


@pytest.mark.parametrize("options", [{"streams": "0"}, {"path": "pigeon"}, {"copy_slice": "1"}, {"speed": "11"}])
def test_the_library_refuses_what_python_did_not_check(provider, options):
    with pytest.raises(ConfigError):
        EngineChannel.open(provider, options=options)


def test_the_library_knows_no_option_that_is_not_declared(provider):
    """Its message for an unknown option names the nearest it knows: ask for the neighbour of each undeclared name."""
    for name in ("stream", "paths", "tcp_hosts", "tcp_ports", "thread", "copy_slices", "bind_hosts", "advertise_hosts"):
        with pytest.raises(ConfigError) as caught:
            EngineChannel.open(provider, options={name: "1"})
        nearest = str(caught.value).partition("did you mean '")[2].partition("'")[0]
        assert nearest in VALUES
