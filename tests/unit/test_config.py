import dataclasses
import logging

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kvlink._convert import to_bool, to_number, to_size
from kvlink.config import ChannelConfig, read_secret_file, resolve_secret, validate_options
from kvlink.errors import ConfigError
from kvlink.registry import Option, ProviderSpec

SPEC = ProviderSpec(
    name="demo",
    library="/nowhere",
    options=(
        Option("path", "str", "auto", choices=("auto", "shm", "tcp")),
        Option("streams", "int", 2),
        Option("ratio", "float"),
        Option("zero_copy", "bool"),
        Option("window", "size"),
        Option("label", "str"),
    ),
)


def secret_file(tmp_path, content=b"s3cret\n", mode=0o600):
    path = tmp_path / "secret"
    path.write_bytes(content)
    path.chmod(mode)
    return path


# ---- mapping, YAML, environment ----
def test_defaults_are_what_the_contract_says():
    config = ChannelConfig()
    assert (config.peer_timeout, config.transfer_timeout) == (3.0, 60.0)
    assert (config.transfer_channel, config.listen, config.insecure) == ("auto", "tcp://127.0.0.1:0", False)


def test_mapping_with_every_key():
    values = {
        "transfer_channel": "host",
        "listen": "tcp://10.0.0.1:7000",
        "advertise": "tcp://node:7000",
        "device": "npu:1",
        "secret": "hush",
        "identity": {"model": "m", "tp": 2},
        "options": {"path": "tcp"},
        "insecure": "yes",
        "peer_timeout": "1.5",
        "transfer_timeout": 10,
        "request_timeout": 2,
        "handshake_timeout": 3,
        "max_handshakes": "8",
        "max_peers": 4,
    }
    config = ChannelConfig.from_mapping(values, environ={})
    assert set(values) == {field.name for field in dataclasses.fields(ChannelConfig)}
    assert config.secret == b"hush"
    assert config.insecure is True
    assert config.peer_timeout == 1.5
    assert config.max_handshakes == 8
    assert config.identity == {"model": "m", "tp": 2}


@pytest.mark.parametrize(
    ("key", "nearest"), [("lisen", "listen"), ("peer_timout", "peer_timeout"), ("secretfile", "secret_file")]
)
def test_unknown_key_suggests_the_nearest(key, nearest):
    with pytest.raises(ConfigError, match=f"{key}.*did you mean '{nearest}'"):
        ChannelConfig.from_mapping({key: 1}, environ={})


def test_unknown_key_like_none_lists_the_valid_ones():
    with pytest.raises(ConfigError, match=r"valid: .*listen"):
        ChannelConfig.from_mapping({"zzzzzz": 1}, environ={})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("transfer_channel", ""),
        ("transfer_channel", 3),
        ("listen", None),
        ("identity", {"a": 1.5}),
        ("identity", {"a": True}),
        ("identity", ["a"]),
        ("options", "path=tcp"),
        ("options", {1: 2}),
        ("insecure", "perhaps"),
        ("peer_timeout", 0),
        ("peer_timeout", -1),
        ("peer_timeout", "soon"),
        ("peer_timeout", float("nan")),
        ("peer_timeout", float("inf")),
        ("peer_timeout", True),
        ("max_peers", -1),
        ("max_peers", 1.5),
        ("secret", ""),
        ("secret", 5),
    ],
)
def test_wrong_values_name_their_key(key, value):
    with pytest.raises(ConfigError, match=key):
        ChannelConfig.from_mapping({key: value}, environ={})


def test_prefix_is_allowed_but_not_twice():
    assert ChannelConfig.from_mapping({"kvlink.device": "npu:0"}, environ={}).device == "npu:0"
    with pytest.raises(ConfigError, match="twice"):
        ChannelConfig.from_mapping({"kvlink.device": "npu:0", "device": "cpu"}, environ={})


@pytest.mark.parametrize("document", [["a"], "text", 5])
def test_not_a_mapping(document):
    with pytest.raises(ConfigError, match="expected a mapping"):
        ChannelConfig.from_mapping(document, environ={})


def test_lmcache_file_is_read_without_touching_the_rest():
    config = ChannelConfig.from_mapping(
        {
            "chunk_size": 256,
            "transfer_channel": "host",
            "extra_config": {
                "nixl_x": 1,
                "kvlink.listen": "tcp://127.0.0.1:9",
                "kvlink.path": "tcp",
                "kvlink.options": {"a": 1},
            },
        },
        environ={},
    )
    assert (config.transfer_channel, config.listen) == ("host", "tcp://127.0.0.1:9")
    assert config.options == {"path": "tcp", "a": 1}


def test_lmcache_key_without_its_dot_is_refused():
    with pytest.raises(ConfigError, match="kvlink_listen"):
        ChannelConfig.from_mapping({"extra_config": {"kvlink_listen": 1}}, environ={})


def test_lmcache_typo_surfaces_with_the_options():
    config = ChannelConfig.from_mapping({"extra_config": {"kvlink.peer_timeuot": 1}}, environ={})
    with pytest.raises(ConfigError, match="did you mean 'peer_timeout'"):
        validate_options(SPEC, config.options)


def test_yaml(tmp_path):
    path = tmp_path / "kvlink.yaml"
    path.write_text("transfer_channel: host\noptions: {path: tcp, streams: 4}\n")
    config = ChannelConfig.from_yaml(path, environ={})
    assert config.options == {"path": "tcp", "streams": 4}
    path.write_text("")
    assert ChannelConfig.from_yaml(path, environ={}) == ChannelConfig()


def test_yaml_errors_name_the_file_and_never_the_secret(tmp_path):
    path = tmp_path / "kvlink.yaml"
    with pytest.raises(ConfigError, match="cannot read"):
        ChannelConfig.from_yaml(path)
    path.write_text("secret: 'TOPSECRET\nlisten: x\n")
    with pytest.raises(ConfigError, match=r"line \d+") as caught:
        ChannelConfig.from_yaml(path)
    assert "TOPSECRET" not in str(caught.value)
    path.write_text("lisen: x\n")
    with pytest.raises(ConfigError, match=r"kvlink\.yaml.*lisen"):
        ChannelConfig.from_yaml(path)
    path.write_text("!!python/object/apply:os.getcwd []\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        ChannelConfig.from_yaml(path)


def test_environment():
    config = ChannelConfig.from_env(
        {
            "KVLINK_TRANSFER_CHANNEL": "host",
            "KVLINK_PEER_TIMEOUT": "2",
            "KVLINK_INSECURE": "1",
            "KVLINK_IDENTITY": '{"model": "m", "tp": 2}',
            "KVLINK_OPTIONS": '{"streams": 3}',
            "KVLINK_OPTION_PATH": "tcp",
            "KVLINK_SECRET": "hush",
            "KVLINK_NATIVE_DIR": "/x",
            "KVLINK_BENCH_ANYTHING": "1",
            "PATH": "/bin",
        },
        base={"transfer_channel": "other", "listen": "tcp://127.0.0.1:5"},
    )
    assert (config.transfer_channel, config.listen) == ("host", "tcp://127.0.0.1:5")
    assert (config.peer_timeout, config.insecure, config.secret) == (2.0, True, b"hush")
    assert config.options == {"streams": 3, "path": "tcp"}
    assert config.identity == {"model": "m", "tp": 2}


def test_environment_typo():
    with pytest.raises(ConfigError, match=r"KVLINK_LISEN.*KVLINK_LISTEN"):
        ChannelConfig.from_env({"KVLINK_LISEN": "x"})
    with pytest.raises(ConfigError, match="KVLINK_IDENTITY is not valid JSON"):
        ChannelConfig.from_env({"KVLINK_IDENTITY": "{"})


def test_environment_secret_replaces_the_base(tmp_path):
    path = secret_file(tmp_path)
    for base in ({"secret": "base"}, {"secret_file": str(path)}):
        assert ChannelConfig.from_env({"KVLINK_SECRET": "new"}, base=base).secret == b"new"
        assert ChannelConfig.from_env({"KVLINK_SECRET_FILE": str(path)}, base=base).secret == b"s3cret"
    assert ChannelConfig.from_env({}, base={"secret": "base"}).secret == b"base"


# ---- secrets ----
def test_secret_is_in_no_text(tmp_path):
    config = ChannelConfig.from_mapping({"secret": "TOPSECRET"}, environ={})
    assert config.secret == b"TOPSECRET"
    assert "TOPSECRET" not in repr(config)
    assert "TOPSECRET" not in str(config)
    with pytest.raises(ConfigError) as caught:
        ChannelConfig.from_mapping({"secret": ["TOPSECRET"]}, environ={})
    assert "TOPSECRET" not in str(caught.value)


def test_order_of_secrets(tmp_path):
    path = secret_file(tmp_path)
    environ = {"KVLINK_SECRET": "from-environment"}
    assert resolve_secret("given", environ=environ) == b"given"
    assert resolve_secret(None, path, environ=environ) == b"s3cret"
    assert resolve_secret(environ=environ) == b"from-environment"
    assert resolve_secret(environ={"KVLINK_SECRET_FILE": str(path)}) == b"s3cret"
    assert resolve_secret(environ={}) is None
    assert ChannelConfig.from_mapping({"secret_file": str(path)}, environ={}).secret == b"s3cret"


@pytest.mark.parametrize(
    "call",
    [
        lambda path: resolve_secret("a", path),
        lambda path: resolve_secret(environ={"KVLINK_SECRET": "a", "KVLINK_SECRET_FILE": str(path)}),
        lambda path: resolve_secret(environ={"KVLINK_SECRET": ""}),
        lambda path: resolve_secret(None, 5),
        lambda path: resolve_secret(None, ""),
    ],
)
def test_ambiguous_or_empty_secrets_are_refused(tmp_path, call):
    with pytest.raises(ConfigError):
        call(secret_file(tmp_path))


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_can_write_is_refused(tmp_path, mode):
    with pytest.raises(ConfigError, match="others can write"):
        read_secret_file(secret_file(tmp_path, mode=mode))


def test_a_file_that_all_can_read_is_warned_about(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "kvlink.config"):
        assert read_secret_file(secret_file(tmp_path, mode=0o600)) == b"s3cret"
        assert not caplog.records
        assert read_secret_file(secret_file(tmp_path, mode=0o644)) == b"s3cret"
    assert "chmod 600" in caplog.text
    assert "s3cret" not in caplog.text


@pytest.mark.parametrize("content", [b"", b" \n", b"x" * 70000])
def test_empty_and_huge_files_are_refused(tmp_path, content):
    with pytest.raises(ConfigError, match="secret file"):
        read_secret_file(secret_file(tmp_path, content))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        read_secret_file(tmp_path / "none")
    with pytest.raises(ConfigError, match="cannot read"):
        read_secret_file(tmp_path)


# ---- the provider's options ----
def test_options_become_text():
    assert validate_options(SPEC, {}) == {"path": "auto", "streams": "2"}
    assert validate_options(
        SPEC, {"path": "tcp", "streams": "4", "ratio": 1, "zero_copy": "off", "window": "2GiB", "label": 7}
    ) == {"path": "tcp", "streams": "4", "ratio": "1.0", "zero_copy": "0", "window": str(2 << 30), "label": "7"}
    assert validate_options(SPEC, {"path": None, "zero_copy": True})["zero_copy"] == "1"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strems": 2}, "did you mean 'streams'"),
        ({"path": "tpc"}, "did you mean 'tcp'"),
        ({"path": "carrier-pigeon"}, "auto, shm, tcp"),
        ({"streams": 1.5}, "whole number"),
        ({"streams": True}, "number"),
        ({"zero_copy": 2}, "true or false"),
        ({"window": "2 parsecs"}, "size"),
        ({"window": -1}, "size"),
        ({"label": ["x"]}, "expected a text"),
        ({"label": "a\0b"}, "NUL"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(ConfigError) as caught:
        validate_options(SPEC, options)
    assert words in str(caught.value)
    assert "'demo'" in str(caught.value)


def test_an_option_of_an_unknown_type_is_refused_where_it_is_declared():
    with pytest.raises(ConfigError, match="declares type"):
        Option("x", "complex")


# ---- conversions ----
@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("64KiB", 65536),
        ("64 kib", 65536),
        ("2GiB", 2 << 30),
        ("1.5MB", 1500000),
        ("3Ti", 3 << 40),
    ],
)
def test_sizes(text, size):
    assert to_size("x", text) == size


@given(st.one_of(st.text(max_size=12), st.floats(), st.integers(), st.booleans(), st.none(), st.binary(max_size=4)))
def test_conversions_answer_or_refuse(value):
    for convert in (to_size, to_bool, to_number):
        try:
            result = convert("key", value)
        except ConfigError as error:
            assert "key" in str(error)
        else:
            assert isinstance(result, (int, float))


@given(
    st.dictionaries(
        st.text(max_size=8),
        st.one_of(st.none(), st.integers(), st.text(max_size=8), st.lists(st.integers())),
        max_size=4,
    )
)
def test_any_mapping_is_read_or_refused(mapping):
    try:
        ChannelConfig.from_mapping(yaml.safe_load(yaml.safe_dump(mapping)), environ={})
    except ConfigError as error:
        assert str(error)
