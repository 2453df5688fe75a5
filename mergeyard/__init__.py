"""Mergeyard's client: ``Client``, ``AsyncClient``, and what they raise. It needs httpx, and no part of the service."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergeyard.async_client import AsyncClient
    from mergeyard.client import Client
    from mergeyard.errors import (
        AccessError,
        ApiError,
        ConflictError,
        DownloadError,
        InvalidRequestError,
        NotFoundError,
        RateLimitedError,
        UnavailableError,
    )

__all__ = [
    "AccessError",
    "ApiError",
    "AsyncClient",
    "Client",
    "ConflictError",
    "DownloadError",
    "InvalidRequestError",
    "NotFoundError",
    "RateLimitedError",
    "UnavailableError",
]

_MODULES = {"AsyncClient": "mergeyard.async_client", "Client": "mergeyard.client"}


def __getattr__(name: str) -> Any:
    """Imported when it is asked for: `mergeyard --help` waits for no httpx."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES.get(name, "mergeyard.errors")), name)
