"""What goes wrong costs time, never the answer, and nothing stays held: forgeries, aborts, lost leases, killed engines.

Leases are short here, so that an abandoned hand-off is given up within the test.
"""

from __future__ import annotations

import random
import re
import secrets
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tools.cluster import Engine

from e2e.faulty import CONTACT, PROMPTS, Pair
from e2e.mix import KINDS, Mix
from e2e.stage import LogMark, settle
from e2e.talk import Exchange, ask, body_of, eventually, hand_off

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Pair]:
    with Pair(tmp_path_factory.mktemp("disagg-faults")) as pair:
        pair.start(model)
        yield pair


@pytest.fixture
def pair(engines: Pair) -> Pair:
    engines.revive()
    return engines


class Listener:
    """A port that takes connections, says what it is told to, and counts."""

    def __init__(self, greeting: bytes) -> None:
        self.connections = 0
        self._greeting = greeting
        self._kept: list[socket.socket] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self._kept.append(connection)
            self.connections += 1
            try:
                connection.sendall(self._greeting)
            except OSError:
                pass

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()
        for connection in self._kept:
            connection.close()


def forgeries(true: dict[str, Any], garbage: str, silent: str, closed: str) -> dict[str, tuple[dict[str, Any], str]]:
    """Parameters that are not what a prefiller said, and a word of the warning that each must cause."""
    return {
        "no version": ({**true, "kvlink_version": None}, "kvlink_version"),
        "other version": ({**true, "kvlink_version": 99}, "kvlink_version"),
        "nixl's": ({"do_remote_prefill": True, "remote_block_ids": [[1, 2]], "remote_host": "h"}, "kvlink_version"),
        "no hand-off id": ({**true, "kvlink_handoff": "../../etc"}, "hand-off id"),
        "a guessed id": ({**true, "kvlink_handoff": secrets.token_hex(16)}, "failed in phase claim"),
        "another host": ({**true, "kvlink_addresses": ["tcp://192.0.2.1:5700"]}, "not loopback"),
        "a file": ({**true, "kvlink_addresses": ["file:///etc/passwd"]}, "not tcp://"),
        "two ranks": ({**true, "kvlink_addresses": [garbage, silent], "tp_size": 2}, "tensor-parallel size"),
        "many ranks": ({**true, "kvlink_addresses": [garbage] * 100_000, "tp_size": 100_000}, "kvlink_addresses"),
        "too many tokens": ({**true, "remote_num_tokens": 1 << 62}, "remote_num_tokens"),
        "a port that says garbage": ({**true, "kvlink_addresses": [garbage]}, "failed in phase connect"),
        "a silent port": ({**true, "kvlink_addresses": [silent]}, "failed in phase connect"),
        "a closed port": ({**true, "kvlink_addresses": [closed]}, "failed in phase connect"),
    }


def test_forged_parameters_at_the_decoder_are_recomputed(pair: Pair) -> None:
    tokens = PROMPTS[-4]
    true = hand_off(pair.prefill, tokens)
    with socket.socket() as unused, Listener(b"\xff" * 4096) as garbage, Listener(b"") as silent:
        unused.bind(("127.0.0.1", 0))  # not listening
        closed = f"tcp://127.0.0.1:{unused.getsockname()[1]}"
        for name, (params, word) in forgeries(true, garbage.address, silent.address, closed).items():
            log = LogMark(pair.decode)
            with pair.decoder.computes(len(tokens)):
                answer = ask(pair.decode, tokens, kv_transfer_params=params)
            assert pair.right(answer, tokens), name
            eventually(f"a warning for {name}", lambda log=log, word=word: word in log.text(), 10)
        assert garbage.connections > 0
        assert silent.connections > 0
    for params in ("text", 7, ["do_remote_prefill"]):
        refused = Exchange(pair.decode, body_of(tokens, kv_transfer_params=params)).read()
        assert refused.status == 400
    settle(pair.prefill, pair.decode)


def test_what_a_client_sends_through_the_proxy_reaches_no_engine(pair: Pair) -> None:
    tokens = PROMPTS[-3]
    stripped = pair.proxy.metric("kvlink_proxy_stripped_total")
    with Listener(b"") as listener:
        forged = {**hand_off(pair.prefill, tokens), "kvlink_addresses": [listener.address]}
        for stream in (False, True):
            with pair.decoder.computes(1):
                answer = ask(pair.proxy, tokens, stream=stream, kv_transfer_params=forged)
            assert pair.right(answer, tokens)
            assert answer.route == "split"
            assert "kv_transfer_params" not in answer.raw
            (pull,) = pair.decoder.pulls(1)
            assert pull.outcome == "ok"
        assert listener.connections == 0
    assert pair.proxy.metric("kvlink_proxy_stripped_total") == stripped + 2
    settle(pair.prefill, pair.decode)


def test_a_hand_off_fetched_too_late_twice_or_for_another_prompt_is_recomputed(pair: Pair) -> None:
    late, other = PROMPTS[-5], PROMPTS[-6]
    expired = pair.prefill.metric("vllm:kvlink_leases_expired_total")
    # For another prompt: the prefiller's worker refuses, and keeps the blocks for whoever has the right one.
    params = hand_off(pair.prefill, late)
    assert pair.right(ask(pair.decode, other, kv_transfer_params=params), other)
    (pull,) = pair.decoder.pulls(1)
    assert (pull.outcome, "another prompt" in pull.raw["reason"]) == ("claim", True)
    eventually("nobody came", lambda: pair.prefill.metric("vllm:kvlink_leases_expired_total") > expired, CONTACT + 20)

    params = hand_off(pair.prefill, late)
    for outcome in ("ok", "claim"):
        assert pair.right(ask(pair.decode, late, kv_transfer_params=params), late)
        (pull,) = pair.decoder.pulls(1)
        assert pull.outcome == outcome, pull.raw

    expired = pair.prefill.metric("vllm:kvlink_leases_expired_total")
    params = hand_off(pair.prefill, late)
    eventually("it expires", lambda: pair.prefill.metric("vllm:kvlink_leases_expired_total") > expired, CONTACT + 20)
    with pair.decoder.computes(len(late)):
        assert pair.right(ask(pair.decode, late, kv_transfer_params=params), late)
    (pull,) = pair.decoder.pulls(1)
    assert pull.outcome == "claim"
    settle(pair.prefill, pair.decode)


def test_a_client_that_leaves_while_the_decoder_pulls(pair: Pair) -> None:
    tokens = PROMPTS[-1]
    params = hand_off(pair.prefill, tokens)
    pair.prefill.pause()
    try:
        with Exchange(pair.decode, body_of(tokens, stream=True, kv_transfer_params=params)):
            eventually("the decoder pulls", lambda: pulling(pair.decode) == 1, 20)
    finally:
        pair.prefill.resume()
    eventually("the pull is over", lambda: pulling(pair.decode) == 0)
    settle(pair.prefill, pair.decode)
    assert pair.right(ask(pair.proxy, tokens), tokens)


def test_a_prefiller_killed_after_its_answer_is_made_up_for(pair: Pair) -> None:
    during, before = PROMPTS[-1], PROMPTS[-2]
    params = hand_off(pair.prefill, during)
    others = hand_off(pair.prefill, before)
    log = LogMark(pair.decode)
    pair.prefill.pause()
    with Exchange(pair.decode, body_of(during, kv_transfer_params=params)) as exchange:
        eventually("the decoder pulls", lambda: pulling(pair.decode) == 1, 20)
        pair.prefill.kill()
        assert pair.right(exchange.read(), during)
    assert pair.right(ask(pair.decode, before, kv_transfer_params=others), before)
    for pull in pair.decoder.pulls(2):
        assert pull.outcome in ("connect", "claim", "transfer", "lease"), pull.raw
        request, peer = re.escape(pull.request), re.escape(pull.raw["peer"])
        told = rf"WARNING.* kvlink: request {request}: the pull from {peer} failed in phase {pull.outcome} "
        told += rf"after \d+ ms; {pull.pulled_tokens} tokens are recomputed here: .*\w"
        assert eventually("a warning", lambda told=told: re.search(told, log.text()), 10)
    # And through the proxy, which goes round the dead prefiller.
    for stream in (False, True):
        answer = ask(pair.proxy, during, stream=stream)
        assert pair.right(answer, during)
        assert answer.route == "recompute"
        assert answer.headers["x-kvlink-reason"]
    pair.revive()
    with pair.decoder.computes(1):
        answer = ask(pair.proxy, during)
    assert (answer.route, pair.right(answer, during)) == ("split", True)


# Two hundred requests: a hundred, then fifty while the prefiller is killed, then fifty while the decoder is.
FIFTY = [kind for kind, count in KINDS.items() for _ in range(count)]


def test_clients_that_leave_at_every_state_leave_nothing_held(pair: Pair) -> None:
    mix = Mix(pair, 1)
    kinds = 2 * FIFTY
    assert len(kinds) == 100
    random.Random(1).shuffle(kinds)
    mix.run(kinds)
    assert mix.wrong == []
    assert mix.failed == []
    assert mix.done == Counter(kinds)
    settle(pair.prefill, pair.decode)
    served(pair)


def test_a_prefiller_killed_under_load_fails_no_request_through_the_proxy(pair: Pair) -> None:
    mix = Mix(pair, 2)

    def kill() -> None:
        pair.prefill.kill()
        pair.prefill = pair.restart(pair.prefill)

    mix.run(random.Random(2).sample(FIFTY, 50), after=8, then=kill)
    assert mix.wrong == []
    assert mix.done["split"] == KINDS["split"]  # others ask the prefiller itself, and may see it die
    assert mix.done.total() + len(mix.failed) == 50
    settle(pair.decode)  # without the new prefiller's help
    pair.revive()
    settle(pair.prefill)
    served(pair)


def test_a_decoder_killed_under_load_leaves_nothing_held(pair: Pair) -> None:
    mix = Mix(pair, 3)

    def kill() -> None:
        pair.decode.kill()
        pair.decoder.engine = pair.restart(pair.decode)

    mix.run(random.Random(3).sample(FIFTY, 50), after=8, then=kill)
    assert mix.wrong == []
    assert mix.failed  # there is no other decoder
    assert mix.done.total() + len(mix.failed) == 50
    settle(pair.prefill)  # without the new decoder's help
    pair.revive()
    settle(pair.decode)
    served(pair)


def served(pair: Pair) -> None:
    """Either engine serves a plain request, and both together one that is split."""
    tokens = PROMPTS[-1]
    for engine in (pair.prefill, pair.decode):
        assert pair.right(ask(engine, tokens), tokens)
    pair.decoder.trace.take()
    with pair.decoder.computes(1):
        answer = ask(pair.proxy, tokens)
    assert (answer.route, pair.right(answer, tokens)) == ("split", True)
    pulls = pair.decoder.trace.take(1, timeout=20)
    assert (pulls[-1].outcome, pulls[-1].prompt_tokens) == ("ok", len(tokens))


def pulling(decode: Engine) -> float:
    return decode.metric("vllm:num_requests_kv_fetch_by_stage", stage="in_progress")
