"""One prefiller, one decoder, rank for rank with a single engine: the same tokens, and the decoder computes only one.

One reference engine, one prefiller and two decoders (one chooses its path, one is forced to TCP and has its prefix
cache on), all float32 and one core each. The prefiller's prefix cache is on, so that the second decoder's prompts are
handed over from cached blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tools.cluster import Engine, EngineSpec, Proxy, kvlink_config

from e2e.prompts import prompt
from e2e.stage import PATIENCE, Decoder, Stage, block_size, check_pull, cores, settle
from e2e.talk import Answer, ask, chat

pytestmark = pytest.mark.engine

Side = tuple[Decoder, Proxy, set[str]]
LENGTHS: dict[str, Callable[[int], int]] = {
    "1": lambda block: 1,
    "2": lambda block: 2,
    "20": lambda block: 20,
    "block - 1": lambda block: block - 1,
    "block": lambda block: block,
    "block + 1": lambda block: block + 1,
    "700": lambda block: 700,
    "1500": lambda block: 1500,
    "2049, two chunks": lambda block: 2049,
    "6000, three chunks": lambda block: 6000,
}
TEXT = "Explain the significance of KV cache in language models in English. " * 20


class Pair(Stage):
    """The engines of this file."""

    reference: Engine
    prefill: Engine
    block: int

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._answers: dict[str, Answer] = {}
        self.sides: dict[str, Side] = {}

    def start(self, model: Path) -> None:
        first, second = cores()
        self.reference = self.start_engine(EngineSpec("reference", model, cores=first))
        producer = kvlink_config("kv_producer", kvlink_verify=True, **PATIENCE)
        self.prefill = self.start_engine(
            EngineSpec("prefill", model, cores=first, prefix_caching=True, transfer=producer)
        )
        for name, paths in (("auto", {"shm", "cma"}), ("tcp", {"tcp"})):
            trace = str(self.folder / f"pulls-{name}.jsonl")
            config = kvlink_config("kv_consumer", path=name, kvlink_verify=True, kvlink_trace_file=trace, **PATIENCE)
            caching = name == "tcp"
            decoder = self.start_decoder(
                EngineSpec(f"decode-{name}", model, cores=second, prefix_caching=caching, transfer=config)
            )
            self.sides[name] = (decoder, self.start_proxy(self.prefill, decoder.engine, f"proxy-{name}"), paths)
        self.ready()
        self.block = block_size(self.prefill)

    def expected(self, tokens: list[int]) -> list[int]:
        """The reference's answer."""
        key = repr(tokens)
        if key not in self._answers:
            self._answers[key] = ask(self.reference, tokens)
        return self._answers[key].ids


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Pair]:
    with Pair(tmp_path_factory.mktemp("disagg")) as pair:
        pair.start(model)
        yield pair


@pytest.fixture(params=["auto", "tcp"])
def side(request: pytest.FixtureRequest, pair: Pair) -> Side:
    return pair.sides[request.param]


@pytest.mark.parametrize("length", LENGTHS)
def test_the_answer_is_the_single_engines(pair: Pair, side: Side, length: str) -> None:
    decoder, proxy, paths = side
    tokens = prompt(LENGTHS[length](pair.block))
    with decoder.computes(1):
        answer = ask(proxy, tokens)
    assert answer.route == "split"
    assert len(answer.ids) == 16
    assert answer.ids == pair.expected(tokens)
    if len(tokens) == 1:
        # All but the last token of a prompt is pulled: there is nothing to pull, and the hand-off is let go.
        decoder.pulls(0)
    else:
        (pull,) = decoder.pulls(1)
        check_pull(pull, tokens=len(tokens), block=pair.block, paths=paths)
    settle(pair.prefill, decoder.engine)


def test_concurrent_requests_answer_as_the_single_engine_does(pair: Pair, side: Side) -> None:
    decoder, proxy, paths = side
    prompts = [prompt(length, seed=1) for length in (1, 50, 129, 385, 900, 1300, 2100)]
    with decoder.computes(len(prompts)), ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda tokens: ask(proxy, tokens, stream=True), prompts))
    assert [answer.ids for answer in answers] == [pair.expected(tokens) for tokens in prompts]
    assert {answer.route for answer in answers} == {"split"}
    pulls = {pull.prompt_tokens: pull for pull in decoder.pulls(len(prompts) - 1)}
    for tokens in prompts[1:]:
        check_pull(pulls[len(tokens)], tokens=len(tokens), block=pair.block, paths=paths)
    settle(pair.prefill, decoder.engine)


def test_with_a_prefix_cache_only_missing_blocks_are_pulled(pair: Pair) -> None:
    decoder, proxy, paths = pair.sides["tcp"]
    block = pair.block
    start = prompt(5 * block, seed=2)
    first, second = [*start, *prompt(20, seed=3)], [*start, *prompt(300, seed=4)]
    for tokens, local in ((first, 0), (second, 5 * block), (second, len(second) // block * block)):
        with decoder.computes(1):
            answer = ask(proxy, tokens)
        assert answer.ids == pair.expected(tokens)
        (pull,) = decoder.pulls(1)
        check_pull(pull, tokens=len(tokens), block=block, paths=paths, local=local)
    # All its whole blocks are here: only the last token is missing, so that nothing is to be pulled.
    whole = second[: 6 * block + 1]
    with decoder.computes(1):
        assert ask(proxy, whole).ids == pair.expected(whole)
    decoder.pulls(0)
    settle(pair.prefill, decoder.engine)


def test_chat_streams_and_plain_answers_are_the_single_engines(pair: Pair) -> None:
    decoder, proxy, _ = pair.sides["auto"]
    with decoder.computes(3):
        whole = ask(proxy, TEXT)
        streamed = ask(proxy, TEXT, stream=True)
        talk = chat(proxy, TEXT)
    reference, reference_talk = ask(pair.reference, TEXT), chat(pair.reference, TEXT)
    assert whole.choices == reference.choices
    assert whole.usage["prompt_tokens"] == reference.usage["prompt_tokens"]
    assert whole.usage["completion_tokens"] == reference.usage["completion_tokens"] == 16
    assert streamed.choices == reference.choices
    assert streamed.events > 10
    assert streamed.usage["completion_tokens"] == 16
    assert talk.choices == reference_talk.choices
    assert chat(proxy, TEXT, stream=True).choices[0].text == reference_talk.choices[0].text
    assert {whole.route, streamed.route, talk.route} == {"split"}
    assert len(decoder.pulls(4)) == 4


def test_n_stop_logprobs_and_short_answers(pair: Pair) -> None:
    decoder, proxy, _ = pair.sides["auto"]
    tokens = prompt(333, seed=5)
    full = ask(pair.reference, tokens)

    several = {"n": 2, "temperature": 1.0, "seed": 7}
    both = ask(proxy, tokens, **several)
    assert both.route == "split"
    assert [choice.ids for choice in both.choices] == [c.ids for c in ask(pair.reference, tokens, **several).choices]
    assert both.choices[0].ids != both.choices[1].ids
    assert [pull.outcome for pull in decoder.pulls(2)] == ["ok", "ok"]  # two requests share one hand-off

    stop = ask(proxy, tokens, stop_token_ids=[full.ids[4]])
    at = full.ids.index(full.ids[4])
    assert stop.ids == full.ids[: at + 1]
    assert stop.choices[0].finish_reason == "stop"
    first = ask(proxy, tokens, stop_token_ids=[full.ids[0]])
    assert (first.ids, first.choices[0].finish_reason) == (full.ids[:1], "stop")
    one = ask(proxy, tokens, max_tokens=1)
    assert (one.ids, one.choices[0].finish_reason) == (full.ids[:1], "length")

    ours, theirs = (ask(server, tokens, logprobs=3).choices[0] for server in (proxy, pair.reference))
    assert ours.ids == theirs.ids
    assert ours.logprobs["tokens"] == theirs.logprobs["tokens"]
    assert ours.logprobs["token_logprobs"] == pytest.approx(theirs.logprobs["token_logprobs"], abs=2e-3)
    assert {pull.outcome for pull in decoder.pulls(4)} == {"ok"}
    settle(pair.prefill, decoder.engine)


def test_plain_requests_are_served_by_either_engine(pair: Pair) -> None:
    decoder, _, _ = pair.sides["auto"]
    tokens = prompt(257, seed=6)
    with decoder.computes(len(tokens)):
        assert ask(decoder.engine, tokens).ids == pair.expected(tokens)
    assert ask(pair.prefill, tokens).ids == pair.expected(tokens)
    assert ask(pair.prefill, tokens, stream=True).params is None
    decoder.pulls(0)
    settle(pair.prefill, decoder.engine)


@pytest.mark.parametrize("extra", [{"echo": True, "max_tokens": 4}, {"prompt_logprobs": 1, "max_tokens": 4}])
def test_requests_that_need_the_prompts_logits_go_to_the_decoder_alone(pair: Pair, extra: dict[str, object]) -> None:
    decoder, proxy, _ = pair.sides["auto"]
    tokens = prompt(150, seed=7)
    with decoder.computes(len(tokens)):
        answer = ask(proxy, tokens, **extra)
    assert answer.route == "plain"
    assert answer.ids == ask(pair.reference, tokens, **extra).ids
    decoder.pulls(0)


def test_long_answers_at_once_fill_blocks_after_the_pulled_ones(pair: Pair) -> None:
    decoder, proxy, _ = pair.sides["auto"]
    prompts = [prompt(length, seed=8) for length in (64, 200, 500)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda tokens: ask(proxy, tokens, max_tokens=150), prompts))
    assert [answer.ids for answer in answers] == [ask(pair.reference, t, max_tokens=150).ids for t in prompts]
    assert [pull.outcome for pull in decoder.pulls(3)] == ["ok"] * 3
