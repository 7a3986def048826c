"""``kv_transfer_params``: what the prefiller's answer says, and how far the decoder believes it.

They come in an HTTP body, so everything is checked here: types, sizes, addresses, and with a secret the seal over
all of it. No block id is among them; those come over the authenticated connection only.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from kvlink_vllm.wire import PROTOCOL

MAX_RANKS = 1024
MAX_TEXT = 256
_HANDOFF = re.compile(r"[0-9a-f]{32}\Z")
_SEAL = re.compile(r"[0-9a-f]{64}\Z")
_MAX_TOKENS = 1 << 31


class ParamsError(ValueError):
    """Parameters that must not be acted on; the request is computed locally."""


@dataclass(frozen=True)
class HandOff:
    """A checked offer to pull a prompt's cache.

    Attributes:
        id: The hand-off's id, 32 hex digits.
        engine_id: The prefiller's engine, for logs only.
        addresses: One channel address a tensor-parallel rank.
        tokens: Tokens that the prefiller computed (a hint; the connection tells the truth).
    """

    id: str
    engine_id: str
    addresses: tuple[str, ...]
    tokens: int


def new_handoff_id() -> str:
    """Returns an id nobody can guess."""
    return secrets.token_hex(16)


def wants_prefill(params: object) -> bool:
    """Tells whether a request asks this engine to prefill for another."""
    return isinstance(params, dict) and params.get("do_remote_decode") is True


def wants_pull(params: object) -> bool:
    """Tells whether a request says that its prompt was prefilled elsewhere."""
    return isinstance(params, dict) and bool(params.get("do_remote_prefill"))


def offer(handoff: HandOff, secret: bytes | None) -> dict[str, Any]:
    """Builds the parameters of the prefiller's answer.

    Args:
        handoff: What to offer.
        secret: The shared secret; then the parameters are sealed.

    Returns:
        A JSON-able mapping.
    """
    params: dict[str, Any] = {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "kvlink_version": PROTOCOL,
        "kvlink_handoff": handoff.id,
        "kvlink_addresses": list(handoff.addresses),
        "remote_engine_id": handoff.engine_id,
        "remote_num_tokens": handoff.tokens,
        "tp_size": len(handoff.addresses),
    }
    if secret is not None:
        params["kvlink_seal"] = seal(params, secret)
    return params


def seal(params: Mapping[str, Any], secret: bytes) -> str:
    """Authenticates the parameters with the shared secret.

    Args:
        params: The parameters.
        secret: The shared secret.

    Returns:
        64 hex digits.
    """
    names = ("kvlink_version", "kvlink_handoff", "kvlink_addresses", "remote_engine_id", "remote_num_tokens", "tp_size")
    text = json.dumps([params.get(name) for name in names], separators=(",", ":"), sort_keys=True)
    key = hmac.new(secret, b"kvlink-vllm hand-off seal v1", hashlib.sha256).digest()
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def parse(params: Mapping[str, Any], *, tp_size: int, secret: bytes | None) -> HandOff:
    """Checks the parameters of a request to the decoder.

    Args:
        params: As they came.
        tp_size: This engine's tensor-parallel size.
        secret: The shared secret, if there is one: then the seal must fit; else every address must be loopback.

    Returns:
        The offer.

    Raises:
        ParamsError: Anything missing, malformed, too large, forged or not allowed; the message says what.
    """
    version = params.get("kvlink_version")
    if version is None:
        raise ParamsError("they are not kvlink's (no kvlink_version): does the prefiller run KVLinkConnector?")
    if type(version) is not int or version != PROTOCOL:
        raise ParamsError(f"kvlink_version is {_show(version)}, this connector speaks {PROTOCOL}")
    handoff = params.get("kvlink_handoff")
    if not isinstance(handoff, str) or not _HANDOFF.match(handoff):
        raise ParamsError("kvlink_handoff is not a hand-off id")
    engine = params.get("remote_engine_id")
    if not isinstance(engine, str) or not 0 < len(engine) <= MAX_TEXT or not engine.isprintable():
        raise ParamsError("remote_engine_id is not a short text")
    tokens = params.get("remote_num_tokens")
    if type(tokens) is not int or not 0 < tokens < _MAX_TOKENS:
        raise ParamsError(f"remote_num_tokens is {_show(tokens)}")
    addresses = _addresses(params.get("kvlink_addresses"))
    if type(params.get("tp_size")) is not int or params["tp_size"] != len(addresses):
        raise ParamsError(f"tp_size is {_show(params.get('tp_size'))} but there are {len(addresses)} addresses")
    if secret is not None:
        given = params.get("kvlink_seal")
        if not isinstance(given, str) or not _SEAL.match(given):
            raise ParamsError(
                "they carry no seal though a secret is configured here: set the same secret on both sides"
            )
        if not hmac.compare_digest(given, seal(params, secret)):
            raise ParamsError("their seal does not fit: forged, or the prefiller has another secret")
    else:
        for address in addresses:
            if not is_loopback(address):
                raise ParamsError(f"address {address} is not loopback and no secret is configured (kvlink.secret_file)")
    if len(addresses) != tp_size:
        raise ParamsError(
            f"the prefiller has tensor-parallel size {len(addresses)}, this decoder {tp_size}; they must be equal"
        )
    return HandOff(handoff, engine, addresses, tokens)


def _addresses(value: object) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or not 0 < len(value) <= MAX_RANKS:
        raise ParamsError("kvlink_addresses is not a list of addresses")
    for address in value:
        if not isinstance(address, str) or len(address) > MAX_TEXT or not address.isascii():
            raise ParamsError("kvlink_addresses holds something that is not an address")
        try:
            parts = urlsplit(address)
            valid = parts.scheme == "tcp" and bool(parts.hostname) and bool(parts.port) and not parts.path
        except ValueError:
            valid = False
        if not valid or parts.username is not None or parts.query or parts.fragment:
            raise ParamsError(f"kvlink_addresses holds {_show(address)}, not tcp://host:port")
    return tuple(value)


def is_loopback(address: str) -> bool:
    """Tells whether ``tcp://host:port`` names this host's loopback; names other than localhost are not resolved."""
    host = urlsplit(address).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def prompt_digest(request: Any) -> bytes | None:
    """Digests all that decides a prompt's KV cache besides the model.

    Args:
        request: vLLM's Request.

    Returns:
        16 bytes, or None if the prompt is not one of token ids (embeddings), which cannot be handed over.
    """
    tokens = getattr(request, "prompt_token_ids", None)
    if not tokens or getattr(request, "prompt_embeds", None) is not None:
        return None
    digest = hashlib.blake2b(digest_size=16)
    import numpy as np

    digest.update(np.asarray(tokens, dtype=np.int64).tobytes())
    lora = getattr(request, "lora_request", None)
    digest.update(f"|lora={getattr(lora, 'lora_name', '')}".encode())
    digest.update(f"|salt={getattr(request, 'cache_salt', None) or ''}".encode())
    for feature in getattr(request, "mm_features", None) or ():
        digest.update(f"|mm={feature.identifier}@{feature.mm_position.offset}".encode())
    return digest.digest()


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
