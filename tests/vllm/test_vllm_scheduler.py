"""Against vLLM's own scheduler, plain and async: the text equals that of an engine without a connector."""

from __future__ import annotations

import random
import time

import pytest
from tests.vllm.real import BLOCK, RealEngine, model_folder, prefill, run
from vllm.v1.engine import FinishReason


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def engines(folder):
    made = []

    def make(role, **options):
        made.append(RealEngine(folder, role, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def prompts(seed, lengths):
    dice = random.Random(seed)
    return [[dice.randrange(1, 50_000) for _ in range(length)] for length in lengths]


def reference(engines, given, tokens=8):
    single = engines(None)
    for index, prompt in enumerate(given):
        single.add(f"r{index}", prompt, tokens=tokens)
    run(single)
    return [single.texts[f"r{index}"] for index in range(len(given))]


def settle(*used):
    run(*used)
    deadline = time.monotonic() + 10
    while any(any(engine.held().values()) for engine in used):
        assert time.monotonic() < deadline, [engine.held() for engine in used]
        time.sleep(0.002)
    for engine in used:
        assert engine.scheduler.requests == {}
        assert engine.free_blocks() == engine.free_at_start


LENGTHS = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1, 300]
MODES = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


@MODES
def test_text_equals_the_single_engine(engines, asynchronous):
    given = prompts(1, LENGTHS)
    expected = reference(engines, given)
    p, d = engines("kv_producer", asynchronous=asynchronous), engines("kv_consumer", asynchronous=asynchronous)
    for index, prompt in enumerate(given):
        d.add(f"d{index}", prompt, prefill(p, prompt))
        run(p, d)
    settle(p, d)
    assert [d.texts[f"d{index}"] for index in range(len(given))] == expected
    assert [d.computed[f"d{index}"] for index in range(len(given))] == [8] * len(given)
    assert d.stats["pulls"] == len(given) - 1


@MODES
def test_many_at_once_with_chunked_prefill(engines, asynchronous):
    given = prompts(2, [40 + 13 * n for n in range(12)])
    expected = reference(engines, given)
    p = engines("kv_producer", asynchronous=asynchronous, batched=64, blocks=200)
    d = engines("kv_consumer", asynchronous=asynchronous, batched=64, blocks=200)
    for index, prompt in enumerate(given):
        p.add(f"p{index}", prompt, {"do_remote_decode": True}, tokens=1)
    started = set()

    def feed():
        for index, prompt in enumerate(given):
            if f"p{index}" in p.answers and index not in started:
                started.add(index)
                d.add(f"d{index}", prompt, p.answers[f"p{index}"])
        return len(started) == len(given)

    run(p, d, until=feed)
    settle(p, d)
    assert [d.texts[f"d{index}"] for index in range(len(given))] == expected
    assert d.stats["pulls"] == len(given)


@MODES
def test_prefix_caching_pulls_only_what_is_missing(engines, asynchronous):
    first, tail = prompts(3, [5 * BLOCK + 3, 2 * BLOCK])
    second = first[: 4 * BLOCK] + tail
    expected = reference(engines, [first, second, first])
    p = engines("kv_producer", asynchronous=asynchronous, prefix_caching=True)
    d = engines("kv_consumer", asynchronous=asynchronous, prefix_caching=True)
    texts = []
    for index, prompt in enumerate([first, second, first]):
        d.add(f"d{index}", prompt, prefill(p, prompt))
        run(p, d)
        texts.append(d.texts[f"d{index}"])
    settle(p, d)
    assert texts == expected
    # 6 blocks, then the 2 that differ, then the partial last one.
    assert (d.stats["pulls"], d.stats["blocks"], d.stats["local_tokens"]) == (3, 6 + 2 + 1, 4 * BLOCK + 5 * BLOCK)


@MODES
def test_preemption_on_the_decoder(engines, asynchronous):
    given = prompts(4, [3 * BLOCK - 2] * 4)
    expected = reference(engines, given, tokens=60)
    p = engines("kv_producer", asynchronous=asynchronous)
    d = engines("kv_consumer", asynchronous=asynchronous, blocks=16)  # too few for four to grow
    requests = [d.add(f"d{i}", prompt, prefill(p, prompt), tokens=60) for i, prompt in enumerate(given)]
    settle(p, d)
    assert sum(request.num_preemptions for request in requests) > 0
    assert [d.texts[f"d{index}"] for index in range(len(given))] == expected


@MODES
def test_failures_are_recomputed(engines, asynchronous):
    given = prompts(5, [200, 201, 90])
    expected = reference(engines, given)
    p = engines("kv_producer", asynchronous=asynchronous)
    d = engines("kv_consumer", asynchronous=asynchronous, **{"kvlink.handoff_wait": 0.1})
    answers = [prefill(p, prompt) for prompt in given]
    answers[0]["kvlink_handoff"] = "0" * 32
    for index in (0, 1):
        d.add(f"d{index}", given[index], answers[index])
    run(d)
    p.close()
    d.add("d2", given[2], answers[2])
    run(d)
    assert [d.texts[f"d{index}"] for index in range(3)] == expected
    assert d.computed["d1"] == 8
    assert d.computed["d0"] == 207
    assert (d.stats["claim"], d.stats["connect"] if "connect" in d.stats else d.stats["claim"]) == (1, 1)
    assert d.free_blocks() == d.free_at_start


@MODES
def test_a_failed_pull_keeps_the_local_prefix(engines, asynchronous):
    (prompt,) = prompts(6, [6 * BLOCK])
    head = prompt[: 4 * BLOCK]
    expected = reference(engines, [prompt])[0]
    p = engines("kv_producer", asynchronous=asynchronous)
    d = engines("kv_consumer", asynchronous=asynchronous, prefix_caching=True, **{"kvlink.handoff_wait": 0.1})
    d.add("head", head)
    run(d)
    d.add("d", prompt, {**prefill(p, prompt), "kvlink_handoff": "0" * 32})
    run(d)
    assert d.texts["d"] == expected
    assert d.computed["d"] == 2 * BLOCK + 7


@MODES
def test_the_policy_fail_ends_the_request(engines, asynchronous):
    (prompt,) = prompts(7, [100])
    p = engines("kv_producer", asynchronous=asynchronous)
    d = engines(
        "kv_consumer", asynchronous=asynchronous, **{"kvlink.on_load_failure": "fail", "kvlink.handoff_wait": 0.1}
    )
    d.add("d", prompt, {**prefill(p, prompt), "kvlink_handoff": "0" * 32})
    run(d)
    assert d.reasons["d"] == FinishReason.ERROR
    assert d.free_blocks() == d.free_at_start


@MODES
def test_prompt_logprobs_are_computed_by_the_decoder(engines, asynchronous):
    (prompt,) = prompts(8, [70])
    expected = reference(engines, [prompt])[0]
    p = engines("kv_producer", asynchronous=asynchronous)
    d = engines("kv_consumer", asynchronous=asynchronous)
    d.add("d", prompt, prefill(p, prompt), prompt_logprobs=1)
    settle(p, d)
    assert d.texts["d"] == expected
    assert d.computed["d"] == 77


@MODES
@pytest.mark.parametrize("steps", range(0, 12, 2))
def test_abort_at_every_state(engines, asynchronous, steps):
    (prompt,) = prompts(9, [150])
    p = engines("kv_producer", asynchronous=asynchronous)
    d = engines("kv_consumer", asynchronous=asynchronous)
    d.add("d", prompt, prefill(p, prompt))
    for _ in range(steps):
        d.step()
    d.abort("d")
    settle(p, d)


@MODES
def test_abort_of_a_prefill(engines, asynchronous):
    (prompt,) = prompts(10, [500])
    p = engines("kv_producer", asynchronous=asynchronous, batched=64)
    p.add("p", prompt, {"do_remote_decode": True}, tokens=1)
    for _ in range(3):
        p.step()
    p.abort("p")
    settle(p)


@MODES
def test_two_hundred_requests_leave_nothing(engines, asynchronous):
    dice = random.Random(11)
    quick = {"kvlink.contact": 0.3, "kvlink.lease": 1.0, "kvlink.handoff_wait": 0.1, "kvlink.retry_after": 0.05}
    p = engines("kv_producer", asynchronous=asynchronous, blocks=300, **quick)
    q = engines("kv_producer", asynchronous=asynchronous, blocks=300, **quick)
    d = engines("kv_consumer", asynchronous=asynchronous, blocks=24, sequences=4, **quick)
    given = prompts(12, [dice.randrange(1, 120) for _ in range(200)])
    expected = reference(engines, given, tokens=4)
    fates = {}
    for index, prompt in enumerate(given):
        source = dice.choice((p, q)) if index < 120 else p
        if index == 120:
            q.close()
        answer = prefill(source, prompt)
        fate = fates[index] = dice.choice(("good", "good", "good", "abort", "forged", "wrong", "never", "plain"))
        if fate == "never":
            continue
        if fate == "forged":
            answer["kvlink_addresses"] = dice.choice([["tcp://127.0.0.1:1"], ["tcp://1.2.3.4:5"], ["x"], 7])
        elif fate == "wrong":
            answer["kvlink_handoff"] = f"{dice.getrandbits(128):032x}"
        d.add(f"d{index}", prompt, None if fate == "plain" else answer, tokens=4)
        for _ in range(dice.randrange(6)):
            d.step()
            p.step()
        if fate == "abort":
            d.abort(f"d{index}")
    settle(p, d)
    for index, fate in fates.items():
        if fate not in ("abort", "never"):
            assert d.texts[f"d{index}"] == expected[index], (index, fate)
    assert d.stats["pulls"] > 50
