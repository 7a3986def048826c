"""The same with tensor parallel size 2 on both sides: each rank pulls its own half of the heads."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tools.cluster import Engine, EngineSpec, Proxy, kvlink_config

from e2e.prompts import prompt
from e2e.stage import Decoder, Stage, block_size, check_pull, cores, settle
from e2e.talk import ask

pytestmark = pytest.mark.engine

ALONE = [prompt(length) for length in (1, 127, 129, 700, 2500)]
TOGETHER = [prompt(length, seed=1) for length in (20, 128, 300, 1000)]


class Pair(Stage):
    """The engines of this file: the reference is gone before prefiller and decoder start, for they are large."""

    prefill: Engine
    decoder: Decoder
    proxy: Proxy

    def start(self, model: Path) -> None:
        binding = "|".join(cores())
        size = {"tensor_parallel": 2, "cores": binding}
        reference = self.start_engine(EngineSpec("reference", model, **size))
        self.ready()
        self.expected = {len(tokens): ask(reference, tokens).ids for tokens in (*ALONE, *TOGETHER)}
        self.cluster.stop(reference)
        producer = kvlink_config("kv_producer", kvlink_verify=True)
        trace = str(self.folder / "pulls.jsonl")
        consumer = kvlink_config("kv_consumer", kvlink_verify=True, kvlink_trace_file=trace)
        self.prefill = self.start_engine(EngineSpec("prefill", model, transfer=producer, **size))
        self.decoder = self.start_decoder(EngineSpec("decode", model, transfer=consumer, **size))
        self.proxy = self.start_proxy(self.prefill, self.decoder.engine)
        self.ready()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Pair]:
    with Pair(tmp_path_factory.mktemp("disagg-tp2")) as pair:
        pair.start(model)
        yield pair


@pytest.mark.parametrize("tokens", ALONE, ids=len)
def test_the_answer_is_the_single_engines(pair: Pair, tokens: list[int]) -> None:
    with pair.decoder.computes(1):
        answer = ask(pair.proxy, tokens)
    assert answer.route == "split"
    assert answer.ids == pair.expected[len(tokens)]
    check_both_ranks(pair, [tokens])
    settle(pair.prefill, pair.decoder.engine, ranks=2)


def test_concurrent_requests_answer_as_the_single_engine_does(pair: Pair) -> None:
    with pair.decoder.computes(len(TOGETHER)), ThreadPoolExecutor(len(TOGETHER)) as pool:
        answers = list(pool.map(lambda tokens: ask(pair.proxy, tokens, stream=True), TOGETHER))
    assert [answer.ids for answer in answers] == [pair.expected[len(tokens)] for tokens in TOGETHER]
    check_both_ranks(pair, TOGETHER)
    settle(pair.prefill, pair.decoder.engine, ranks=2)


def check_both_ranks(pair: Pair, prompts: list[list[int]]) -> None:
    """Each rank pulled each prompt that has something to pull, all but its last token."""
    lengths = sorted(len(tokens) for tokens in prompts if len(tokens) > 1)
    pulls = pair.decoder.pulls(2 * len(lengths))
    block = block_size(pair.prefill)
    for rank in (0, 1):
        ours = sorted((pull for pull in pulls if pull.rank == rank), key=lambda pull: pull.prompt_tokens)
        assert [pull.prompt_tokens for pull in ours] == lengths
        for pull in ours:
            check_pull(pull, tokens=pull.prompt_tokens, block=block, paths={"shm", "cma"})
    assert len({pull.raw["peer"] for pull in pulls}) == (2 if lengths else 0)
