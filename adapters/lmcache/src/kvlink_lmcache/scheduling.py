"""Repairs of LMCache's connector on the scheduler's side."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

WHOLE_PROMPT = "kvlink.whole_prompt"
"""In a request's ``kv_transfer_params``: its prompt is the prefiller's, without the first token behind it. LMCache's
``skip_last_n_tokens: 1`` expects that token; here it would look for a last chunk that is one token short."""

_MARK = "__kvlink_repaired__"
_TOLD = "kvlink_told"


def repair(implementation: Any) -> None:
    """Wraps methods of ``LMCacheConnectorV1Impl`` or of a class derived from it; a second call does nothing.

    Args:
        implementation: The class.
    """
    if _MARK in vars(implementation):
        return
    setattr(implementation, _MARK, True)
    build = implementation.build_connector_meta
    finish = implementation.request_finished
    match = implementation.get_num_new_matched_tokens

    @functools.wraps(build)
    def build_connector_meta(self: Any, scheduler_output: Any) -> Any:
        give_load_specs(self, scheduler_output.scheduled_cached_reqs)
        meta = build(self, scheduler_output)
        handed = self.__dict__.setdefault("_kvlink_handed", {})
        for request_id in scheduler_output.finished_req_ids:
            handed.pop(request_id, None)
        meta.requests = [
            request
            for request in meta.requests
            if not only_for_senders(self.config, request) and not is_through(self._request_trackers, request, handed)
        ]
        for request in meta.requests:
            if not getattr(request, _TOLD, False):  # a derived class's method and its base's are both wrapped
                tell_progress(request, handed)
                setattr(request, _TOLD, True)
        return meta

    @functools.wraps(finish)
    def request_finished(self: Any, request: Any, block_ids: Any) -> Any:
        if hasattr(request, "_output_token_ids") and not request._output_token_ids:
            return finish(self, _WithoutFirstToken(request), block_ids)
        return finish(self, request, block_ids)

    @functools.wraps(match)
    def get_num_new_matched_tokens(self: Any, request: Any, num_computed_tokens: int) -> Any:
        skip = self.skip_last_n_tokens
        if not skip or not (getattr(request, "kv_transfer_params", None) or {}).get(WHOLE_PROMPT):
            return match(self, request, num_computed_tokens)
        self.skip_last_n_tokens = 0
        try:
            return match(self, request, num_computed_tokens)
        finally:
            self.skip_last_n_tokens = skip

    implementation.get_num_new_matched_tokens = get_num_new_matched_tokens
    implementation.build_connector_meta = build_connector_meta
    implementation.request_finished = request_finished


def give_load_specs(connector: Any, cached: Any) -> None:
    """Gives requests that a prefiller preempted and resumes the load spec without which LMCache ends the engine.

    LMCache makes one when it looks a prompt up, which it does not do for prefillers.

    Args:
        connector: LMCache's ``LMCacheConnectorV1Impl``.
        cached: The scheduler's ``scheduled_cached_reqs``.
    """
    from lmcache.integration.vllm.vllm_v1_adapter import LoadSpec

    for request_id in getattr(cached, "resumed_req_ids", ()):
        request = connector._unfinished_requests.get(request_id)
        if request is not None and request_id not in connector.load_specs:
            connector.load_specs[request_id] = LoadSpec(
                vllm_cached_tokens=request.num_computed_tokens, lmcache_cached_tokens=0, can_load=False
            )


def only_for_senders(config: Any, request: Any) -> bool:
    """Tells whether a request has nothing to do with LMCache: it is a prefiller's, and names no decoder.

    LMCache would copy its KV into the PD buffer nevertheless; its asynchronous backend then reads the decoder's port
    from nothing and takes the engine with it.

    Args:
        config: LMCache's configuration.
        request: A ``ReqMeta`` of LMCache.
    """
    sender = config.enable_pd and config.pd_role == "sender" and not config.local_cpu
    loads = request.load_spec is not None and request.load_spec.can_load
    return bool(sender and request.disagg_spec is None and not loads)


def is_through(trackers: Mapping[str, Any], request: Any, handed: Mapping[str, int]) -> bool:
    """Tells whether a prompt was handed over before and this step only decodes: LMCache would send its end again.

    Args:
        trackers: LMCache's trackers by request.
        request: A ``ReqMeta`` of LMCache.
        handed: Tokens handed to workers so far, by request.
    """
    tracker = trackers.get(request.req_id)
    if request.disagg_spec is None or tracker is None or getattr(request, _TOLD, False):
        return False
    return bool(handed.get(request.req_id, 0) >= tracker.prompt_len)


def tell_progress(request: Any, handed: dict[str, int]) -> None:
    """Writes into a step's copy of a transfer what earlier steps handed to workers.

    LMCache's worker counts that on its own copy, which came by pickle; the scheduler's stays at 0, and each step of a
    chunked prefill would send all tokens again. So would a request that was preempted and starts over.

    Args:
        request: A ``ReqMeta`` of LMCache.
        handed: Tokens handed to workers so far, by request.
    """
    spec, save = request.disagg_spec, request.save_spec
    if spec is None or save is None:
        return
    before = min(max(handed.get(request.req_id, 0), save.skip_leading_tokens), len(request.token_ids))
    request.disagg_spec = copy.copy(spec)
    request.disagg_spec.num_transferred_tokens = before
    request.save_spec = type(save)(before, save.can_save)
    handed[request.req_id] = max(before, len(request.token_ids))


class _WithoutFirstToken:
    """A request that ended before its first token, without ``ret_first_tok``: LMCache would read that token."""

    def __init__(self, request: Any) -> None:
        self._request = request

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)

    @property
    def kv_transfer_params(self) -> Any:
        params = getattr(self._request, "kv_transfer_params", None)
        return {key: value for key, value in params.items() if key != "ret_first_tok"} if params else params
