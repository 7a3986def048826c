"""kvlink-proxy: one OpenAI-compatible address in front of prefill and decode engines.

The proxy sends a request to a prefiller (one token), takes the hand-off from its answer, and sends the original
request with that hand-off to a decoder, whose answer the client gets. Start it with ``kvlink-proxy`` or
``kvlink proxy``; embed it with :func:`kvlink_proxy.app.create_app`.
"""

from __future__ import annotations

__version__ = "0.1.0"
