"""A fake engine around the real connector: it calls the hooks in vLLM's order and asserts vLLM's invariants.

The cache is small tensors; "computing" a token writes a value that depends on the prompt up to it, so a decoder's
cache can be compared with the prefiller's without a model.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.request import RequestStatus

from kvlink_vllm import connector as connector_module
from kvlink_vllm.connector import KVLinkConnector

BLOCK = 4
HEADS, HEAD = 2, 8


@dataclass(eq=False)
class Request:
    request_id: str
    prompt_token_ids: list[int]
    kv_transfer_params: dict[str, Any] | None = None
    lora_request: Any = None
    cache_salt: str | None = None
    mm_features: list[Any] = field(default_factory=list)
    prompt_embeds: Any = None
    status: RequestStatus = RequestStatus.WAITING
    num_computed_tokens: int = 0
    blocks: list[int] = field(default_factory=list)
    first_token: int | None = None
    computed_here: int = 0

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)


class Blocks:
    """What vLLM passes as KVCacheBlocks."""

    def __init__(self, ids: list[int]) -> None:
        self._ids = ids

    def get_block_ids(self) -> tuple[list[int], ...]:
        return (list(self._ids),)


def vllm_config(role: str, extra: dict[str, Any], **changes: Any) -> Any:
    model = SimpleNamespace(
        model="tiny",
        dtype=torch.float32,
        quantization=None,
        use_mla=False,
        is_encoder_decoder=False,
        hf_config=SimpleNamespace(to_dict=lambda: {"layers": 2, "_name_or_path": role}),
        get_head_size=lambda: HEAD,
        get_num_kv_heads=lambda parallel: HEADS,
    )
    config = SimpleNamespace(
        model_config=model,
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1, data_parallel_size=1),
        cache_config=SimpleNamespace(block_size=BLOCK, cache_dtype="auto", num_gpu_blocks=None),
        scheduler_config=SimpleNamespace(async_scheduling=False),
        speculative_config=None,
        kv_transfer_config=SimpleNamespace(
            kv_role=role,
            engine_id=f"engine-{role}",
            is_kv_producer=role in ("kv_producer", "kv_both"),
            is_kv_consumer=role in ("kv_consumer", "kv_both"),
            kv_connector_extra_config={"transfer_channel": "host", **extra},
            kv_load_failure_policy="fail",
        ),
    )
    for path, value in changes.items():
        owner: Any = config
        *parents, name = path.split("__")
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, value)
    return config


def cache_config(blocks: int, groups: int = 1) -> Any:
    spec = SimpleNamespace(block_size=BLOCK)
    return SimpleNamespace(
        num_blocks=blocks, kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec) for _ in range(groups)]
    )


class FakeEngine:
    """One engine with one or more ranks."""

    def __init__(self, role: str, *, blocks: int = 32, ranks: int = 1, layers: int = 2, **extra: Any) -> None:
        self.config = vllm_config(role, extra, parallel_config__tensor_parallel_size=ranks)
        caches = cache_config(blocks)
        self.calls: list[str] = []
        self.workers: list[KVLinkConnector] = []
        self.caches: list[dict[str, torch.Tensor]] = []
        original = connector_module._tp_rank
        try:
            for rank in range(ranks):
                connector_module._tp_rank = lambda rank=rank: rank
                worker = KVLinkConnector(self.config, KVConnectorRole.WORKER, caches)
                tensors = torch.full((layers, blocks, HEADS, BLOCK, 2 * HEAD), -1.0)
                self.caches.append({f"layers.{i}": tensors[i] for i in range(layers)})
                worker.register_kv_caches(self.caches[-1])
                self.workers.append(worker)
        finally:
            connector_module._tp_rank = original
        self.scheduler = KVLinkConnector(self.config, KVConnectorRole.SCHEDULER, caches)
        self.recompute = self.config.kv_transfer_config.kv_load_failure_policy == "recompute"
        self.scheduler.set_xfer_handshake_metadata(
            {rank: worker.get_handshake_metadata() for rank, worker in enumerate(self.workers)}
        )
        self.free = list(range(1, blocks))
        self.blocks = blocks
        self.requests: dict[str, Request] = {}
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.loading: dict[str, Request] = {}
        self.received: set[str] = set()
        self.failed: set[str] = set()
        self.answers: dict[str, dict[str, Any] | None] = {}
        self.finished_ids: set[str] = set()
        self.reports: dict[tuple[str, str], int] = {}
        self.prefix: dict[tuple[int, ...], int] = {}
        self.stats: dict[str, Any] = {}
        self.errored: list[str] = []
        self.during_forward: Any = lambda: None

    # vLLM's side

    def add(self, request: Request) -> None:
        self.requests[request.request_id] = request
        self.waiting.append(request)
        self.scheduler.on_new_request(request)

    def abort(self, request_id: str) -> None:
        request = self.requests.get(request_id)
        if request is None or request.status in (RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_LENGTH_CAPPED):
            return
        for queue in (self.waiting, self.running):
            if request in queue:
                queue.remove(request)
        delay = request_id in self.loading and request_id not in self.received
        self.loading.pop(request_id, None)
        request.status = RequestStatus.FINISHED_ABORTED
        self._free_request(request, delay)

    def _free_request(self, request: Request, delay: bool = False) -> None:
        used = -(-request.num_computed_tokens // BLOCK)
        keep, answer = self.scheduler.request_finished(request, request.blocks[:used])
        self.answers[request.request_id] = answer
        self.finished_ids.add(request.request_id)
        if not keep and not delay:
            self._free_blocks(request)

    def _free_blocks(self, request: Request) -> None:
        cached = set(self.prefix.values())
        self.free += [block for block in request.blocks if block not in cached]
        request.blocks = []
        del self.requests[request.request_id]

    def has_work(self) -> bool:
        return bool(self.requests or self.finished_ids)

    def step(self) -> None:
        """One engine step in vLLM 0.32's order."""
        scheduled: list[Request] = []
        for request_id, request in list(self.loading.items()):
            if request_id in self.received:
                self.received.discard(request_id)
                del self.loading[request_id]
                if request_id in self.failed:
                    self.failed.discard(request_id)
                request.status = RequestStatus.WAITING
                self.waiting.insert(0, request)
        for request in list(self.waiting):
            asynchronous = False
            external = 0
            if not request.blocks:
                local, shared = self._prefix_hit(request)
                external, asynchronous = self.scheduler.get_num_new_matched_tokens(request, local)
                assert external is not None
                need = -(-request.num_prompt_tokens // BLOCK) - len(shared)
                if need > len(self.free):
                    break
                request.blocks = shared + [self.free.pop(0) for _ in range(need)]
                request.num_computed_tokens = local + external
                self.scheduler.update_state_after_alloc(request, Blocks(request.blocks), external)
            self.waiting.remove(request)
            if asynchronous:
                assert external > 0
                request.status = RequestStatus.WAITING_FOR_REMOTE_KVS
                self.loading[request.request_id] = request
                continue
            request.status = RequestStatus.RUNNING
            self.running.append(request)
            scheduled.append(request)
        finished, self.finished_ids = self.finished_ids, set()
        meta = self.scheduler.build_connector_meta(
            SimpleNamespace(finished_req_ids=finished, total_num_scheduled_tokens=len(scheduled))
        )
        sent: set[str] = set()
        received: set[str] = set()
        invalid: set[int] = set()
        for rank, worker in enumerate(self.workers):
            worker.handle_preemptions(meta)
            worker.bind_connector_metadata(meta)
            self.during_forward()
            for request in scheduled:
                self._compute(request, self.caches[rank])
            worker.start_load_kv(None)
            worker.wait_for_save()
            results = worker.get_transfer_results(finished)
            for kind, ids, total in (("s", results.finished_sending, sent), ("r", results.finished_recving, received)):
                for one in ids:
                    key = (kind, one)
                    self.reports[key] = self.reports.get(key, 0) + 1
                    assert self.reports[key] <= len(self.workers), f"{one} reported too often"
                    if self.reports[key] == len(self.workers):
                        total.add(one)
            invalid |= worker.get_block_ids_with_load_errors()
            stats = worker.get_kv_connector_stats()
            for name, value in (stats.data if stats else {}).items():
                if isinstance(value, int):
                    self.stats[name] = self.stats.get(name, 0) + value
                elif isinstance(value, dict):
                    for reason, count in value.items():
                        self.stats[reason] = self.stats.get(reason, 0) + count
            worker.clear_connector_metadata()
        self._take_invalid(invalid)
        for one in received:
            assert one in self.requests, f"{one} received but unknown"
            request = self.requests[one]
            if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
                self.received.add(one)
            else:
                assert request.status == RequestStatus.FINISHED_ABORTED
                self._free_blocks(request)
        for one in sent:
            assert one in self.requests, f"{one} sent but unknown"
            self._free_blocks(self.requests[one])
        for request in scheduled:
            self.running.remove(request)
            request.num_computed_tokens = request.num_prompt_tokens
            request.status = RequestStatus.FINISHED_LENGTH_CAPPED
            self._free_request(request)

    def _take_invalid(self, invalid: set[int]) -> None:
        for request in self.loading.values():
            bad = [i for i, block in enumerate(request.blocks) if block in invalid]
            if bad and self.recompute:
                request.num_computed_tokens = bad[0] * BLOCK
                self.failed.add(request.request_id)
            elif bad:
                self.errored.append(request.request_id)

    def _prefix_hit(self, request: Request) -> tuple[int, list[int]]:
        shared: list[int] = []
        for end in range(BLOCK, request.num_prompt_tokens, BLOCK):
            block = self.prefix.get(tuple(request.prompt_token_ids[:end]))
            if block is None:
                break
            shared.append(block)
        return len(shared) * BLOCK, shared

    def remember_prefix(self, tokens: list[int]) -> None:
        """Puts a prompt's full blocks into the prefix cache, computed here."""
        for end in range(BLOCK, len(tokens) + 1, BLOCK):
            block = self.free.pop(0)
            self.prefix[tuple(tokens[:end])] = block
            for cache in self.caches:
                for layer, tensor in enumerate(cache.values()):
                    for slot in range(BLOCK):
                        tensor[block, :, slot] = value(tokens[: end - BLOCK + slot + 1], layer)

    def _compute(self, request: Request, cache: dict[str, torch.Tensor]) -> None:
        tokens = request.prompt_token_ids
        for position in range(request.num_computed_tokens, len(tokens)):
            for layer, tensor in enumerate(cache.values()):
                tensor[request.blocks[position // BLOCK], :, position % BLOCK] = value(tokens[: position + 1], layer)
        request.computed_here = len(tokens) - request.num_computed_tokens
        # The "first token" needs every position of the cache to be right.
        for position in range(len(tokens)):
            for layer, tensor in enumerate(cache.values()):
                row = tensor[request.blocks[position // BLOCK], :, position % BLOCK]
                expected = value(tokens[: position + 1], layer)
                assert torch.equal(row, torch.full_like(row, expected)), (request.request_id, position, layer)
        request.first_token = sum(tokens) % 1000

    # Tests' side

    def run(self, until: Any = None, timeout: float = 20.0) -> None:
        """Steps until there is no work, or until a condition holds."""
        deadline = time.monotonic() + timeout
        while self.has_work() if until is None else not until():
            assert time.monotonic() < deadline, f"no end; {self.requests=} {self.loading=}"
            self.step()
            time.sleep(0.001)  # as vLLM between empty steps

    def held(self) -> dict[str, int]:
        totals: dict[str, int] = {}
        for worker in self.workers:
            for name, count in worker._runner.counts().items():
                totals[name] = totals.get(name, 0) + count
        return totals

    def close(self) -> None:
        for worker in self.workers:
            worker.shutdown()
        self.scheduler.shutdown()


def value(prefix: list[int], layer: int) -> float:
    total = 0
    for token in prefix:
        total = (total * 31 + token) % 65_521
    return float(total * 8 + layer)


def prefill(engine: FakeEngine, request_id: str, tokens: list[int], **changes: Any) -> dict[str, Any]:
    """Runs a prefill until its answer is there and returns the answer's parameters; the blocks stay held."""
    engine.add(Request(request_id, tokens, {"do_remote_decode": True, "do_remote_prefill": False}, **changes))
    engine.run(until=lambda: request_id in engine.answers)
    engine.step()  # vLLM steps on; this one tells the workers
    answer = engine.answers[request_id]
    assert answer is not None
    return answer


def decode(engine, request_id, tokens, answer, **changes):
    request = Request(request_id, tokens, json.loads(json.dumps(answer)), **changes)
    engine.add(request)
    return request


def run_all(*engines, until=lambda: False):
    """Steps several engines side by side until none has work."""
    deadline = time.monotonic() + 30
    while any(engine.has_work() for engine in engines) and not until():
        assert time.monotonic() < deadline, [engine.requests for engine in engines]
        for engine in engines:
            engine.step()
        time.sleep(0.001)


def settle(prefiller, *decoders):
    """Lets everything end and checks that nothing is held any more."""
    run_all(prefiller, *decoders)
    for engine in (prefiller, *decoders):
        deadline = time.monotonic() + 10
        while any(engine.held().values()):
            assert time.monotonic() < deadline, engine.held()
            time.sleep(0.005)
        assert sorted(engine.free) == sorted(set(range(1, engine.blocks)) - set(engine.prefix.values()))
        assert engine.requests == {}


def warned(caplog, text):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and text in r.getMessage()]
