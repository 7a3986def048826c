import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvlink.control import auth, messages, wire
from kvlink.control.wire import Greeting, ProtocolError


def transcript(*parts):
    out = auth.Transcript()
    for part in parts:
        out.add(part)
    return out


def test_a_proof_holds_for_its_role_key_and_transcript_only():
    key, other = auth.secret_key(b"one"), auth.secret_key(b"two")
    proof = auth.prove(key, "initiator", transcript(b"a", b"b"))
    assert auth.proof_holds(proof, key, "initiator", transcript(b"a", b"b"))
    assert not auth.proof_holds(proof, key, "acceptor", transcript(b"a", b"b"))
    assert not auth.proof_holds(proof, other, "initiator", transcript(b"a", b"b"))
    assert not auth.proof_holds(proof, key, "initiator", transcript(b"a", b"c"))
    assert not auth.proof_holds(proof, key, "initiator", transcript(b"ab"))  # boundaries count
    assert not auth.proof_holds(bytes(32), key, "initiator", transcript(b"a", b"b"))


def test_session_keys_differ_by_direction_session_and_transcript():
    keys = auth.SessionKeys.derive(auth.secret_key(b"s"), transcript(b"x"))
    others = auth.SessionKeys.derive(auth.secret_key(b"s"), transcript(b"y"))
    links = [keys.link_key(b"1" * 16), keys.link_key(b"2" * 16), others.link_key(b"1" * 16)]
    values = [keys.initiator, keys.acceptor, keys.data, others.initiator, *links]
    assert len(set(values)) == len(values) and {len(value) for value in values} == {32}


def test_frame_tags_depend_on_order():
    sender, receiver = auth.FrameAuthenticator(b"k" * 32), auth.FrameAuthenticator(b"k" * 32)
    first, second = sender.tag(b"same"), sender.tag(b"same")
    assert first != second and len(first) == auth.TAG_BYTES
    assert receiver.check(first, b"same")
    assert not receiver.check(first, b"same"), "a repeated frame does not verify"


def test_greetings():
    greeting = Greeting(b"i" * 16, b"n" * 32, True)
    assert Greeting.decode(greeting.encode()) == greeting
    assert len(greeting.encode()) == wire.GREETING_BYTES
    with pytest.raises(ProtocolError):
        Greeting.decode(b"GET / HTTP/1.1\r\n".ljust(wire.GREETING_BYTES))


@given(st.binary(max_size=300))
def test_decoding_anything_gives_a_message_or_a_protocol_error(data):
    try:
        message = messages.decode(data)
    except ProtocolError:
        return
    assert messages.decode(messages.encode(message)) == message


@pytest.mark.parametrize(
    "message",
    [
        messages.Notify(b"x"),
        messages.RegionInfo(0, "n" * 201, 1, 3, "cpu", b""),
        messages.RegionClose(2**32, 1),
        messages.Offer(b"short", 1, b"", [], []),
        messages.RegionInfo(-1, "n", 1, 3, "cpu", b""),
    ],
)
def test_caps_on_fields(message):
    import msgspec

    data = msgspec.msgpack.encode(messages.RegionAdd(message) if type(message) is messages.RegionInfo else message)
    if isinstance(message, messages.Notify):
        assert messages.decode(data) == message
        return
    with pytest.raises(ProtocolError):
        messages.decode(data)


def test_deep_nesting_is_a_protocol_error():
    with pytest.raises(ProtocolError):
        messages.decode(b"\x92\x11" + b"\x91" * 100_000)
