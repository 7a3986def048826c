"""kv_connector_extra_config: unknown keys name the nearest, wrong values are refused, the secret stays hidden."""

from __future__ import annotations

import pytest

from kvlink_vllm.settings import Settings, SettingsError, parse_cores


def read(**extra):
    return Settings.from_extra_config({key.replace("__", "."): value for key, value in extra.items()})


def test_defaults_and_provider_options():
    settings = read(transfer_channel="host", kvlink__path="tcp", kvlink__streams=4, kvlink__lease=5)
    assert settings.options == {"path": "tcp", "streams": 4}
    assert settings.lease == 5.0
    assert settings.on_load_failure == "recompute"
    assert read().transfer_channel == "auto"


def test_slips_in_our_own_keys_are_found_with_auto_too():
    with pytest.raises(SettingsError, match=r"did you mean 'kvlink\.lease'"):
        read(kvlink__leese=3)


def test_auto_leaves_options_to_the_provider_that_is_taken():
    assert read(kvlink__path="tcp").options == {"path": "tcp"}


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("kvlink.leese", "'kvlink.lease'"),
        ("kvlink.paht", "'kvlink.path'"),
        ("lease", "'kvlink.lease'"),
        ("transfer_chanel", "'transfer_channel'"),
        ("kvlink.on_load_fail", "'kvlink.on_load_failure'"),
        ("zzzzzzzz", "known keys"),
    ],
)
def test_unknown_keys_name_the_nearest(key, near):
    with pytest.raises(SettingsError, match="unknown key") as caught:
        Settings.from_extra_config({"transfer_channel": "host", key: 1})
    assert near in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lease", 0),
        ("lease", "30"),
        ("lease", True),
        ("contact", -1),
        ("peer_timeout", 0),
        ("peer_timeout", float("nan")),
        ("peer_timeout", float("inf")),
        ("retry_after", -1),
        ("retry_after", float("nan")),
        ("lease", float("nan")),
        ("idle_wait", float("nan")),
        ("pulls", 0),
        ("pulls", 2.5),
        ("insecure", "yes"),
        ("verify", 1),
        ("on_load_failure", "retry"),
        ("cpu_affinity", "a-b"),
        ("cpu_affinity", ""),
        ("listen", "0.0.0.0:5"),
        ("listen", "tcp://127.0.0.1"),
        ("listen", "tcp://127.0.0.1:99999"),
        ("secret", 5),
    ],
)
def test_wrong_values_are_refused(key, value):
    with pytest.raises(SettingsError, match=f"kvlink.{key}"):
        Settings.from_extra_config({"transfer_channel": "host", f"kvlink.{key}": value})


@pytest.mark.parametrize("value", ["", None, 7])
def test_a_channel_must_be_named(value):
    with pytest.raises(SettingsError, match="transfer_channel"):
        Settings.from_extra_config({"transfer_channel": value})


def test_an_unknown_channel_is_refused_with_what_is_installed():
    from kvlink.errors import ChannelNotFoundError

    with pytest.raises(ChannelNotFoundError, match="host"):
        Settings.from_extra_config({"transfer_channel": "hosst"})


def test_secrets(tmp_path, monkeypatch):
    monkeypatch.delenv("KVLINK_SECRET", raising=False)
    monkeypatch.delenv("KVLINK_SECRET_FILE", raising=False)
    assert read().shared_secret() is None
    assert read(kvlink__secret="s3").shared_secret() == b"s3"
    assert "s3" not in repr(read(kvlink__secret="s3"))
    file = tmp_path / "secret"
    file.write_text("from file\n")
    assert read(kvlink__secret_file=str(file)).shared_secret() == b"from file"
    monkeypatch.setenv("KVLINK_SECRET_FILE", str(file))
    assert read().shared_secret() == b"from file"
    monkeypatch.setenv("KVLINK_SECRET", "from env")
    assert read().shared_secret() == b"from env"
    assert read(kvlink__secret="s3").shared_secret() == b"s3"
    with pytest.raises(SettingsError, match="cannot be read"):
        read(kvlink__secret_file=str(tmp_path / "none")).shared_secret()
    file.write_text("\n")
    with pytest.raises(SettingsError, match="empty"):
        read(kvlink__secret_file=str(file)).shared_secret()
    with pytest.raises(SettingsError, match="both set"):
        read(kvlink__secret_file=str(file), kvlink__secret="x")


def test_a_fixed_port_counts_up_with_the_rank():
    settings = read(kvlink__listen="tcp://[::1]:7000", kvlink__advertise="tcp://host.example:7000")
    assert settings.listen_for(0) == "tcp://[::1]:7000"
    assert settings.listen_for(3) == "tcp://[::1]:7003"
    assert settings.advertise_for(2) == "tcp://host.example:7002"
    assert read().listen_for(3) == "tcp://127.0.0.1:0"
    assert read().advertise_for(1) is None


def test_core_lists():
    assert parse_cores("2-4,7") == {2, 3, 4, 7}
    assert parse_cores(None) is None
    assert read(kvlink__cpu_affinity=3).cpu_affinity == "3"
