"""The proxy as an ASGI application."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Route

from kvlink_proxy.config import ProxyConfig
from kvlink_proxy.rewrite import CHAT, COMPLETIONS
from kvlink_proxy.service import Service, TextEndpoint, error_page


def create_app(config: ProxyConfig) -> Starlette:
    """Build the application; the proxy itself is at ``app.state.service``.

    Args:
        config: The settings.

    Returns:
        An ASGI application. It needs a server that runs its lifespan.
    """
    service = Service(config)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        del app
        async with service.running():
            yield

    app = Starlette(
        routes=[
            Route(COMPLETIONS, TextEndpoint(service, COMPLETIONS), methods=["POST"]),
            Route(CHAT, TextEndpoint(service, CHAT), methods=["POST"]),
            Route("/v1/models", service.models, methods=["GET"]),
            Route("/health", service.health, methods=["GET"]),
            Route("/metrics", service.metrics_page, methods=["GET"]),
        ],
        exception_handlers={HTTPException: error_page},
        lifespan=lifespan,
    )
    app.state.service = service
    return app
