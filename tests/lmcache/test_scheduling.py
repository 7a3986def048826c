"""LMCache's connector on the scheduler's side, real, with a scheduler's outputs: what workers are told to send."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest

from kvlink_lmcache.registration import register

register()

from lmcache.integration.vllm import vllm_v1_adapter as adapter  # noqa: E402
from lmcache.v1.config import LMCacheEngineConfig  # noqa: E402
from vllm.v1.request import RequestStatus  # noqa: E402

from kvlink_lmcache import scheduling  # noqa: E402

CHUNK, BLOCK = 4, 2


class Scheduler:
    """Plays vLLM's scheduler to an LMCache connector that never started its services."""

    def __init__(self, **config):
        made = adapter.LMCacheConnectorV1Impl.__new__(adapter.LMCacheConnectorV1Impl)
        made.config = LMCacheEngineConfig.from_defaults(
            enable_pd=True, pd_role="sender", local_cpu=False, chunk_size=CHUNK, **config
        )
        made.kv_role = "kv_producer"
        # The names of both lines: 0.4.4 keeps what 0.5.6 asks its manager for.
        made._manager = SimpleNamespace(
            lookup_client=SimpleNamespace(clear_lookup_status=lambda _: None), lmcache_engine=None
        )
        made.force_skip_save = False
        made.async_loading = False
        made.load_specs, made._request_trackers, made._unfinished_requests, made._requests_priority = {}, {}, {}, {}
        made._block_size, made._lmcache_chunk_size, made._discard_partial_chunks = BLOCK, CHUNK, False
        self.connector = made

    def request(self, name, tokens, *, disagg=True):
        params = {
            "disagg_spec": {"req_id": "r", "receiver_host": "h", "receiver_init_port": [1], "receiver_alloc_port": [2]}
        }
        request = SimpleNamespace(
            request_id=name,
            req_id=name,
            prompt_token_ids=list(range(tokens)),
            all_token_ids=list(range(tokens)),
            num_tokens=tokens,
            num_computed_tokens=0,
            block_ids=([*range(-(-tokens // BLOCK))],),
            mm_features=[],
            mm_hashes=[],
            mm_positions=[],
            sampling_params=SimpleNamespace(extra_args=None),
            kv_transfer_params=params if disagg else None,
        )
        self.connector.update_state_after_alloc(request, 0)
        return request

    def step(self, request, count, *, new, finished=(), resumed=False):
        """One step; returns what a worker gets, which comes by pickle."""
        cached = SimpleNamespace(
            req_ids=[] if new else [request.request_id],
            new_block_ids=[None] if not resumed else [request.block_ids],
            resumed_req_ids={request.request_id} if resumed else set(),
        )
        output = SimpleNamespace(
            finished_req_ids=set(finished),
            scheduled_new_reqs=[request] if new else [],
            scheduled_cached_reqs=cached,
            num_scheduled_tokens={request.request_id: count},
        )
        meta = self.connector.build_connector_meta(output)
        request.num_computed_tokens += count
        return pickle.loads(pickle.dumps(meta)).requests


def sent(requests):
    """The token ranges that a worker of LMCache would send for a step's metadata."""
    ranges = []
    for request in requests:
        skip = min(request.save_spec.skip_leading_tokens, request.disagg_spec.num_transferred_tokens)
        if skip < len(request.token_ids):
            ranges.append((skip // CHUNK * CHUNK, len(request.token_ids)))
        # What a worker does with its own copy; the scheduler never hears of it.
        request.disagg_spec.num_transferred_tokens = len(request.token_ids)
    return ranges


def test_chunked_prefill_sends_each_token_once():
    """Without the repair steps two and three send everything from the start again."""
    scheduler = Scheduler()
    request = scheduler.request("a", 21)
    steps = [scheduler.step(request, 8, new=True)]
    steps += [scheduler.step(request, 8, new=False), scheduler.step(request, 5, new=False)]
    assert [sent(step) for step in steps] == [[(0, 8)], [(8, 16)], [(16, 21)]]
    assert [step[0].is_last_prefill for step in steps] == [False, False, True]
    # 0.4.4 declares no number of chunks.
    assert {getattr(step[0].disagg_spec, "total_chunks", 6) for step in steps} == {6}


def test_steps_that_end_inside_a_chunk():
    scheduler = Scheduler()
    request = scheduler.request("a", 13)
    steps = [
        scheduler.step(request, 6, new=True),
        scheduler.step(request, 6, new=False),
        scheduler.step(request, 1, new=False),
    ]
    assert [sent(step) for step in steps] == [[(0, 4)], [(4, 12)], [(12, 13)]]


def test_a_preempted_prompt_is_not_sent_twice():
    """LMCache asserts a load spec that it never makes for a prefiller: preemption would end the engine."""
    scheduler = Scheduler()
    request = scheduler.request("a", 21)
    first = sent(scheduler.step(request, 8, new=True))
    request.num_computed_tokens = 0
    again = sent(scheduler.step(request, 8, new=False, resumed=True))
    rest = sent(scheduler.step(request, 13, new=False))
    assert (first, again, rest) == ([(0, 8)], [], [(8, 21)])


def test_a_plain_request_to_a_prefiller_reaches_no_worker():
    """LMCache's asynchronous backend would read a port from nothing, and the engine would die."""
    scheduler = Scheduler()
    assert scheduler.step(scheduler.request("plain", 9, disagg=False), 9, new=True) == []
    assert len(scheduler.step(scheduler.request("split", 9), 9, new=True)) == 1


def test_a_prefiller_that_also_caches_keeps_plain_requests():
    scheduler = Scheduler()
    scheduler.connector.config.local_cpu = True
    assert len(scheduler.step(scheduler.request("plain", 9, disagg=False), 9, new=True)) == 1


def test_progress_of_finished_requests_is_forgotten():
    scheduler = Scheduler()
    request = scheduler.request("a", 9)
    scheduler.step(request, 9, new=True)
    assert scheduler.connector._kvlink_handed == {"a": 9}
    other = scheduler.request("b", 4)
    scheduler.step(other, 4, new=True, finished=["a"])
    assert scheduler.connector._kvlink_handed == {"b": 4}


@pytest.mark.parametrize("tokens", [[], [17]])
def test_a_request_aborted_before_its_first_token(tokens):
    """LMCache reads the first token for ret_first_tok without looking whether there is one."""
    scheduler = Scheduler()
    request = SimpleNamespace(
        request_id="a", status=RequestStatus.FINISHED_ABORTED, _output_token_ids=tokens,
        kv_transfer_params={"ret_first_tok": True},
    )  # fmt: skip
    held, params = scheduler.connector.request_finished(request, [])
    assert held is False
    assert params == ({"first_tok": 17} if tokens else None)


def test_repairing_twice_changes_nothing():
    before = adapter.LMCacheConnectorV1Impl.build_connector_meta
    scheduling.repair(adapter.LMCacheConnectorV1Impl)
    assert adapter.LMCacheConnectorV1Impl.build_connector_meta is before


def test_a_derived_class_with_a_method_of_its_own_is_repaired_once():
    """LMCache-Ascend's: it overrides the method and may call LMCache's, which is repaired too."""

    class Derived(adapter.LMCacheConnectorV1Impl):
        def build_connector_meta(self, scheduler_output):
            return super().build_connector_meta(scheduler_output)

    scheduling.repair(Derived)
    scheduler = Scheduler()
    scheduler.connector.__class__ = Derived
    request = scheduler.request("a", 21)
    steps = [scheduler.step(request, 8, new=True), scheduler.step(request, 13, new=False)]
    assert [sent(step) for step in steps] == [[(0, 8)], [(8, 21)]]


def test_a_prefiller_that_goes_on_decoding_sends_nothing_more():
    """A proxy may ask the prefiller for more than one token; LMCache would send the prompt's end with each."""
    scheduler = Scheduler()
    request = scheduler.request("a", 9)
    first = sent(scheduler.step(request, 9, new=True))
    request.all_token_ids.append(99)
    assert (first, scheduler.step(request, 1, new=False)) == ([(0, 9)], [])


def test_a_preempted_plain_request_of_a_prefiller():
    scheduler = Scheduler()
    request = scheduler.request("plain", 21, disagg=False)
    scheduler.step(request, 8, new=True)
    request.num_computed_tokens = 4  # what prefix caching found again
    assert scheduler.step(request, 17, new=False, resumed=True) == []


@pytest.mark.parametrize(("params", "looked_up"), [(None, 8), ({}, 8), ({"kvlink.whole_prompt": True}, 9)])
def test_a_decoder_that_makes_the_first_token_looks_the_whole_prompt_up(params, looked_up):
    """skip_last_n_tokens leaves out the prefiller's first token; where the proxy sent none there is nothing to skip."""
    connector = Scheduler().connector
    seen = []
    connector.kv_role = "kv_consumer"
    connector.skip_last_n_tokens, connector._max_tokens_per_load = 1, 0
    connector._manager.lookup_client = SimpleNamespace(
        lookup_cache=lambda lookup_id: -1, lookup=lambda tokens, **_: seen.append(len(tokens)) or len(tokens)
    )
    request = SimpleNamespace(
        request_id="a",
        all_token_ids=list(range(9)),
        num_tokens=9,
        mm_features=[],
        sampling_params=SimpleNamespace(extra_args=None),
        kv_transfer_params=params,
    )
    # The last token is computed in any case: vLLM needs its logits.
    assert connector.get_num_new_matched_tokens(request, 0) == 8
    assert (seen, connector.skip_last_n_tokens) == ([looked_up], 1)
