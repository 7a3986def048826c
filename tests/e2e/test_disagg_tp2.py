"""The same with tensor parallel size 2 on both sides: each rank pulls its own half of the heads."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tools.cluster import Engine, EngineSpec, Proxy, kvlink_config

from e2e.prompts import prompt
from e2e.stage import PATIENCE, Decoder, Stage, block_size, check_pull, cores, settle
from e2e.talk import ask

pytestmark = pytest.mark.engine

ALONE = [prompt(length) for length in (1, 127, 129, 700, 2500)]
TOGETHER = [prompt(length, seed=1) for length in (20, 128, 300, 1000)]
FIRST, SECOND = cores(2)


class Pair(Stage):
    """The engines of this file."""

    prefill: Engine
    decoder: Decoder
    proxy: Proxy
    paths: set[str]

    def start(self, model: Path, path: str) -> None:
        self.paths = {path} if path != "auto" else {"shm", "cma"}
        producer = kvlink_config("kv_producer", kvlink_verify=True, **PATIENCE)
        trace = str(self.folder / "pulls.jsonl")
        consumer = kvlink_config("kv_consumer", path=path, kvlink_verify=True, kvlink_trace_file=trace, **PATIENCE)
        self.prefill = self.start_engine(
            EngineSpec("prefill", model, cores=FIRST, tensor_parallel=2, transfer=producer)
        )
        self.decoder = self.start_decoder(
            EngineSpec("decode", model, cores=SECOND, tensor_parallel=2, transfer=consumer)
        )
        self.proxy = self.start_proxy(self.prefill, self.decoder.engine)
        self.ready()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, model: Path) -> dict[int, list[int]]:
    """The single engine's answers by length; it is gone before the others start, for they are large."""
    with Stage(tmp_path_factory.mktemp("reference-tp2")) as stage:
        reference = stage.start_engine(EngineSpec("reference", model, cores=FIRST, tensor_parallel=2))
        stage.ready()
        return {len(tokens): ask(reference, tokens).ids for tokens in (*ALONE, *TOGETHER)}


@pytest.fixture(scope="module", params=["auto", pytest.param("tcp", marks=pytest.mark.slow)])
def pair(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    model: Path,
    expected: dict[int, list[int]],
) -> Iterator[Pair]:
    with Pair(tmp_path_factory.mktemp("disagg-tp2")) as pair:
        pair.start(model, request.param)
        yield pair


@pytest.mark.parametrize("tokens", ALONE, ids=len)
def test_the_answer_is_the_single_engines(pair: Pair, expected: dict[int, list[int]], tokens: list[int]) -> None:
    with pair.decoder.computes(1):
        answer = ask(pair.proxy, tokens)
    assert answer.route == "split"
    assert answer.ids == expected[len(tokens)]
    check_both_ranks(pair, [tokens])
    settle(pair.prefill, pair.decoder.engine, ranks=2)


def test_concurrent_requests_answer_as_the_single_engine_does(pair: Pair, expected: dict[int, list[int]]) -> None:
    with pair.decoder.computes(len(TOGETHER)), ThreadPoolExecutor(len(TOGETHER)) as pool:
        answers = list(pool.map(lambda tokens: ask(pair.proxy, tokens, stream=True), TOGETHER))
    assert [answer.ids for answer in answers] == [expected[len(tokens)] for tokens in TOGETHER]
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
            check_pull(pull, tokens=pull.prompt_tokens, block=block, paths=pair.paths)
    assert len({pull.raw["peer"] for pull in pulls}) == (2 if lengths else 0)
