"""The LMCache flow: prefiller, decoder and proxy started by the example's own scripts, against a single engine.

One place a combination of mode, channel and ranks; the quick ones run in `make test`, all of them in `make test-full`.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tools.cluster import Engine, EngineSpec
from tools.cluster.lmcache import LMCacheFlow, LMCacheSetup, LogTail, computed, start_lmcache
from tools.demo.run import SENTENCE

from e2e.prompts import prompt
from e2e.simulator import SIMULATED, npus, simulator
from e2e.stage import Stage, cores
from e2e.talk import Answer, ask, eventually

pytestmark = pytest.mark.engine

# Lengths around LMCache's chunk (256 tokens), vLLM's block (128) and step (2,048).
LENGTHS = (1, 2, 20, 127, 128, 129, 255, 256, 257, 700, 2049, 6000)


@dataclass(frozen=True)
class Case:
    """One line of the table in docs/lmcache.md."""

    mode: str
    channel: str = "host"
    path: str = ""
    ranks: int = 1
    proxy: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return "-".join(filter(None, (self.mode, self.channel, self.path, f"tp{self.ranks}", *self.proxy)))


FIRST = ("--first-token", "prefiller")
QUICK = [Case("push", path="shm", proxy=FIRST), Case("delayed", path="tcp")]
REST = [
    Case(mode, path=path, ranks=ranks)
    for mode in ("push", "pull", "delayed")
    for path in ("shm", "tcp")
    for ranks in (1, 2)
    if (mode, path, ranks) != ("delayed", "tcp", 1)
] + [
    Case(mode, channel, ranks=ranks)
    for mode in ("push", "pull", "delayed")
    for channel in SIMULATED
    for ranks in (1, 2)
]


class Place(Stage):
    """A single engine and the flow beside it."""

    def __init__(self, folder: Path, case: Case) -> None:
        super().__init__(folder)
        self.case = case
        self._known: dict[str, Answer] = {}
        self.reference: Engine
        self.flow: LMCacheFlow

    def start(self, model: Path) -> None:
        case, ranks = self.case, self.case.ranks
        first, second = cores(ranks)
        options = {"kvlink.path": case.path} if case.path else {}
        env: dict[str, str] = {}
        own_env: tuple[dict[str, str], dict[str, str]] = ({}, {})
        if case.channel in SIMULATED:
            env = simulator(self.folder, flavour=SIMULATED[case.channel], devices=2 * ranks)
            own_env = npus(ranks)
        setup = LMCacheSetup(
            model,
            (first, second),
            tensor_parallel=ranks,
            mode=case.mode,
            channel=case.channel,
            options={**options, **case.options},
            env=env,
            own_env=own_env,
            proxy_args=("--kv-ready-timeout", "120", *case.proxy),
        )
        self.reference = self.start_engine(EngineSpec("reference", model, cores=first, tensor_parallel=ranks))
        self.flow = start_lmcache(self.cluster, setup)
        self.ready()

    def send(self, tokens: list[int] | str, **body: Any) -> Answer:
        """Asks the proxy; the prefiller makes first tokens only for requests that want no token ids."""
        if self.case.proxy == FIRST:
            body["return_token_ids"] = None
        return ask(self.flow.proxy, tokens, **body)

    def expected(self, tokens: list[int] | str, **body: Any) -> Answer:
        """The single engine's answer."""
        key = repr((tokens, body))
        if key not in self._known:
            self._known[key] = ask(self.reference, tokens, **body)
        return self._known[key]


@pytest.fixture(
    scope="module",
    params=[*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in REST)],
    ids=lambda case: case.id,
)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Place]:
    with Place(tmp_path_factory.mktemp("lmcache"), request.param) as place:
        place.start(model)
        yield place


def test_every_length_answers_as_the_single_engine_does(place: Place) -> None:
    tails = [LogTail(engine.log) for engine in (place.flow.prefill, place.flow.decode)]
    for length in LENGTHS:
        tokens = prompt(length)
        before = computed(place.flow.decode)
        answer = place.send(tokens)
        assert answer.route == "split", (length, answer.headers)
        assert answer.choices[0].text == place.expected(tokens).choices[0].text, length
        assert answer.usage["prompt_tokens"] == length
        assert answer.usage["completion_tokens"] == place.expected(tokens).usage["completion_tokens"]
        # The prompt's KV came from the prefiller: of it the decoder computed at most the last token.
        mine = 1
        eventually(
            "the decoder's count", lambda before=before, mine=mine: computed(place.flow.decode) - before >= mine, 30
        )
        assert computed(place.flow.decode) - before == mine, length
        if length > 1:  # of one token nothing need be read
            moved = eventually("transfers", lambda: [item for tail in tails for item in tail.moved()], 30)
            assert not place.case.path or {item.path for item in moved} == {place.case.path}


def test_the_seeds_request(place: Place) -> None:
    """The curl of the seed: its sentence 100 times, 100 tokens, whatever the sampling defaults are (greedy here)."""
    want = place.expected(SENTENCE * 100, max_tokens=100)
    answer = place.send(SENTENCE * 100, max_tokens=100)
    assert answer.route == "split"
    assert answer.choices[0].text == want.choices[0].text
    streamed = place.send(SENTENCE * 100, max_tokens=100, stream=True)
    assert streamed.complete
    assert streamed.choices[0].text == want.choices[0].text


def test_several_at_once(place: Place) -> None:
    prompts = [prompt(length, seed=1) for length in (1, 50, 129, 385, 900, 1300, 2100)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda tokens: place.send(tokens, stream=True), prompts))
    assert [answer.choices[0].text for answer in answers] == [
        place.expected(tokens).choices[0].text for tokens in prompts
    ]
    assert {answer.route for answer in answers} == {"split"}


def test_a_plain_request_to_either_engine(place: Place) -> None:
    tokens = prompt(300, seed=2)
    for engine in (place.flow.prefill, place.flow.decode):
        assert ask(engine, tokens).ids == place.expected(tokens).ids


def test_two_outputs_and_log_probabilities(place: Place) -> None:
    tokens = prompt(40, seed=3)
    answer = place.send(tokens, logprobs=1)
    assert answer.route == "split"
    assert answer.choices[0].text == place.expected(tokens).choices[0].text
    assert answer.choices[0].logprobs is not None
    both = place.send(tokens, n=2, temperature=1.0, max_tokens=4)  # greedy requests have one output
    assert both.route == "split"
    assert len(both.choices) == 2 and all(choice.text for choice in both.choices)
