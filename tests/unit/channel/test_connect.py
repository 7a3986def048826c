import asyncio
import socket
import threading

import pytest

import kvlink
from kvlink.control.addresses import Address, parse

from .conftest import SECRET, eventually


def test_connect_gives_both_sides_a_peer_with_regions(pair):
    assert pair.peer_b.state == pair.peer_a.state == "connected"
    assert pair.peer_b.id == pair.b.id and pair.peer_a.id == pair.a.id
    assert pair.peer_b.address == pair.b.address and pair.peer_a.address == pair.a.address
    assert set(pair.peer_b.regions) == {"b"} and set(pair.peer_a.regions) == {"a"}
    assert pair.peer_b.regions["b"].nbytes == 1 << 20 and pair.peer_b.regions["b"].access == "rw"
    assert dict(pair.a.peers()) == {pair.b.id: pair.peer_b}


def test_connecting_again_returns_the_same_peer(pair):
    assert pair.a.connect(pair.b.address) is pair.peer_b
    host, port = parse(pair.b.address).host, parse(pair.b.address).port
    assert host == "127.0.0.1"
    assert pair.a.connect(f"tcp://localhost:{port}", timeout=10) is pair.peer_b
    assert pair.b.connect(pair.a.address) is pair.peer_a
    assert len(pair.a.peers()) == len(pair.b.peers()) == 1


def test_connect_from_asyncio(open_channel):
    a, b = open_channel(), open_channel()
    peer = asyncio.run(a.connect_async(b.address, timeout=10))
    assert peer.id == b.id


def test_identity_is_exchanged_and_shared_keys_must_agree(open_channel):
    a = open_channel(identity={"model": "m", "dtype": "bf16", "only_a": 1})
    b = open_channel(identity={"model": "m", "dtype": "bf16", "only_b": "x"})
    peer = a.connect(b.address, timeout=10)
    assert dict(peer.identity) == {"model": "m", "dtype": "bf16", "only_b": "x"}


def test_identity_mismatch_is_raised_with_key_and_values_and_seen_by_both(open_channel):
    a, b = open_channel(identity={"model": "m", "tp": 2}), open_channel(identity={"model": "m", "tp": 4})
    with pytest.raises(kvlink.IdentityMismatch) as caught:
        a.connect(b.address, timeout=10)
    assert (caught.value.key, caught.value.ours, caught.value.theirs) == ("tp", 2, 4)
    refusals = eventually(lambda: list(b._hub.listener.refusals))
    assert isinstance(refusals[0], kvlink.IdentityMismatch)
    assert (refusals[0].key, refusals[0].ours, refusals[0].theirs) == ("tp", 4, 2)
    assert b.statistics().refused == 1 and "tp" in b.statistics().last_refusal


def test_wrong_secret_is_an_authentication_error_on_both_sides(open_channel):
    a, b = open_channel(secret="one"), open_channel(secret="another")
    with pytest.raises(kvlink.AuthenticationError, match="secret"):
        a.connect(b.address, timeout=10)
    refusals = eventually(lambda: list(b._hub.listener.refusals))
    assert isinstance(refusals[0], kvlink.AuthenticationError) and "KVLINK_SECRET" in str(refusals[0])


@pytest.mark.parametrize("ours, theirs", [(SECRET, None), (None, SECRET)])
def test_a_missing_secret_is_named(open_channel, ours, theirs):
    a, b = open_channel(secret=ours), open_channel(secret=theirs)
    with pytest.raises(kvlink.AuthenticationError, match="has none"):
        a.connect(b.address, timeout=10)
    assert isinstance(eventually(lambda: list(b._hub.listener.refusals))[0], kvlink.AuthenticationError)


def test_without_a_secret_on_loopback_works(open_channel):
    a, b = open_channel(secret=None), open_channel(secret=None)
    assert a.connect(b.address, timeout=10).state == "connected"


def test_the_secret_comes_from_the_environment(open_channel, monkeypatch):
    monkeypatch.setenv("KVLINK_SECRET", "from the environment")
    a, b = open_channel(secret=None), open_channel(secret="from the environment")
    assert a.connect(b.address, timeout=10).state == "connected"


def test_listening_beyond_loopback_needs_a_secret_or_consent(open_channel):
    with pytest.raises(kvlink.ConfigError, match="without a secret"):
        open_channel(secret=None, listen="tcp://0.0.0.0:0", advertise="127.0.0.1")
    channel = open_channel(secret=None, listen="tcp://0.0.0.0:0", advertise="127.0.0.1", insecure=True)
    assert channel.address.startswith("tcp://127.0.0.1:")


def test_connecting_beyond_loopback_needs_a_secret_or_consent(open_channel):
    a = open_channel(secret=None)
    with pytest.raises(kvlink.ConfigError, match="without a secret"):
        a.connect("tcp://192.0.2.1:9", timeout=1)


def test_a_wildcard_is_never_advertised(open_channel):
    with pytest.raises(kvlink.ConfigError, match="advertise"):
        open_channel(listen="tcp://0.0.0.0:0", advertise="0.0.0.0")
    try:
        channel = open_channel(listen="tcp://0.0.0.0:0")
    except kvlink.ConfigError as error:
        assert "advertise" in str(error)  # a machine without any routable address
    else:
        assert "0.0.0.0" not in channel.address


def test_ipv6(open_channel):
    a, b = open_channel(listen="tcp://[::1]:0"), open_channel(listen="tcp://[::1]:0")
    assert b.address.startswith("tcp://[::1]:")
    assert a.connect(b.address, timeout=10).state == "connected"


def test_nothing_listens_there(open_channel):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(kvlink.ConnectError, match="refused"):
            open_channel().connect(address, timeout=5)


def test_a_silent_listener_is_a_connect_timeout(open_channel):
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(kvlink.ConnectTimeout):
        open_channel().connect(f"tcp://127.0.0.1:{silent.getsockname()[1]}", timeout=0.3)


def test_something_else_listens_there(open_channel):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            sock, _ = server.accept()
            with sock:
                sock.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n" + b"x" * 100)
                while sock.recv(4096):
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(kvlink.ConnectError, match="no kvlink channel"):
            open_channel().connect(f"tcp://127.0.0.1:{server.getsockname()[1]}", timeout=5)
        thread.join(5)


@pytest.mark.parametrize(
    "address", ["", "tcp://", "tcp://host", "udp://h:1", "tcp://h:99999", "tcp://h:x", "tcp://[::1"]
)
def test_malformed_addresses(open_channel, address):
    with pytest.raises(kvlink.ConfigError):
        open_channel().connect(address, timeout=1)


def test_connecting_to_oneself_is_refused(open_channel):
    a = open_channel()
    with pytest.raises(kvlink.ConnectError, match="own address"):
        a.connect(a.address, timeout=5)


@pytest.mark.parametrize("refuse", [lambda identity: False, lambda identity: 1 / 0])
def test_on_peer_of_the_acceptor_may_refuse(open_channel, refuse):
    a, b = open_channel(identity={"who": "a"}), open_channel()
    b.on_peer = refuse
    with pytest.raises(kvlink.ConnectRefused, match="on_peer"):
        a.connect(b.address, timeout=10)
    assert not b.peers()


def test_on_peer_sees_the_identity_on_both_sides(open_channel, recorder):
    a, b = open_channel(identity={"who_a": 1}), open_channel(identity={"who_b": 2})
    a.on_peer = b.on_peer = recorder
    a.connect(b.address, timeout=10)
    assert sorted(map(str, recorder.messages)) == ["{'who_a': 1}", "{'who_b': 2}"]


def test_on_peer_of_the_initiator_may_refuse(open_channel):
    a, b = open_channel(), open_channel()
    a.on_peer = lambda identity: False
    with pytest.raises(kvlink.ConnectRefused, match="this side"):
        a.connect(b.address, timeout=10)
    a.on_peer = None
    assert a.connect(b.address, timeout=10).state == "connected"


@pytest.mark.parametrize("attempt", range(5))
def test_simultaneous_connects_end_with_one_link(open_channel, attempt):
    a, b = open_channel(), open_channel()
    barrier = threading.Barrier(4)
    peers = {}

    def connect(key, channel, other):
        barrier.wait()
        peers[key] = channel.connect(other.address, timeout=20)

    threads = [
        threading.Thread(target=connect, args=(key, *pair)) for key, pair in enumerate([(a, b), (b, a), (a, b), (b, a)])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(peers) == 4
    assert peers[0] is peers[2] and peers[1] is peers[3]
    assert peers[0].state == peers[1].state == "connected"
    assert peers[0]._session.session_id == peers[1]._session.session_id
    assert len(a.peers()) == len(b.peers()) == 1


def test_a_mesh_of_channels_connects_at_once(open_channel):
    channels = [open_channel() for _ in range(5)]
    errors = []

    def connect_all(channel):
        try:
            for other in channels:
                if other is not channel:
                    channel.connect(other.address, timeout=30)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=connect_all, args=(channel,)) for channel in channels]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert [len(channel.peers()) for channel in channels] == [4] * 5


def test_a_full_acceptor_refuses_with_its_limit(open_channel):
    b = kvlink.open_from_config({"transfer_channel": "host", "max_peers": 1, "secret": SECRET.decode()})
    try:
        open_channel().connect(b.address, timeout=10)
        with pytest.raises(kvlink.ConnectRefused, match="full: 1"):
            open_channel().connect(b.address, timeout=10)
    finally:
        b.close()


def test_loopback_is_not_advertised_to_a_remote_peer(monkeypatch):
    from kvlink.control import sockets

    class Connected:
        def getsockname(self):
            return ("10.0.0.1", 1)

        def getpeername(self):
            return ("10.0.0.2", 2)

    with pytest.raises(kvlink.ConnectError, match=r"10\.0\.0\.2.*127\.0\.0\.1"):
        sockets.refuse_loopback_advertisement(Connected(), Address("127.0.0.1", 5))
    sockets.refuse_loopback_advertisement(Connected(), Address("10.0.0.1", 5))


def test_a_provider_of_another_name_is_a_version_mismatch(open_channel):
    import msgspec

    a, b = open_channel(), open_channel()
    hub = b._hub
    hub.local = type(hub.local)(
        hub.local.channel_id,
        hub.local.key,
        hub.local.has_secret,
        msgspec.structs.replace(hub.local.hello, provider="other"),
    )
    with pytest.raises(kvlink.VersionMismatch, match=r"'host'.*'other'"):
        a.connect(b.address, timeout=10)
    assert isinstance(eventually(lambda: list(hub.listener.refusals))[0], kvlink.VersionMismatch)
