import pytest

from kvlink import errors
from kvlink._native import ffi
from kvlink._status import Status, exception_class, raise_status, status_error

OPERATIONS = ["load", "open", "connect", "import region", "put", "get", "register", "close region", "close channel"]


def make(status, message="it broke", site="readv", vendor_code=14):
    return ffi.new(
        "kvl_error *",
        {
            "struct_size": ffi.sizeof("kvl_error"),
            "status": status,
            "message": message.encode(),
            "site": site.encode(),
            "vendor_code": vendor_code,
        },
    )


def test_statuses_are_those_of_the_header():
    header = {name: value for value, name in ffi.typeof("enum kvl_status_code").elements.items()}
    assert {f"KVL_{status.name}": int(status) for status in Status} == header


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("status", [s for s in Status if s != Status.OK] + [99, -5])
def test_every_failing_status_is_an_error_with_a_text(operation, status):
    error = status_error(status, "", operation, peer="tcp://1.2.3.4:5")
    assert isinstance(error, errors.KvlinkError)
    assert operation in str(error)
    assert "tcp://1.2.3.4:5" in str(error)
    assert len(error.message) > 3


@pytest.mark.parametrize(
    ("status", "operation", "expected"),
    [
        (Status.INVALID, "put", errors.RangeError),
        (Status.INVALID, "open", errors.ConfigError),
        (Status.TIMEOUT, "get", errors.TransferTimeout),
        (Status.TIMEOUT, "connect", errors.ConnectTimeout),
        (Status.TIMEOUT, "close region", errors.BusyError),
        (Status.TIMEOUT, "close channel", errors.EngineError),
        (Status.DENIED, "connect", errors.AuthenticationError),
        (Status.CANCELLED, "put", errors.TransferCancelled),
        (Status.LINK_DOWN, "put", errors.PeerLost),
        (Status.LINK_DOWN, "connect", errors.ConnectError),
        (Status.ENGINE_DOWN, "put", errors.EngineError),
        (Status.UNSUPPORTED, "get", errors.UnsupportedError),
        (Status.UNSUPPORTED, "load", errors.ChannelUnavailableError),
        (Status.UNAVAILABLE, "probe", errors.ChannelUnavailableError),
        (Status.BUSY, "close region", errors.BusyError),
    ],
)
def test_map(status, operation, expected):
    assert exception_class(status, operation) is expected


def test_raise_status_carries_everything():
    with pytest.raises(errors.PeerLost) as caught:
        raise_status(make(Status.LINK_DOWN), "put", peer="b")
    error = caught.value
    assert (error.operation, error.peer, error.site, error.vendor_code) == ("put", "b", "readv", 14)
    for part in ("put", "peer b", "it broke", "readv", "14", "connect again"):
        assert part in str(error)


def test_bytes_that_are_no_text_do_not_break_the_report():
    err = make(Status.INTERNAL)
    ffi.memmove(err.message, b"\xff\xfe ok\0", 6)
    with pytest.raises(errors.TransferError, match="ok"):
        raise_status(err, "put")


def test_an_unwritten_error_takes_the_returned_status():
    with pytest.raises(errors.BusyError, match="BUSY"):
        raise_status(make(0, "", "", 0), "register", status=Status.BUSY)
