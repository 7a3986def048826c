"""Event streams: cut at event ends, passed on byte for byte, rid of transfer parameters."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlink_proxy import sse
from kvlink_proxy.sse import EventFilter, first_error

PLAIN = st.builds(lambda text: b"data: " + json.dumps({"text": text}, ensure_ascii=False).encode(), st.text())
SAYS_IT = st.just(b'data: {"text": "a \\"kv_transfer_params\\" and data: [DONE]"}')
LEAKS = st.just(b'data: {"text": "x", "kv_transfer_params": {"remote_host": "h"}}')
COMMENT = st.just(b": keep-alive")


def cut(data: bytes, places: list[int]) -> list[bytes]:
    marks = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(marks)]


@given(
    st.lists(PLAIN | SAYS_IT | LEAKS | COMMENT, max_size=6),
    st.lists(st.integers(0, 10_000), max_size=10),
    st.sampled_from([b"\n\n", b"\r\n\r\n"]),
    st.booleans(),
)
def test_any_cutting_gives_the_same_events(events: list[bytes], places: list[int], end: bytes, done: bool) -> None:
    stream = b"".join(event + end for event in [*events, *([b"data: [DONE]"] if done else [])])
    filter_ = EventFilter()
    pieces = [filter_.feed(chunk) for chunk in cut(stream, places)]
    assert all(piece == b"" or piece.endswith(end) for piece in pieces)
    expected = b"".join(
        (b'data: {"text":"x"}' if b'"x", "kv_transfer_params"' in event else event) + end for event in events
    ) + (b"data: [DONE]" + end if done else b"")
    assert b"".join(pieces) == expected
    assert filter_.done == done


def test_the_usual_chunk_is_not_copied() -> None:
    chunk = b'data: {"text": "a"}\n\n'
    assert EventFilter().feed(chunk) is chunk


def test_an_endless_event_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 100)
    filter_ = EventFilter()
    with pytest.raises(ValueError, match="larger than 100"):
        for _ in range(20):
            filter_.feed(b"data: aaaaaaaaaa")


def test_a_first_event_with_an_error_is_seen() -> None:
    assert first_error(b'data: {"error": {"message": "m", "code": 500}}\n\n') == {"message": "m", "code": 500}
    assert first_error(b'data: {"text": "an \\"error\\" here"}\n\n') is None
    assert first_error(b": keep-alive\n\n") is None
    assert first_error(b'data: {"error": {"mess') is None
    assert first_error(b"") is None
